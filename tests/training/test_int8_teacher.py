"""Runs whose teacher is kept in eight bits: less memory, nothing else is changed."""

import re

import jax
import programs
import pytest

from dmd_jax.training import loop
from dmd_jax.training.description import describe
from dmd_jax.training.plan import _inputs, kept
from dmd_jax.training.run import build

SIZE = dict(dim=32, depth=3, heads=2)  # of the teacher: no other network has such kernels
KERNELS = {(32, 96), (32, 32), (96, 32)}


@pytest.fixture(scope="module")
def resolve(teacher, data_dir, tmp_path_factory):
    """A tiny run, on two devices, whose teacher has other sizes than the trained networks."""
    path = programs.save_tiny(tmp_path_factory.mktemp("large") / "teacher.safetensors", **SIZE)

    def call(**overrides):
        students = {f"{role}.weights": str(teacher) for role in ("generator", "fake_score")}
        settings = {"mesh.data": 1, "mesh.fsdp": 2, "teacher.compute.unroll": 1}
        values = students | settings | {"teacher.compute.remat": "full"} | overrides
        return build(programs.config(path, data_dir, **values), jax.devices()[:2])

    return call


INT8 = {"teacher.compute.weights_dtype": "int8"}
# One call of the generator, without a critic's step of its own: the program is compiled sooner.
ONE_STEP = {"method.times": (1.0,), "method.strides": (1,), "method.last_step_share": 0.0}


def whole_kernels(program):
    """Floating-point arrays of a program that are all layers of a kernel, or a device's part."""
    found = re.findall(r"\b(?:f32|bf16|f16)\[3,(\d+),(\d+)\]", program.as_text())
    parts = {(i // n, o // m) for i, o in KERNELS for n, m in ((1, 1), (2, 1), (1, 2))}
    return {(int(i), int(o)) for i, o in found} & parts


def test_a_step_never_holds_all_layers_as_floats(resolve):
    run = resolve(**INT8, **ONE_STEP)
    assert not whole_kernels(loop.lower(run, *_inputs(run), True).compile())


def test_the_same_layers_of_a_plain_teacher_are_found(resolve):
    """So that the test above could fail."""
    run = resolve()
    teacher, x = run.frozen_shape()["teacher"], jax.ShapeDtypeStruct((8, 28, 28, 1), "float32")
    label, t = jax.ShapeDtypeStruct((8,), "int32"), jax.ShapeDtypeStruct((8,), "float32")
    with jax.set_mesh(run.mesh):
        program = jax.jit(lambda net, *x: net(*x)).lower(teacher, x, t, label).compile()
    assert len(whole_kernels(program)) == 3


def test_a_run_keeps_what_is_planned_and_described(resolve):
    run, plain = resolve(**INT8), resolve()
    arrays = jax.tree.leaves(run.load_frozen()["teacher"])
    wanted = jax.tree.leaves(run.frozen_shape()["teacher"])
    assert [(x.shape, x.dtype, x.sharding) for x in arrays] == [
        (x.shape, x.dtype, x.sharding) for x in wanted
    ]
    held = sum(x.addressable_shards[0].data.nbytes for x in arrays)
    assert kept(run)["teacher"] == held < kept(plain)["teacher"]
    size = sum(x.nbytes for x in arrays) / 2**20
    count = sum(x.size for x in jax.tree.leaves(plain.frozen["teacher"]))
    assert f"teacher     {count:>14,}      int8{size:>10.1f} MiB" in describe(run)


def test_a_trained_network_in_int8_is_refused(resolve):
    for role in ("generator", "fake_score"):
        with pytest.raises(ValueError, match=f"but the {role} is trained, and eight bits lose"):
            resolve(**{f"{role}.compute.weights_dtype": "int8"})
    with pytest.raises(ValueError, match="weights_dtype='int4': use 'int8', or None"):
        resolve(**{"teacher.compute.weights_dtype": "int4"})
