"""The pods' recipes, whole, as a program for a TPU slice and for GPUs, on a host that has neither.

Lowering proves shapes, kernels and collectives; it does not run the compiler of either.
"""

import re

import jax
import jax.numpy as jnp
import programs
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from dmd_jax.devices import sharding
from dmd_jax.devices.precision import use_float32_products
from dmd_jax.training.configuration import compute_dtypes
from dmd_jax.training.run import build

# 64 devices, each with a quarter of every sequence.
AXES = (1, 16, 4, 1)
KERNELS = {
    "tpu": ["tpu_custom_call"],
    "cuda": ["__cudnn$fmhaSoftmax(", "__cudnn$fmhaSoftmaxBackward("],
}
# Tokens of a video, whole and of one device, and as the kernel of a TPU pads them; of a block with
# the caches of Self-Forcing and of long tuning, and of a block alone.
LENGTHS = "(32760|32768|8190|23400|23552|4680)"


RECIPES = [
    ("dmd", "wan_t2v_1_3b"),
    pytest.param(("dmd", "wan_t2v_a14b"), marks=pytest.mark.slow),
    ("self_forcing", "wan_t2v_1_3b"),
    pytest.param(("self_forcing", "long"), marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=RECIPES, ids="-".join)
def run(request):
    name, variant = request.param
    return build(programs.load_config(f"configs/{name}.py", variant), files=False)


def lowered(run, platform, update_generator):
    """A step of the run in StableHLO, from shapes alone."""
    device = AbstractDevice("any", 1, platform)
    mesh = AbstractMesh(AXES, sharding.AXES, (AxisType.Auto,) * 4, abstract_device=device)
    condition = jax.ShapeDtypeStruct((run.config.batch_size, 512, 4096), jnp.bfloat16)
    # Without shardings: cuDNN's primitive cannot be lowered for a mesh without real devices.
    state, frozen = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (run.state_shape(), run.frozen_shape())
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    step = jax.jit(run.step, static_argnames="update_generator", donate_argnums=0)
    with jax.sharding.use_abstract_mesh(mesh):
        batch = {"cond": condition, "uncond": condition}
        traced = step.trace(state, frozen, batch, key, update_generator=update_generator)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("update_generator", [True, False], ids=["generator", "critic"])
@pytest.mark.parametrize("platform", KERNELS)
def test_a_step_uses_the_kernels_and_makes_no_square_of_its_length(
    run, platform, update_generator, monkeypatch
):
    cudnn = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"
    monkeypatch.setattr(cudnn, lambda: 91000)
    text = lowered(run, platform, update_generator)
    for kernel in KERNELS[platform]:
        assert f"custom_call @{kernel}" in text
    width = run.nets["generator"].net.config.dim
    assert "all_to_all" in text and f"tensor<64x32760x{width}xbf16>" in text
    assert not re.search(rf"tensor<(\d+x)*{LENGTHS}x(\d+x)*{LENGTHS}x", text)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_products_of_float32_networks_are_float32_on_every_device(platform, teacher, data_dir):
    run = build(programs.config(teacher, data_dir), jax.devices()[:1])
    state, frozen = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (run.state_shape(), run.frozen)
    )
    label = jax.ShapeDtypeStruct((8,), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def products():
        step = jax.jit(run.step, static_argnames="update_generator")
        batch = {"cond": label, "uncond": label}
        traced = step.trace(state, frozen, batch, key, update_generator=True)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        return [line for line in text.splitlines() if "stablehlo.dot_general" in line]

    exact = "precision = [HIGHEST, HIGHEST]"
    assert not [line for line in products() if exact in line]
    use_float32_products(*compute_dtypes(run.config))
    try:
        assert products() and [line for line in products() if exact not in line] == []
    finally:
        jax.config.update("jax_default_matmul_precision", None)
