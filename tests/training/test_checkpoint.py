"""One checkpoint: names, dtypes, meshes, and a tree that is not the expected one."""

import logging
import os

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from states import (
    ABSTRACT,
    assert_same,
    flip_a_bit,
    in_child,
    new_state,
    save_steps,
    values_file,
)

from dmd_jax.devices.paths import named_leaves
from dmd_jax.training.checkpoint import DamagedCheckpoint, MismatchedCheckpoint, read
from dmd_jax.training.checkpoints import Checkpointer


def test_arrays_of_every_width_come_back(tmp_path):
    tree = {
        "bf16": jnp.linspace(-3, 3, 7, dtype=jnp.bfloat16),
        "bool": jnp.array([True, False]),
        "int8": jnp.arange(5, dtype=jnp.int8),
        "scalar": jnp.float32(2),
    }
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, tree)
        checkpointer.wait()
        assert_same(checkpointer.restore_latest(tree)[0], tree)


def test_names_are_readable_paths_without_flax_internals():
    names = named_leaves(new_state())
    assert "nets/generator/inner/kernel" in names
    assert not [name for name in names if name.endswith("/value")]
    assert len(names) == len(jax.tree.leaves(ABSTRACT))


def test_two_leaves_of_one_name_are_refused():
    with pytest.raises(ValueError, match="a/b"):
        named_leaves({"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)})


@pytest.mark.parametrize("leaf", [3, np.ones(2), jnp.ones((0, 3))])
def test_what_cannot_be_stored_is_refused_by_its_path(tmp_path, leaf):
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(ValueError, match="nets/odd: "):
        checkpointer.save(1, {"nets": {"odd": leaf}})


def test_read_looks_at_one_checkpoint_and_changes_nothing(tmp_path):
    save_steps(tmp_path, (1, 2))
    path = tmp_path / "checkpoints" / "1"
    state, extra = read(path, ABSTRACT)
    assert_same(state, new_state(1))
    assert extra == {"note": "at 1"}
    flip_a_bit(values_file(path))
    with pytest.raises(DamagedCheckpoint):
        read(path, ABSTRACT)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2"]
    with pytest.raises(ValueError, match="no checkpoint here"):
        read(tmp_path / "checkpoints" / "7", ABSTRACT)


def test_another_state_is_an_error_with_every_path_and_both_shapes_not_a_fallback(tmp_path):
    save_steps(tmp_path, (1, 2))
    other = jax.eval_shape(lambda: new_state(width=8))
    other.nets["third"] = other.nets.pop("critic")
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(MismatchedCheckpoint) as raised:
        checkpointer.restore_latest(other)
    lines = str(raised.value)
    for expected in (
        "nets/generator/inner/kernel: float32[3, 512] in the checkpoint, float32[3, 8] here",
        "nets/critic/outer/bias: float32[2] in the checkpoint, absent here",
        "nets/third/outer/bias: absent in the checkpoint, float32[2] here",
    ):
        assert expected in lines
    assert "nets/generator/outer/bias" not in lines  # the ones that agree stay out of it
    assert (tmp_path / "checkpoints" / "2").is_dir()


def test_a_dtype_is_never_cast_in_silence(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"x": jnp.ones(3)})
        checkpointer.wait()
        with pytest.raises(MismatchedCheckpoint, match=r"x: float32\[3\] .* bfloat16\[3\]"):
            checkpointer.restore_latest({"x": jnp.ones(3, jnp.bfloat16)})


def test_saved_on_eight_devices_restored_on_another_mesh_and_on_one(tmp_path):
    program = """
        import sys
        import jax, jax.numpy as jnp
        from jax.sharding import AxisType, NamedSharding
        from dmd_jax.training.checkpoints import Checkpointer
        def tree(shape, names, spec):
            mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))
            x = jax.device_put(jnp.arange(64.0).reshape(8, 8), NamedSharding(mesh, spec))
            return {"x": x, "count": jax.device_put(jnp.int32(5), NamedSharding(mesh, jax.P()))}
        assert jax.device_count() == 8
        saved = tree((8,), ("fsdp",), jax.P("fsdp"))
        with Checkpointer(sys.argv[1]) as checkpointer:
            checkpointer.save(1, saved)
            checkpointer.wait()
            other = tree((2, 4), ("data", "fsdp"), jax.P(None, "fsdp"))
            restored, _, _ = checkpointer.restore_latest(other)
        assert restored["x"].sharding == other["x"].sharding
        assert (restored["x"] == saved["x"]).all()
    """
    child = in_child(program, tmp_path, devices=8)
    assert child.returncode == 0, child.stderr
    abstract = {
        "x": jax.ShapeDtypeStruct((8, 8), jnp.float32),
        "count": jax.ShapeDtypeStruct((), jnp.int32),
    }
    with Checkpointer(tmp_path) as checkpointer:
        tree, _, _ = checkpointer.restore_latest(abstract)
    assert len(tree["x"].sharding.device_set) == 1
    assert_same(tree, {"x": np.arange(64, dtype=np.float32).reshape(8, 8), "count": np.int32(5)})


def test_what_orbax_abandons_is_not_told_by_asyncio_either(tmp_path, caplog):
    with Checkpointer(tmp_path):
        pass
    abandoned = own = None
    try:
        ocp.StandardCheckpointHandler().restore(tmp_path / "nothing")
    except Exception as error:  # whatever type Orbax chooses
        abandoned = error
    try:
        raise RuntimeError("mine")
    except RuntimeError as error:
        own = error
    for error in (abandoned, own):
        logging.getLogger("asyncio").error("Task exception was never retrieved", exc_info=error)
    assert [record.exc_info[1] for record in caplog.records if record.exc_info] == [own]
