"""The precision of float32 matrix products."""

import jax
import pytest

from dmd_jax import embed, encode, evaluate, metric_network, sample
from dmd_jax.devices.precision import use_float32_products


@pytest.fixture(autouse=True)
def restored():
    yield
    jax.config.update("jax_default_matmul_precision", None)


@pytest.mark.parametrize(
    "dtypes, precision",
    [((), "float32"), (("float32", "bfloat16"), None), (("float32",), "float32")],
)
def test_products_are_float32_where_all_networks_are(dtypes, precision):
    use_float32_products(*dtypes)
    assert jax.config.jax_default_matmul_precision == precision


@pytest.mark.parametrize(
    "program, arguments, precision",
    [
        (sample, ["--checkpoint=nowhere"], "float32"),
        (sample, ["--checkpoint=nowhere", "--dtype=bfloat16"], None),
        (evaluate, ["--checkpoint=nowhere"], "float32"),
        (embed, ["--prompts=nowhere", "--checkpoint=a", "--out=b"], "float32"),
        (
            encode,
            ["--videos=nowhere", "--checkpoint=a", "--embeddings=b", "--out=c"],
            "float32",
        ),
        (metric_network, ["--out=nowhere/a.safetensors", "--data=none"], "float32"),
    ],
)
def test_every_command_that_computes_in_float32_sets_it(
    program, arguments, precision, call, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert str(call(program, *arguments)).startswith("error: ")  # refused, after the setting
    assert jax.config.jax_default_matmul_precision == precision
