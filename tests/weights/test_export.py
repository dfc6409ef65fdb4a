"""Students go out as they are, bit for bit, to what diffusers and torch themselves load."""

import json

import checkpoints
import foreign
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import toys
from checkpoints import CONFIG

from dmd_jax import export, weights
from dmd_jax.diffusion.denoiser import Denoiser, Velocity
from dmd_jax.diffusion.schedule import shift_time
from dmd_jax.models.wan import Wan
from dmd_jax.weights import export as formats
from dmd_jax.weights import files

DTYPES = (np.float32, ml_dtypes.bfloat16)
TIMES, SHIFT = [1.0, 0.75, 0.5, 0.25], 5.0


def wan(dtype=np.float32, config=CONFIG):
    """A Wan of random weights."""
    net = toys.weights(lambda rngs: Wan(config, rngs=rngs), 0)
    return jax.tree.map(lambda x: x.astype(dtype), net)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """The file of a student."""
    path = tmp_path_factory.mktemp("student") / "student.safetensors"
    denoiser = Denoiser(wan(), prediction=Velocity(time_scale=1000))
    weights.save(path, denoiser, times=TIMES, shift=SHIFT)
    return path


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("to", export.TARGETS)
def test_what_goes_out_comes_in_again(tmp_path, to, dtype, monkeypatch):
    monkeypatch.setattr(formats, "SHARD", 400_000)
    net, path = wan(dtype), tmp_path / "a.pt"
    more = {"scheduler": formats.many_step(SHIFT)} if to == "diffusers" else {}
    getattr(formats, to)(path, net, **more)
    toys.assert_same(weights.load(path), net)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]
    shards = list(path.rglob("*.safetensors"))
    assert to == "self_forcing" or len(shards) > 3
    largest = 4 * CONFIG.dim * 6 * CONFIG.dim  # of all tensors: the modulation's
    assert all(shard.stat().st_size < max(400_000, largest) + 20_000 for shard in shards)


def run_diffusers(module, x, t, text):
    """[B, F, H, W, C] of their network."""
    import torch

    with torch.no_grad():
        out = module(
            torch.tensor(x).permute(0, 4, 1, 2, 3),
            torch.tensor(t),
            torch.tensor(text),
            return_dict=False,
        )
    return out[0].permute(0, 2, 3, 4, 1).numpy()


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_diffusers_loads_the_pipeline(tmp_path, student, dtype, monkeypatch):
    import torch

    diffusers = pytest.importorskip("diffusers")
    monkeypatch.setattr(formats, "SHARD", 500_000)
    output = export.write(student, "diffusers", tmp_path / "out", dtype=dtype)
    assert str(TIMES) in output
    pipeline = diffusers.WanPipeline.from_pretrained(
        tmp_path / "out",
        torch_dtype=getattr(torch, dtype),
        **dict.fromkeys(("vae", "text_encoder", "tokenizer")),
    )
    net = weights.load(student, dtype)
    stored = {
        name: tensor.float().numpy() for name, tensor in pipeline.transformer.state_dict().items()
    }
    checkpoints.assert_same(stored, checkpoints.held_by(wide(net), "diffusers"))

    x, t = foreign.tensor("x", (1, 2, 4, 6, 4)), np.array([700.0], np.float32)
    text = foreign.tensor("text", (1, 5, CONFIG.text_dim))
    wanted = run_diffusers(pipeline.transformer.float(), x, t, text)
    assert foreign.relative_error(wide(net)(x, t, text), wanted) < 2e-5

    scheduler = pipeline.scheduler
    assert isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler)
    scheduler.set_timesteps(sigmas=TIMES)
    np.testing.assert_allclose(scheduler.timesteps, [1000 * shift_time(t, SHIFT) for t in TIMES])
    assert scheduler.config.stochastic_sampling


def wide(net):
    return jax.tree.map(lambda x: x.astype(jnp.float32), net)


@pytest.mark.parametrize("notes, fresh", [({}, True), ({"phases": (2, 2)}, False)])
def test_a_student_in_phases_takes_euler_steps_and_others_fresh_noise(tmp_path, notes, fresh):
    weights.save(tmp_path / "s.safetensors", Denoiser(wan()), times=TIMES, shift=SHIFT, **notes)
    export.write(tmp_path / "s.safetensors", "diffusers", tmp_path / "out")
    settings = (tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text()
    assert json.loads(settings)["stochastic_sampling"] is fresh


@pytest.mark.torch
def test_a_teachers_scheduler_is_unipc_with_its_shift(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    folder = checkpoints.write_folder(tmp_path / "teacher")
    assert export.write(folder, "diffusers", tmp_path / "out", shift=3.0) == ""
    scheduler = diffusers.UniPCMultistepScheduler.from_pretrained(tmp_path / "out" / "scheduler")
    scheduler.set_timesteps(4)
    wanted = [int(1000 * shift_time(t, 3.0)) for t in TIMES]
    np.testing.assert_allclose(scheduler.timesteps, wanted, atol=2)


def test_the_other_parts_come_from_a_base(tmp_path, student):
    base = tmp_path / "base"
    for part in ("vae", "tokenizer", "transformer", "transformer_2"):
        (base / part).mkdir(parents=True)
        (base / part / "x").write_text(part)
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": "0.35.0",
        "boundary_ratio": 0.9,
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"],
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (base / "model_index.json").write_text(json.dumps(index))
    export.write(student, "diffusers", tmp_path / "out", base=base)
    result = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert result["vae"] == index["vae"] and result["tokenizer"] == index["tokenizer"]
    assert result["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    assert result["transformer_2"] == [None, None] and result["boundary_ratio"] is None
    assert (tmp_path / "out" / "vae" / "x").read_text() == "vae"
    assert not (tmp_path / "out" / "transformer" / "x").exists()
    assert not (tmp_path / "out" / "transformer_2").exists()


@pytest.mark.torch
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_torch_reads_the_file_for_self_forcing(tmp_path, student, dtype):
    import torch

    export.write(student, "self_forcing", tmp_path / "a.pt", dtype=dtype)
    [(key, stored)] = torch.load(tmp_path / "a.pt", weights_only=True).items()
    assert key == "generator_ema" and all(name.startswith("model.") for name in stored)
    wanted = checkpoints.held_by(weights.load(student, dtype), "original")
    assert {str(tensor.dtype) for tensor in stored.values()} == {f"torch.{dtype or 'float32'}"}
    found = {name.removeprefix("model."): x.float().numpy() for name, x in stored.items()}
    checkpoints.assert_same(found, {name: x.astype(np.float32) for name, x in wanted.items()})


@pytest.mark.torch
def test_diffusers_loads_the_original_layout(tmp_path, student):
    single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
    from safetensors.torch import load_file

    export.write(student, "original", tmp_path / "out")
    stored = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    converted = single_file.convert_wan_transformer_to_diffusers(stored)
    checkpoints.assert_same(
        {name: tensor.numpy() for name, tensor in converted.items()},
        checkpoints.held_by(weights.load(student), "diffusers"),
    )


@pytest.mark.parametrize("to", export.TARGETS)
def test_a_full_disk_loses_nothing(tmp_path, student, to, monkeypatch):
    out = tmp_path / "out.pt"
    if to == "self_forcing":
        out.write_text("what was there")

    def full(*_):
        raise OSError(28, "No space left on device")
        yield

    monkeypatch.setattr(formats, "theirs", full)
    with pytest.raises(OSError, match="No space left"):
        export.write(student, to, out)
    left = [path.name for path in tmp_path.iterdir()]
    assert left == (["out.pt"] if to == "self_forcing" else [])
    assert to != "self_forcing" or out.read_text() == "what was there"


def test_what_is_refused_is_refused_before_the_network_is_read(
    tmp_path, student, teacher, monkeypatch
):
    monkeypatch.setattr(weights, "denoiser", None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ValueError, match="is there and holds files: choose another"):
        export.write(student, "original", tmp_path / "out")
    with pytest.raises(ValueError, match="holds a DiT: only a Wan can be exported"):
        export.write(teacher, "original", tmp_path / "new")
    with pytest.raises(ValueError, match="is no folder of a diffusers pipeline"):
        export.write(student, "diffusers", tmp_path / "new", base=tmp_path)
    with pytest.raises(ValueError, match="is for --to=diffusers"):
        export.write(student, "original", tmp_path / "new", base=tmp_path)
    with pytest.raises(ValueError, match="is a file: name a folder"):
        export.write(student, "original", student)
    (tmp_path / "a.pt").mkdir()
    with pytest.raises(ValueError, match="is a folder: name a file"):
        export.write(student, "self_forcing", tmp_path / "a.pt")
    with pytest.raises(ValueError, match="must end in"):
        export.write(student, "self_forcing", tmp_path / "a.bin")
    index = {"vae": ["diffusers", "AutoencoderKLWan"], "image_encoder": [None, None]}
    (tmp_path / "out" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="lacks vae: finish the download"):
        export.write(student, "diffusers", tmp_path / "new", base=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"a.pt", "out"}


def test_arrays_in_another_order_are_not_written(tmp_path):
    plan = {"a": ((2,), np.dtype("float32")), "b": ((2,), np.dtype("float32"))}
    arrays = ((name, np.zeros(2, np.float32)) for name in "ba")
    with pytest.raises(ValueError, match=r"b \(2,\) float32 in the place of a"):
        files.write_safetensors(tmp_path / "a", plan, arrays)


def test_the_program_says_what_it_wrote(tmp_path, student, command_line, capsys):
    command_line(f"--checkpoint={student}", "--to=original", f"--out={tmp_path / 'out'}")
    export.define_flags()
    export.FLAGS(
        ["program", f"--checkpoint={student}", "--to=original", f"--out={tmp_path / 'out'}"]
    )
    export.main([])
    assert f"for original: {tmp_path / 'out'}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"error: .*holds files"):
        export.main([])
