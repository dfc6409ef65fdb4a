"""Our own files: what is written comes back bit for bit, and what is not ours is refused."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
import toys
from safetensors.numpy import load_file, save_file

from dmd_jax import weights
from dmd_jax.diffusion.denoiser import X0, Denoiser, EDMPreconditioned, Epsilon
from dmd_jax.diffusion.schedule import EDM, VP
from dmd_jax.models.dit import SHARDING_RULES, DiTConfig
from dmd_jax.weights import ours


def header(path):
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(json.loads(file.read(size))["__metadata__"][ours.HEADER])


def rewritten(path, out, *, change=lambda tensors, header: None):
    """A copy of a file whose tensors and header `change` has edited in place."""
    tensors, head = load_file(path), header(path)
    change(tensors, head)
    save_file(tensors, out, {ours.HEADER: json.dumps(head)})
    return out


@pytest.mark.parametrize(
    "schedule, prediction",
    [(EDM(), EDMPreconditioned(0.7)), (VP(), Epsilon(time_scale=1.0)), (VP(), X0())],
)
def test_round_trip_keeps_every_bit_and_what_the_network_means(tmp_path, schedule, prediction):
    denoiser = Denoiser(programs.tiny().net, schedule, prediction)
    weights.save(tmp_path / "a.safetensors", denoiser, times=(1.0, 0.5), method="dmd")
    again = weights.denoiser(tmp_path / "a.safetensors")
    toys.assert_same(again, denoiser)
    assert (again.schedule, again.prediction) == (schedule, prediction)
    assert again.net.config == denoiser.net.config
    assert weights.notes(tmp_path / "a.safetensors") == {"times": [1.0, 0.5], "method": "dmd"}


def test_a_file_is_the_same_bytes_each_time(tmp_path):
    for name in "ab":
        weights.save(tmp_path / name, programs.tiny())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_header_alone_gives_the_shapes(teacher):
    abstract = weights.abstract(teacher)
    leaves = jax.tree.leaves(abstract)
    assert leaves and all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert weights.shapes(abstract) == weights.shapes(programs.tiny())


def test_overrides_say_how_a_network_runs(teacher):
    loaded = weights.denoiser(teacher, dtype="bfloat16", remat="full", unroll=2)
    config = loaded.net.config
    assert (config.dtype, config.remat, config.unroll) == ("bfloat16", "full", 2)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype("float32")}


def test_a_network_with_spans_starts_as_the_one_without_them_in_its_file(teacher, tmp_path):
    plain, grown = weights.denoiser(teacher), weights.denoiser(teacher, spans=True)
    assert weights.shapes(grown) == weights.shapes(weights.abstract(teacher, spans=True))
    assert weights.shapes(grown).keys() - weights.shapes(plain).keys() == {
        "net/span/bias",
        "net/span/kernel",
    }
    x, t, label = toys.normal(0, 2, 28, 28, 1), jnp.array([900.0, 300.0]), jnp.array([1, 2])
    call = jax.jit(lambda net, **span: net(x, t, label, **span))
    wanted = call(plain.net)
    for span in ({}, {"span": 0.5 * t}):
        np.testing.assert_allclose(call(grown.net, **span), wanted, rtol=1e-5, atol=1e-6)
    weights.save(tmp_path / "grown.safetensors", grown)
    toys.assert_same(weights.denoiser(tmp_path / "grown.safetensors"), grown)


def test_an_override_that_no_network_has_is_not_the_fault_of_the_file(teacher):
    with pytest.raises(ValueError, match="dtyp cannot be set, because DiTConfig has no such field"):
        weights.abstract(teacher, dtyp="bfloat16")


def test_an_override_of_a_wrong_value_is_refused_with_what_is_allowed(teacher):
    with pytest.raises(ValueError, match="remat='sometimes': use 'none', 'full'"):
        weights.abstract(teacher, remat="sometimes")
    with pytest.raises(ValueError, match="float33"):
        weights.abstract(teacher, dtype="float33")


def test_a_shipped_file_is_found_by_its_name():
    assert weights.find("mnist_teacher") == ours.ASSETS / "mnist_teacher.safetensors"


def test_no_file_is_an_error_that_names_what_is_shipped(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*shipped are \[.*mnist_metric"):
        weights.denoiser(tmp_path / "nowhere")


def test_the_network_of_a_run_that_was_stopped_is_an_error_that_says_so(tmp_path):
    (tmp_path / "checkpoints" / "590").mkdir(parents=True)
    (tmp_path / "config.json").touch()
    with pytest.raises(FileNotFoundError, match="writes its networks at its end"):
        weights.denoiser(tmp_path / "generator.safetensors")


def test_every_differing_path_is_named_with_both_shapes(teacher, tmp_path):
    def change(tensors, head):
        tensors["label/embedding"] = np.zeros((3, 16), np.float32)
        del tensors["head/bias"]
        tensors["tail"] = np.zeros((2, 2), np.float32)

    path = rewritten(teacher, tmp_path / "other", change=change)
    with pytest.raises(ValueError) as error:
        weights.denoiser(path)
    assert str(error.value).splitlines()[1:] == [
        "  head/bias: expected (196,), found nothing",
        "  label/embedding: expected (11, 16), found (3, 16)",
        "  tail: expected nothing, found (2, 2)",
    ]


@pytest.mark.parametrize("size", [0, 5, 300, -40])
def test_a_damaged_file_is_refused_before_a_weight_is_read(teacher, tmp_path, size):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(teacher.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"cut\.safetensors is damaged or not safetensors"):
        weights.abstract(path)


def test_a_file_of_another_program_is_told_apart_from_damage(tmp_path):
    save_file({"unet.conv.weight": np.zeros(3, np.float32)}, tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"none that dmd_jax wrote.*\(it holds unet\.conv"):
        weights.denoiser(tmp_path / "theirs")


@pytest.mark.parametrize(
    "key, value",
    [
        *(("family", "unet"), ("schedule", {"name": "cosine"}), ("model", {"width": 3})),
        *(("schedule", {"name": "edm", "rho": "seven"}), ("model", 3), ("notes", None)),
        *(("notes", {"times": [1.0, "half"]}), ("notes", {"shift": []}), ("boundaries", 0.5)),
        ("notes", {"causal": {"frames_per_block": 3, "of_a_later_version": 1}}),
    ],
)
def test_what_no_header_of_ours_holds_is_refused(teacher, tmp_path, key, value):
    path = rewritten(teacher, tmp_path / "new", change=lambda _, head: head.update({key: value}))
    with pytest.raises(ValueError, match="its header is not of this version of dmd_jax"):
        weights.denoiser(path)


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_with_the_tensor_s_name(teacher, tmp_path, number):
    def spoil(tensors, _):
        tensors["head/kernel"][3, 2] = number

    path = rewritten(teacher, tmp_path / "new", change=spoil)
    with pytest.raises(ValueError, match=r"new: head/kernel has numbers that are infinite or"):
        weights.denoiser(path)


def test_a_network_without_a_family_cannot_be_saved(tmp_path):
    class Net:
        config = "a config of nobody"

    with pytest.raises(ValueError, match="has no name in"):
        weights.save(tmp_path / "x", Denoiser(Net()))
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    path = programs.save_tiny(tmp_path / "a.safetensors")
    before = path.read_bytes()

    def fail(tensors, partial, metadata):
        partial.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(ours, "save_file", fail)
    with pytest.raises(OSError, match="no space"):
        programs.save_tiny(path, seed=1)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_weights_spread_over_devices_are_written_whole(tmp_path):
    denoiser = programs.tiny()
    mesh = jax.make_mesh((8,), ("fsdp",))
    spread = jax.device_put(denoiser, jax.sharding.NamedSharding(mesh, jax.P()))
    weights.save(tmp_path / "a", spread)
    toys.assert_same(weights.denoiser(tmp_path / "a"), denoiser)


def test_a_fresh_network_depends_on_its_seed_alone():
    one, again, other = (weights.build(programs.TINY, seed=seed) for seed in (1, 1, 2))
    toys.assert_same(one, again)
    assert not np.array_equal(one.label.embedding[...], other.label.embedding[...])
    assert weights.sharding_rules(one) == SHARDING_RULES


def test_a_file_written_before_the_library_had_rooms_still_loads():
    """Weight number i, in the order of their paths, counts from i in eighths."""
    path = Path(__file__).with_name("student_before_rooms.safetensors")
    loaded = weights.denoiser(path)
    config = DiTConfig(image_size=4, channels=1, num_classes=2, patch=2, dim=8, depth=1, heads=2)
    assert loaded.net.config == config
    assert (loaded.schedule, loaded.prediction) == (EDM(), EDMPreconditioned(sigma_data=0.7))
    notes = {"times": [1.0, 0.5], "shift": 2.0, "method": "dmd", "step": 3}
    assert weights.notes(path) == notes
    assert weights.shapes(loaded.net) == weights.shapes(weights.build(config))
    for i, weight in enumerate(jax.tree.leaves(loaded)):
        wanted = np.arange(weight.size).reshape(weight.shape) / 8 + i
        np.testing.assert_array_equal(weight, wanted.astype(np.float32))
