"""Configs as programs: made complete, turned into objects, stored and compared.

A config names a class and its numbers, `dict(cls=DMD, guidance=1.5)`, so that a reader can jump
from the config to the mathematics. Only the programs of the top floors see configs.
"""

import dataclasses
import difflib
import json
import types
import typing

import ml_collections
from ml_collections import config_dict

# What a resumed run may change: its length, what is written down along the way, and where and how
# it is computed.
FREE = ("steps", "log", "checkpoint", "health", "evaluate", "mesh", "accumulate")


def complete(config):
    """Adds every default of the classes that a config names, so that flags can override them all.

    Args:
        config: an ml_collections.ConfigDict; a dict with a `cls` entry stands for a dataclass.

    Returns:
        The same ConfigDict, completed and locked.
    """
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            complete(value)
        elif name == "cls":
            for field in dataclasses.fields(value):
                if field.default is dataclasses.MISSING or field.name in config:
                    continue
                default = field.default
                if default is None:
                    default = config_dict.placeholder(_alternatives(field.type)[0])
                config[field.name] = default
    return config.lock()


def construct(config, where, **given):
    """Makes the object that a config describes.

    Args:
        config: ConfigDict with `cls`, a dataclass, and values of its fields.
        where: the config's own path, for errors: "config.method".
        **given: fields that the program knows and the config leaves out.

    Raises:
        ValueError: an unknown field, a missing one, or a value of the wrong type; or what the class
            itself refuses.
    """
    values = {name: config[name] for name in config if name != "cls"} | given
    fields = {field.name: field for field in dataclasses.fields(config.cls)}
    for name, value in values.items():
        if name not in fields:
            raise ValueError(unknown(f"{where}.{name}", name, fields))
        kind = fields[name].type
        if isinstance(value, ml_collections.ConfigDict):
            values[name] = value = construct(value, f"{where}.{name}")
        if not _fits(value, kind):
            wanted = kind.__name__ if isinstance(kind, type) else kind
            raise ValueError(f"{where}.{name} is {value!r}; it must be of type {wanted}")
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
    """The message for a name that does not exist: 'unknown ...; did you mean ...?'."""
    close = difflib.get_close_matches(name, list(known), 1)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {sorted(known)}"
    return f"unknown {what}: {hint}"


def _alternatives(annotation):
    """The types that an annotation allows, None left out."""
    if isinstance(annotation, types.UnionType):
        return [kind for kind in typing.get_args(annotation) if kind is not types.NoneType]
    return [annotation]


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


def _free(name):
    head, *rest = name.split(".")
    return head in FREE or name == "data.data_dir" or rest[:1] == ["compute"]


def differences(stored, now):
    """What keeps two flattened configs from being one run: a line each, '' if nothing does."""
    lines = []
    if "data.split" in now:  # runs of earlier versions read this split, and do not say so
        stored = {"data.split": "train"} | stored
    for name in sorted(stored.keys() | now.keys()):
        a, b = stored.get(name, "nothing"), now.get(name, "nothing")
        if name.endswith("cls"):  # runs of earlier versions name a class with its module
            a = a.rsplit(".", 1)[-1]
        if a != b and not _free(name):
            lines.append(f"  {name}: the run here has {a}, this command {b}")
    return "\n".join(lines)
