"""The rooms stand on floors, and a room imports only from its own floor or from those below."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dmd_jax"
FLOORS = (
    (
        *("paths", "randomness", "sharding", "optimizer", "checkpoint"),
        *("health", "writers", "metrics", "report", "data"),
    ),
    ("schedule", "models"),
    ("denoiser", "weights"),
    ("losses", "rollout", "features", "judge"),
    ("methods", "step"),
    ("configuration", "sample", "evaluate", "train", "metric_network"),
    ("main",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def room(path):
    """The room that a file belongs to: the first name below the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    """Full names of all that a file imports, functions' own imports included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_of(path):
    names = (name.split(".") for name in imported(path))
    return {parts[1] for parts in names if parts[0] == "dmd_jax" and len(parts) > 1}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_only_downwards(path):
    assert room(path) in FLOOR, f"{room(path)} is new: give it a floor in tests/test_floors.py"
    high = {name for name in rooms_of(path) if FLOOR[name] > FLOOR[room(path)]}
    assert not high, f"{path.name} is on floor {FLOOR[room(path)]} and imports {high} from above"


@pytest.mark.parametrize("path", sorted((PACKAGE / "losses").glob("*.py")), ids=lambda p: p.name)
def test_losses_import_jax_and_the_two_rooms_below(path):
    outside = {name.split(".")[0] for name in imported(path)} - {"jax", "dmd_jax"}
    assert not outside
    assert rooms_of(path) <= {"losses", "schedule", "denoiser"}


def test_configs_are_seen_by_programs_alone():
    seen = {room(p) for p in FILES if any(n.startswith("ml_collections") for n in imported(p))}
    assert all(FLOOR[name] >= FLOOR["configuration"] for name in seen)


def test_there_is_no_room_for_everything():
    assert not {p.stem for p in FILES} & {"utils", "util", "common", "helpers", "misc"}
