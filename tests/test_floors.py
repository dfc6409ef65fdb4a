"""The rooms of the library: imports go downwards, and each room keeps to its libraries."""

import ast
import re
import sys
from pathlib import Path

import pytest

LIBRARY = Path(__file__).parents[1] / "dmd_jax"

# Rooms from the ground up. A room may import those on the floors below its own; a floor that must
# have stairs within has several lines. A package is one room.
BELOW_THE_PROGRAMS = [
    # 0. Infrastructure: knows nothing about diffusion.
    {"paths"},
    {"sharding", "randomness", "optimizer", "checkpoint", "health", "metrics", "writers"},
    {"video", "text"},
    {"data", "report"},
    # 1. Noise schedules and network families.
    {"schedule", "models"},
    # 2. A network as a function to x0; files of weights.
    {"denoiser"},
    {"weights"},
    # 3. The papers; how a generator makes a sample; what samples are judged by.
    {"losses", "rollout", "solvers", "features"},
    {"judge"},
    # 4. A method is its losses; the train step.
    {"methods", "step", "samplers"},
]
PROGRAMS = [
    # 5.
    {"configuration", "metric_network", "embed", "export"},
    {"pipeline"},
    {"encode", "sample"},
    {"evaluate"},
    {"run"},
    {"train"},
    # 6. Flags, distributed start, mesh.
    {"main"},
]
FLOORS = BELOW_THE_PROGRAMS + PROGRAMS

# The heart is mathematics on jax: no layer library, optimizer, mesh, file or config in it.
ONLY = {
    "schedule": {"jax"},
    "randomness": {"jax"},
    "denoiser": {"jax", "einops", "schedule"},
    "losses": {"jax", "schedule", "denoiser"},
    "solvers": {"jax", "numpy", "schedule"},
    "rollout": {"jax", "schedule", "denoiser", "randomness"},
    "methods": {"jax", "schedule", "denoiser", "randomness", "losses", "rollout"},
    "step": {"jax", "optax", "sharding"},
}

# Libraries that are not for everybody, and the rooms that may use them.
RESERVED = {
    # Configs and flags stop at the programs; below them, arguments are plain.
    "ml_collections": set().union(*PROGRAMS),
    "absl": set().union(*PROGRAMS),
    "flax": {"models", "weights", "features", "metric_network"},
    "optax": {"optimizer", "step", "metric_network"},
    "orbax": {"checkpoint"},
    "tensorflow_datasets": {"data"},
    "tensorflow": {"writers", "data"},
    "clu": {"writers"},
    "matplotlib": {"report"},
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
    """What is wrong with a source text of this room, in words."""
    rooms, libraries = imports(source)
    rooms -= {room}
    floor = {name: i for i, floor in enumerate(FLOORS) for name in floor}
    if room not in floor:
        return [
            f"dmd_jax/{room} has no floor: add it to FLOORS in {Path(__file__).name}, as low as "
            "its imports allow"
        ]
    wrong = [
        f"dmd_jax/{room} imports dmd_jax/{other}, which has no floor"
        for other in sorted(rooms - floor.keys())
    ]
    wrong += [
        f"dmd_jax/{room} imports dmd_jax/{other}, which is not below it: move what both need down"
        for other in sorted(rooms & floor.keys())
        if floor[other] >= floor[room]
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


def test_no_room_is_a_drawer():
    drawers = {"utils", "util", "common", "helpers", "misc", "core", "base"}
    assert not {path.stem for path in FILES} & drawers


@pytest.mark.parametrize(
    "room, source, complaint",
    [
        ("nose", "import jax", "nose has no floor: add it to FLOORS"),
        ("step", "from dmd_jax import nose", "nose, which has no floor"),
        ("schedule", "import dmd_jax.denoiser", "schedule imports dmd_jax/denoiser, which is not"),
        ("train", "def f():\n    from dmd_jax.main import main", "imports dmd_jax/main"),
        ("losses", "from dmd_jax import step, schedule", "losses imports dmd_jax/step"),
        ("losses", "from flax import nnx", "losses may import .* only, not flax"),
        ("losses", "from dmd_jax.sharding import P", "only, not sharding"),
        ("rollout", "import ml_collections", "ml_collections, which is for"),
        ("data", "import optax", "data imports optax"),
    ],
)
def test_what_is_forbidden_is_found(room, source, complaint):
    found = complaints(room, source)
    assert any(re.search(complaint, text) for text in found), found


def test_what_is_allowed_is_not_found():
    assert not complaints("step", "import jax\nfrom dmd_jax import sharding")
    assert not complaints(
        "losses", "from dmd_jax.losses.x import y\nfrom dmd_jax.schedule import z"
    )
