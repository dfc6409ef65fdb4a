"""Configs are completed, become objects, refuse what they cannot be, and compare."""

import dataclasses
import importlib
from typing import ClassVar

import ml_collections
import pytest
from absl import flags
from ml_collections import config_dict, config_flags

from dmd_jax.methods.dmd import DMD
from dmd_jax.methods.sid import SiD
from dmd_jax.training.configuration import (
    complete,
    construct,
    defaults,
    differences,
    expand_home,
    flag_error,
    flatten,
)
from dmd_jax.training.optimizer import AdamW, Muon


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int = 3


@dataclasses.dataclass(frozen=True)
class Holder:
    inner: Inner = Inner(7)


class Shape:
    """The base class of Round and Square."""


@dataclasses.dataclass(frozen=True)
class Round(Shape):
    radius: int = 1


@dataclasses.dataclass(frozen=True)
class Square(Shape):
    side: int = 1


@dataclasses.dataclass(frozen=True)
class Outer:
    kind: ClassVar = "not a field"

    shape: tuple[int, ...]
    weight: float = 1.0
    count: int = 2
    flag: bool = False
    name: str = "plain"
    limit: float | None = None
    path: str | None = None
    form: Shape | None = None
    inner: Inner | None = None

    def __post_init__(self):
        if self.count > 9:
            raise ValueError(f"count={self.count} must be 9 or less")


def described(**fields):
    return complete(ml_collections.ConfigDict({"part": {"cls": Outer, **fields}})).part


def build_outer(**fields):
    return construct(described(**fields), "config.part", shape=(1, 2))


def flagged(fields, *given):
    """The config of one section, `part`, as these flags leave it."""
    config = complete(ml_collections.ConfigDict({"part": fields}))
    values, argv = flags.FlagValues(), ["", *given]
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    values(argv)
    return values.config


def test_completed_config_holds_every_default_of_the_classes_it_names():
    config = complete(ml_collections.ConfigDict({"method": {"cls": DMD, "guidance": 1.5}}))
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(DMD)
        if field.default is not dataclasses.MISSING
    }
    assert config.method.to_dict() == defaults | {"cls": DMD, "guidance": 1.5}
    assert "sample_shape" not in config.method  # no default: the program knows it


def test_completed_config_is_locked_at_every_depth_and_says_what_was_meant():
    config = complete(ml_collections.ConfigDict({"a": {"optimizer": {"cls": AdamW}}}))
    with pytest.raises(AttributeError, match='Did you mean "learning_rate"'):
        config.a.optimizer.learning_rat = 1.0


def test_a_default_of_none_can_be_overridden_by_its_own_type_only():
    part = described()
    part.limit = 0.5
    assert construct(part, "config.part", shape=(1,)).limit == 0.5
    part.limit = "half"
    with pytest.raises(ValueError, match=r"config\.part\.limit is 'half'"):
        construct(part, "config.part", shape=(1,))
    with pytest.raises(TypeError):
        part.path = 0.5


@pytest.mark.parametrize(
    "flag, name, value",
    [
        ("--config.part.limit=None", "limit", None),
        ("--config.part.limit=2.5", "limit", 2.5),
        ("--config.part.limit=3", "limit", 3),
        ("--config.part.path=7", "path", "7"),
        ("--config.part.form=Square", "form", Square()),
        ("--config.part.form=None", "form", None),
    ],
)
def test_a_flag_sets_a_field_that_may_be_none(flag, name, value):
    part = construct(flagged({"cls": Outer, "limit": 1.0}, flag).part, "config.part", shape=(1,))
    assert getattr(part, name) == value


@pytest.mark.parametrize(
    "fields, new",
    [
        (dict(cls=AdamW, b1=0.0, clip=None), Muon(b1=0.0, clip=None)),
        (dict(cls=Muon, learning_rate=2e-4), AdamW(learning_rate=2e-4)),
        (dict(cls=Square), Round()),
        (dict(cls=DMD, guidance=1.5), SiD((28, 28, 1), guidance=1.5)),
        (dict(cls=SiD, guidance=1.5), DMD((28, 28, 1), guidance=1.5)),
    ],
)
def test_a_flag_replaces_a_class_by_another_of_its_base(fields, new):
    name = type(new).__name__
    part = flagged(fields, f"--config.part.cls={name}").part
    given = {"sample_shape": (28, 28, 1)} if hasattr(new, "sample_shape") else {}
    assert construct(part, "config.part", **given) == new
    written = complete(ml_collections.ConfigDict(fields | {"cls": type(new)}))
    assert flatten(part) == flatten(written) and part.is_locked
    # A run that was started by the flag is resumed by a program that names the class.
    assert differences(flatten(part), defaults(written) | flatten(written)) == ""


def test_a_program_may_change_and_complete_a_completed_config():
    config = complete(ml_collections.ConfigDict({"part": {"cls": AdamW, "b1": 0.0}}))
    with config.unlocked():
        config.part.cls = Muon
        config.more = {"cls": Inner}
    complete(config)
    assert construct(config.part, "config.part") == Muon(b1=0.0)
    assert construct(config.more, "config.more") == Inner()


def test_a_flag_chooses_a_class_and_changes_what_both_classes_have():
    part = flagged({"cls": AdamW}, "--config.part.cls=Muon", "--config.part.clip=None").part
    assert construct(part, "config.part") == Muon(clip=None)


def test_a_flag_finds_a_class_of_its_package_that_nothing_imported(tmp_path, monkeypatch):
    package = tmp_path / "package_of_parts"
    package.mkdir()
    source = (
        "from dataclasses import dataclass\n{}\n@dataclass(frozen=True)\nclass {}:\n    x: int\n"
    )
    (package / "__init__.py").write_text("")
    (package / "one.py").write_text(source.format("", "One"))
    (package / "two.py").write_text(source.format("from .one import One", "Two(One)"))
    monkeypatch.syspath_prepend(tmp_path)
    one = importlib.import_module("package_of_parts.one").One
    part = flagged({"cls": one, "x": 1}, "--config.part.cls=Two", "--config.part.x=3").part
    assert repr(construct(part, "config.part")) == "Two(x=3)"


@pytest.mark.parametrize(
    "fields, name, message",
    [
        (
            {"cls": DMD},
            "Pretrain",
            r"config\.part\.cls is DMD, and 'Pretrain' .*'DMD', .*'SiD'",
        ),
        ({"cls": Inner}, "None", r"config\.part\.cls is Inner, and 'None' cannot take its place"),
        ({"cls": SiD, "alpha": 1.2}, "DMD", r"config\.part states alpha of SiD, which DMD"),
    ],
)
def test_a_class_that_cannot_take_the_place_of_another_is_refused(fields, name, message):
    with pytest.raises(ValueError, match=message):
        flagged(fields, f"--config.part.cls={name}")


def test_an_unknown_class_is_refused_as_a_value_of_another_type():
    with pytest.raises(ValueError, match=r"config\.part\.form is 'Oval'"):
        build_outer(form="Oval")


def test_a_section_without_a_class_is_refused_by_its_path():
    with pytest.raises(ValueError, match=r"config\.log names no class; write config\.log = dict"):
        construct(ml_collections.ConfigDict({"every": 5}), "config.log")


def test_a_tilde_is_the_home_directory_at_every_depth(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = ml_collections.ConfigDict({"a": {"path": "~/x", "other": "a~b"}, "n": 1})
    config.data_dir = config_dict.placeholder(str)
    config.data_dir = "~"
    expand_home(config.lock())
    assert config.to_dict() == {
        **{"a": {"path": "/home/me/x", "other": "a~b"}, "n": 1},
        "data_dir": "/home/me",
    }


def test_objects_are_made_from_values_defaults_and_what_the_program_gives():
    assert build_outer(weight=2.0, name="other") == Outer(shape=(1, 2), weight=2.0, name="other")
    assert build_outer(inner={"cls": Inner, "size": 5}).inner == Inner(5)


def test_a_whole_number_does_for_a_real_one():
    assert build_outer(weight=2).weight == 2


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"wieght": 2.0}, r"unknown config\.part\.wieght: did you mean 'weight'\?"),
        ({"zzz": 2.0}, r"unknown config\.part\.zzz: known are \['count', "),
        ({"count": 2.5}, r"config\.part\.count is 2\.5; it must be of type int"),
        ({"count": True}, r"config\.part\.count is True; it must be of type int"),
        ({"weight": "much"}, r"config\.part\.weight is 'much'; it must be of type float"),
        ({"weight": False}, r"config\.part\.weight is False; it must be of type float"),
        ({"weight": None}, r"config\.part\.weight is None; it must be of type float"),
        ({"limit": "low"}, r"config\.part\.limit is 'low'; it must be of type float \| None"),
        ({"weight": float("nan")}, r"config\.part\.weight is nan; numbers must be finite"),
        ({"limit": float("inf")}, r"config\.part\.limit is inf; numbers must be finite"),
        ({"inner": {"cls": Inner, "size": 0.5}}, r"config\.part\.inner\.size is 0\.5"),
        ({"inner": {"cls": Inner, "sice": 5}}, r"config\.part\.inner\.sice: did you mean 'size'"),
        ({"count": 10}, r"config\.part: count=10 must be 9 or less"),
    ],
)
def test_what_a_class_cannot_be_made_of_is_refused_by_its_path(fields, message):
    with pytest.raises(ValueError, match=message):
        build_outer(**fields)


def test_a_value_that_the_program_knows_better_is_refused_and_not_ignored():
    part = described(count=5, name="mine")
    assert construct(part, "config.part", shape=(1,), count=5, name="mine").count == 5
    with pytest.raises(ValueError, match=r"config\.part\.name is 'mine', but .* makes it 'other'"):
        construct(part, "config.part", shape=(1,), name="other")


def test_elements_of_a_tuple_have_types_too():
    with pytest.raises(ValueError, match=r"config\.part\.shape is \(1, 'two'\)"):
        construct(described(), "config.part", shape=(1, "two"))


def test_fields_without_a_value_are_named():
    with pytest.raises(ValueError, match=r"config\.part lacks shape of Outer"):
        construct(described(), "config.part")


def test_flat_config_is_json_and_names_classes():
    config = ml_collections.ConfigDict(
        {"a": {"b": (1, 2), "cls": AdamW}, "c": config_dict.placeholder(str), "d": 0.5}
    )
    assert flatten(config) == {
        "a.b": [1, 2],
        "a.cls": "AdamW",
        "c": None,
        "d": 0.5,
    }


def test_differences_are_listed_with_both_values():
    stored, now = {"seed": 0, "a.b": 1, "gone": 2}, {"seed": 1, "a.b": 1, "new": 3}
    assert differences(stored, now).splitlines() == [
        "  gone: the run here has 2, this command nothing",
        "  new: the run here has nothing, this command 3",
        "  seed: the run here has 0, this command 1",
    ]


def test_a_field_that_a_stored_config_lacks_has_its_default():
    config = complete(ml_collections.ConfigDict({"role": {"optimizer": {"cls": AdamW}}}))
    stored = flatten(config)
    del stored["role.optimizer.end_value"]  # stored before this field existed
    assert differences(defaults(config) | stored, flatten(config)) == ""
    with config.unlocked():
        config.role.optimizer.end_value = 1e-6
    assert differences(defaults(config) | stored, flatten(config)).splitlines() == [
        "  role.optimizer.end_value: the run here has 0.0, this command 1e-06"
    ]


def test_a_default_that_is_a_dataclass_becomes_a_section_that_a_flag_changes():
    config = complete(ml_collections.ConfigDict({"part": {"cls": Holder}}))
    assert config.part.inner.to_dict() == {"cls": Inner, "size": 7}
    assert construct(config.part, "config.part") == Holder()
    flag, values = "--config.part.inner.size=4", flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=["", flag])
    values(["", flag])
    assert construct(values.config.part, "config.part") == Holder(Inner(4))
    stated = complete(ml_collections.ConfigDict({"part": {"cls": Holder, "inner": {"cls": Inner}}}))
    assert construct(stated.part, "config.part") == Holder(Inner(3))


def test_a_section_that_a_stored_config_lacks_is_the_default_of_its_class():
    config = complete(ml_collections.ConfigDict({"part": {"cls": Holder}}))
    stored = {"part.cls": "Holder"}  # stored before the field `inner` existed
    assert differences(defaults(config) | stored, flatten(config)) == ""
    with config.unlocked():
        config.part.inner.size = 3
    assert "the run here has 7, this command 3" in differences(
        defaults(config) | stored, flatten(config)
    )


@pytest.mark.parametrize("name", ["steps", "log.every", "checkpoint.keep", "evaluate.samples"])
def test_length_and_logging_keep_no_two_configs_apart(name):
    assert differences({name: 1}, {name: 2}) == ""


def test_numbers_of_steps_elsewhere_do_keep_configs_apart():
    assert "method.steps" in differences({"method.steps": 1}, {"method.steps": 2})


def test_a_config_program_that_is_not_there_is_told_with_the_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values, argv = flags.FlagValues(), ["", "--config=configs/dmdd.py"]
    with pytest.raises(OSError) as caught:
        config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
        values(argv)
        values.config.lock()
    message = flag_error(caught.value, of_flags=False)
    assert message.startswith("--config=configs/dmdd.py: there is no such file")
    assert str(tmp_path) in message


def test_an_unknown_flag_is_told_how_an_entry_of_the_config_is_set():
    assert "--config.NAME=VALUE" in flag_error(flags.UnrecognizedFlagError("steps"), of_flags=True)
