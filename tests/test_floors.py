"""The rooms of the library: imports go downwards, and each room keeps to its libraries."""

import ast
import re
import sys
from pathlib import Path

import programs
import pytest

LIBRARY = Path(__file__).parents[1] / "dmd_jax"

# Rooms from the ground up: a room imports those before it. A command may import every room, and
# nothing imports a command.
ROOMS = (
    *("devices", "data", "diffusion", "losses", "models", "weights"),
    *("rollouts", "pipelines", "quality", "methods", "training"),
)
COMMANDS = (
    *("main", "sample", "evaluate", "embed", "encode", "export", "metric_network", "ode_pairs"),
    *("plan", "stream"),
)

# The heart is mathematics on jax: no layer library, optimizer, mesh, file or config in it.
ONLY = {
    "diffusion": {"jax", "jaxtyping", "numpy", "einops"},
    "losses": {"jax", "jaxtyping", "diffusion"},
    "methods": {"jax", "jaxtyping", "devices", "diffusion", "losses", "models", "rollouts"},
}

# Libraries that are not for everybody, and the rooms that may use them.
RESERVED = {
    # Configs and flags stop at training and the commands; below them, arguments are plain.
    "ml_collections": {"training", *COMMANDS},
    "absl": {*COMMANDS},
    "flax": {"models", "weights", "quality"},
    "lmdb": {"data"},
    "optax": {"training", "quality"},
    "orbax": {"training"},
    "tensorflow_datasets": {"data"},
    "tensorflow": {"training", "data"},
    "clu": {"training"},
    "matplotlib": {"quality"},
    "websockets": {"pipelines"},
}


def room_of(path):
    """The room that a file belongs to: the first name below the library."""
    return path.relative_to(LIBRARY).parts[0].removesuffix(".py")


def imports(source):
    """(rooms, libraries) that a source text imports, within functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, (
                f"line {node.lineno}: write `from dmd_jax...`, not a relative import"
            )
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    split = [name.split(".") for name in names]
    rooms = {parts[1] for parts in split if parts[0] == "dmd_jax" and len(parts) > 1}
    libraries = {parts[0] for parts in split} - {"dmd_jax"} - set(sys.stdlib_module_names)
    return rooms, libraries


def complaints(room, source):
    """What is wrong with a source text of this room or command, in words."""
    rooms, libraries = imports(source)
    rooms -= {room}
    if room not in (*ROOMS, *COMMANDS):
        return [
            f"dmd_jax/{room} is no room and no command: put it into a room, or name it in ROOMS or "
            f"COMMANDS of {Path(__file__).name}"
        ]
    below = ROOMS if room in COMMANDS else ROOMS[: ROOMS.index(room)]
    wrong = [
        f"dmd_jax/{room} imports dmd_jax/{other}, which is not below it: move what both need down"
        for other in sorted(rooms - set(below))
    ]
    wrong += [
        f"dmd_jax/{room} may import {sorted(ONLY[room])} only, not {other}"
        for other in sorted((rooms | libraries) - ONLY.get(room, rooms | libraries))
    ]
    wrong += [
        f"dmd_jax/{room} imports {library}, which is for {sorted(RESERVED[library])}"
        for library in sorted(libraries & RESERVED.keys())
        if room not in RESERVED[library]
    ]
    return wrong


FILES = sorted(path for path in LIBRARY.rglob("*.py") if path != LIBRARY / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(LIBRARY).as_posix())
def test_imports_go_downwards(path):
    assert not complaints(room_of(path), path.read_text())


def test_the_package_itself_imports_nothing():
    """So that a program can set its devices up before jax is there."""
    assert imports((LIBRARY / "__init__.py").read_text()) == (set(), set())


def test_commands_start_without_the_libraries_that_few_of_them_use():
    """matplotlib, SciPy and Pallas would be about a third of what a command imports."""
    slow = "matplotlib", "scipy", "jax.experimental.pallas"
    program = f"import sys; from dmd_jax import {', '.join(COMMANDS)}"
    ended = programs.python("-c", f"{program}; print([x for x in {slow} if x in sys.modules])")
    assert ended.stdout == "[]\n", ended.stderr


def test_no_room_is_a_drawer():
    drawers = {"utils", "util", "common", "helpers", "misc", "core", "base"}
    assert not {path.stem for path in FILES} & drawers


def test_the_package_holds_commands_and_rooms_and_nothing_else():
    files = {path.stem for path in LIBRARY.glob("*.py")} - {"__init__"}
    folders = {path.parent.name for path in LIBRARY.glob("*/__init__.py")}
    assert files == set(COMMANDS) and folders == set(ROOMS)


@pytest.mark.parametrize(
    "room, source, complaint",
    [
        ("nose", "import jax", "nose is no room and no command"),
        ("training", "from dmd_jax import nose", "imports dmd_jax/nose, which is not below it"),
        ("diffusion", "import dmd_jax.losses.x", "diffusion imports dmd_jax/losses, which is not"),
        ("training", "def f():\n    from dmd_jax.main import main", "imports dmd_jax/main"),
        ("sample", "from dmd_jax import embed", "sample imports dmd_jax/embed, which is not below"),
        ("losses", "from dmd_jax import training", "losses imports dmd_jax/training"),
        ("losses", "from flax import nnx", "losses may import .* only, not flax"),
        ("losses", "from dmd_jax.devices.sharding import P", "only, not devices"),
        ("rollouts", "import ml_collections", "ml_collections, which is for"),
        ("data", "import optax", "data imports optax"),
    ],
)
def test_what_is_forbidden_is_found(room, source, complaint):
    found = complaints(room, source)
    assert any(re.search(complaint, text) for text in found), found


def test_what_is_allowed_is_not_found():
    assert not complaints("training", "import jax\nfrom dmd_jax.devices import sharding")
    assert not complaints(
        "losses", "from dmd_jax.losses.x import y\nfrom dmd_jax.diffusion.schedule import z"
    )
