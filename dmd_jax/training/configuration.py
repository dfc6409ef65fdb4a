"""Configs as programs: completed with defaults, turned into objects, stored and compared.

A section of a config names a class and values of its fields, `dict(cls=DMD, guidance=1.5)`, so that
a reader can jump from the config to the mathematics. Only training/ and the commands read configs.
Imports ml_collections.
"""

import dataclasses
import difflib
import importlib
import json
import math
import os
import pkgutil
import re
import sys
import traceback
import types
import typing

import ml_collections
from ml_collections import config_dict

# Sections that a resumed run may change: its length, what is logged and judged, and where and how
# it is computed.
FREE = ("steps", "log", "checkpoint", "health", "evaluate", "mesh", "accumulate")
# Entries of a role's `compute` that say how its weights are kept, not how its network computes.
STORAGE = ("weights_dtype", "memory")
BASE = "_base"  # ends the name of an adapter's base that is no role of its own
PROGRAM = "config_config"  # what a config program is called as a module


def complete(config, where="config"):
    """Adds the defaults of all classes that a config names, so that flags can override all fields.

    A field of type `X | None` accepts any Python literal as a flag: `None` and `5.0` for
    --config.generator.optimizer.clip. `construct` checks the type. A `cls` accepts the name of
    another class, as `_Class` says: --config.generator.optimizer.cls=Muon. A default that is a
    dataclass becomes a section: --config.method.causal.frames_per_block=1.

    Args:
        config: an ml_collections.ConfigDict; a section with a `cls` entry describes a dataclass.
            Completed and changed, it may be completed again.
        where: path of the section, for errors: "config.method".

    Returns:
        The same ConfigDict, completed and locked.
    """
    config.unlock()
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            complete(value, f"{where}.{name}")
    if "cls" in config:
        _complete_section(config)
        config["cls"] = _Class(config, where)
    if "compute" in config:  # of a role; see `roles`
        with config.compute.unlocked():
            for name in STORAGE:
                if name not in config.compute:
                    config.compute[name] = config_dict.placeholder(str)
    return config.lock()


def _complete_section(config):
    """Adds the defaults of the class of one section."""
    for field in dataclasses.fields(config.cls):
        if field.name not in config and field.default is dataclasses.MISSING:
            continue
        value = config.get(field.name, field.default)
        if _is_object(value):
            value = _section(value)
        if _is_literal(field.type) and not isinstance(value, ml_collections.ConfigDict):
            if field.name in config:
                del config[field.name]  # an assignment would keep its type
            value = config_dict.FieldReference(value, field_type=object)
        elif value is None:
            value = config_dict.placeholder(_alternatives(field.type)[0])
        config[field.name] = value


class _Class(config_dict.FieldReference):
    """The `cls` of a completed section. A flag chooses another class by its name: cls=Muon.

    The name is that of a class with the same base (AdamW and Muon: Optimizer), or of the base. It
    is in the package of the old class, or in a module that is imported. Fields that both classes
    have keep their values; those of the new class alone get its defaults. Flags cannot set the
    latter, because flags are looked up before the first of them is applied.

    Raises:
        ValueError: there is no such class, or the section states a value, not the old class's
            default, of a field that the new class lacks.
    """

    def __init__(self, section, where):
        self._section, self._where = section, where
        super().__init__(section.cls, field_type=object)

    def set(self, value, type_safe=True):
        if isinstance(value, type | config_dict.FieldReference):  # by a program, not a flag
            super().set(value, type_safe)
            return
        section, where, old = self._section, self._where, self.get()
        name, choices = str(value), _replacements(old)
        if name not in choices:
            _import_package(old)
            choices = _replacements(old)
        if name not in choices:
            raise ValueError(
                f"{where}.cls is {old.__name__}, and {name!r} cannot take its place: known are "
                f"{sorted(choices)}"
            )
        new = choices[name]
        lost = _lost(section, old, new, where)
        super().set(new)
        with section.unlocked():
            for name in lost:
                del section[name]
            _complete_section(section)


def _replacements(kind):
    """{name: class} of the imported dataclasses with the same base as a class."""
    return _dataclasses(_derived(kind.__mro__[-2]))  # before `object`


def _import_package(kind):
    """Imports all modules of the package that a class is in."""
    package = sys.modules[kind.__module__.rpartition(".")[0] or kind.__module__]
    for module in pkgutil.iter_modules(getattr(package, "__path__", ()), f"{package.__name__}."):
        importlib.import_module(module.name)


def _lost(section, old, new, where):
    """The entries of a section that class `old` has and `new` has not; all must be defaults."""
    defaults = complete(ml_collections.ConfigDict({"cls": old}))
    known = {"cls"} | {field.name for field in dataclasses.fields(new)}
    lost = [name for name in section if name not in known]
    if stated := [name for name in lost if section[name] != defaults.get(name, ...)]:
        raise ValueError(
            f"{where} states {', '.join(stated)} of {old.__name__}, which {new.__name__} does not "
            "have: write the whole section in a config program"
        )
    return lost


def _is_object(value):
    """Whether a value is an instance of a dataclass."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _section(value):
    """The completed section that describes an instance of a dataclass."""
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return complete(ml_collections.ConfigDict({"cls": type(value), **fields}))


def _is_literal(annotation):
    """Whether a flag for a field of this type is parsed as a Python literal: it may be None.

    A text is not: a path may look like a number.
    """
    return isinstance(annotation, types.UnionType) and str not in typing.get_args(annotation)


def expand_home(config):
    """Replaces a leading ~ in every text of a config, in place: paths may start in the home."""
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            expand_home(value)
        elif isinstance(value, str) and value.startswith("~"):
            config[name] = os.path.expanduser(value)


def flag_error(error, of_flags):
    """One sentence about an error that flags, a config program or its overrides raised.

    Args:
        error: what was raised.
        of_flags: whether it is the error of a flag, in absl's words.
    """
    cause = error
    while cause is not None:  # absl and ml_collections raise errors of their own in its place
        if line := _program_line(cause):
            return f"in the config: {type(cause).__name__}: {_text(cause)} ({line})"
        cause = cause.__context__
    if found := re.search(r"Attempted \[.*\]:\s+(.+?)\s+\[Errno 2\]", str(_text(error))):
        return (
            f"--config={found[1]}: there is no such file. A path is relative to the working "
            f"directory, {os.getcwd()}; those of the documentation are in a clone of the repository"
        )
    if found := re.match(r"flag (--\S+?)=(.*): Failed to parse .* as a ConfigDict", str(error)):
        return f"{found[1]} is a section: set its entries, as in {found[1]}.cls={found[2]}"
    if of_flags:
        return f"{error} (--help lists the flags; --config.NAME=VALUE sets an entry of the config)"
    text = str(_text(error))
    if text.startswith("'"):  # a name, or with a second line: did you mean
        text = f"there is no entry {text}".replace("\n", ". ")
    return f"in the config or a --config.* override: {text}"


def _text(error):
    while isinstance(error, AttributeError | KeyError):  # ml_collections puts one in the other
        error = error.args[0]  # as text, a KeyError is in quotes
    return error


def _program_line(error):
    """The file and line of a config program in which an error was raised; None elsewhere."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if frame.f_globals["__name__"] == PROGRAM:
            return f"{frame.f_code.co_filename}, line {line}"
    return None


def require_config(config):
    """Refuses what a config program has returned if it is no config.

    Raises:
        ValueError: it is something else.
        OSError: the program could not be read.
    """
    if not hasattr(config, "lock"):  # of an unread program, any attribute raises
        raise ValueError(f"get_config returned {config!r}, and a ConfigDict is wanted")


def config_role(name):
    """The role whose section of the config says where a frozen network comes from."""
    return name.removesuffix(BASE)


def compute_dtypes(config):
    """The dtypes in which the networks of a run compute."""
    sections = [s for s in config.values() if isinstance(s, ml_collections.ConfigDict)]
    return [section.compute.get("dtype", "float32") for section in sections if "compute" in section]


def construct(config, where, **given):
    """Creates the object that a section of a config describes.

    Args:
        config: ConfigDict with `cls`, a dataclass, and values of its fields. If the type of a field
            is a base class, the name of a subclass stands for that subclass with its defaults, so
            that a flag can choose it: --config.method.regression=X0.
        where: path of the section, for errors: "config.method".
        **given: fields that the program knows and the config does not state.

    Raises:
        ValueError: no class, an unknown field, a missing one, a value of the wrong type, one that
            differs from what is given, or values that the class refuses.
    """
    if "cls" not in config:
        raise ValueError(f"{where} names no class; write {where} = dict(cls=..., ...)")
    values = {name: config[name] for name in config if name != "cls"} | given
    fields = {field.name: field for field in dataclasses.fields(config.cls)}
    for name, value in given.items():
        if name in fields and config.get(name, value) not in (value, fields[name].default):
            raise ValueError(
                f"{where}.{name} is {config[name]!r}, but the rest of the config makes it "
                f"{value!r}: leave it out here"
            )
    for name, value in values.items():
        if name not in fields:
            raise ValueError(unknown(f"{where}.{name}", name, fields))
        kind = fields[name].type
        if isinstance(value, ml_collections.ConfigDict):
            values[name] = value = construct(value, f"{where}.{name}")
        elif isinstance(value, str) and value in (choices := _subclasses(kind)):
            values[name] = value = choices[value]()
        if not _fits(value, kind):
            wanted = kind.__name__ if isinstance(kind, type) else kind
            raise ValueError(f"{where}.{name} is {value!r}; it must be of type {wanted}")
        if not _is_finite(value):
            raise ValueError(f"{where}.{name} is {value!r}; numbers must be finite")
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)} of {config.cls.__name__}")
    try:
        return config.cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def unknown(what, name, known):
    """The error message for a name that does not exist: 'unknown ...: did you mean ...?'."""
    close = difflib.get_close_matches(name, list(known), 1)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {sorted(known)}"
    return f"unknown {what}: {hint}"


def _alternatives(annotation):
    """The types that an annotation allows, without None."""
    if isinstance(annotation, types.UnionType):
        return [kind for kind in typing.get_args(annotation) if kind is not types.NoneType]
    return [annotation]


def _subclasses(annotation):
    """{name: class} of the dataclasses that derive from the types that an annotation allows."""
    kinds = [kind for kind in _alternatives(annotation) if isinstance(kind, type)]
    return _dataclasses(sub for kind in kinds for sub in _derived(kind)[1:])


def _derived(kind):
    """A class, then all that derive from it."""
    return [kind, *(sub for child in kind.__subclasses__() for sub in _derived(child))]


def _dataclasses(kinds):
    """{name: class} of those classes that are dataclasses."""
    return {kind.__name__: kind for kind in kinds if dataclasses.is_dataclass(kind)}


def _fits(value, annotation):
    if value is None:
        return isinstance(annotation, types.UnionType)
    for kind in _alternatives(annotation):
        origin = typing.get_origin(kind) or kind
        if origin is float and isinstance(value, int | float) and not isinstance(value, bool):
            return True
        if origin is int and isinstance(value, bool):
            continue
        if isinstance(value, origin) and (origin is not tuple or _elements_fit(value, kind)):
            return True
    return False


def _is_finite(value):
    """Whether a number, or every number in a tuple, is neither infinite nor NaN."""
    if isinstance(value, tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _elements_fit(values, kind):
    """Whether a tuple is a tuple[int, ...] or a tuple[float, float], say."""
    kinds = typing.get_args(kind)
    if kinds[-1] is ...:
        kinds = kinds[:1] * len(values)
    return len(values) == len(kinds) and all(map(_fits, values, kinds))


def flatten(config):
    """A config as one flat dict of JSON values: {"method.guidance": 1.5, ...}; classes by name."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            flat |= {f"{name}.{inner}": v for inner, v in flatten(value).items()}
        elif isinstance(value, type):
            flat[name] = value.__name__
        else:
            flat[name] = json.loads(json.dumps(value))
    return flat


def defaults(config):
    """The defaults of the classes that a config names, for the fields that it states, flattened.

    A run that was started before a field existed stored no value of it. Defaults of new fields
    repeat what was computed without them, so they complete what such a run stored.
    """
    flat = {}
    # A class's own fields last: the default of a section is stated by the class that contains it.
    for name, value in sorted(config.items(), key=lambda item: item[0] == "cls"):
        if isinstance(value, ml_collections.ConfigDict):
            flat |= {f"{name}.{inner}": default for inner, default in defaults(value).items()}
        elif name == "cls":
            for field in dataclasses.fields(value):
                if field.name not in config or field.default is dataclasses.MISSING:
                    continue
                if _is_object(field.default):
                    section = flatten(_section(field.default))
                    flat |= {f"{field.name}.{inner}": value for inner, value in section.items()}
                elif not isinstance(config[field.name], ml_collections.ConfigDict):
                    flat[field.name] = json.loads(json.dumps(field.default))
    return flat


def _free(name):
    head, *rest = name.split(".")
    where = rest[:1] == ["compute"] or rest == ["optimizer", "memory"]
    return head in FREE or name == "data.data_dir" or where


def differences(stored, now):
    """The entries in which two flattened configs are different runs, one line each, or ''."""
    lines = []
    if "data.split" in now:  # earlier versions always read this split and did not store it
        stored = {"data.split": "train"} | stored
    for name in sorted(stored.keys() | now.keys()):
        a, b = stored.get(name, "nothing"), now.get(name, "nothing")
        if name.endswith("cls"):  # runs of earlier versions name a class with its module
            a = str(a).rsplit(".", 1)[-1]
        if a != b and not _free(name):
            lines.append(f"  {name}: the run here has {a}, this command {b}")
    return "\n".join(lines)
