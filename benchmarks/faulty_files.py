"""Good files of every kind that the programs read, and ways to spoil them; for faulty_inputs.py."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from dmd_jax import weights
from dmd_jax.data import embeddings, latents
from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.models.dit import DiT, DiTConfig
from dmd_jax.models.wan import Wan, WanConfig
from dmd_jax.training import loop
from dmd_jax.training.checkpoints import Checkpointer
from dmd_jax.training.run import build
from dmd_jax.weights import export

ROOT = Path(__file__).parents[1]
DIT = DiTConfig(image_size=28, channels=1, num_classes=10, patch=14, dim=16, depth=1, heads=2)
WAN = WanConfig(dim=96, ffn=32, heads=4, depth=2, in_channels=4, out_channels=4, text_dim=8)
VIDEO = (3, 4, 4, 4)
# What is typed in the place of a number, of several, of an entry of a config, of a flag.
NUMBERS = ("-1", "0", "1", "2", "3", "7", "-3", "1000000", "99999999999", "1" + 30 * "0")
REALS = (*NUMBERS, "-0.5", "0.5", "1.5", "1e30", "1e-30", "nan", "inf", "-inf")
TUPLES = (
    *("()", "(0,)", "(1,)", "(-1,)", "(0.5,)", "(1.0,0.5)", "(0.25,0.5,1.0)", "(1,1)", "(3,7)"),
    *("(1.0,0.75,0.5,-0.25)", "(1.0,1.0)", "(2.0,1.0)", "(1e400,1)", "(1.0,0.0)", "4", "0.5"),
    *("(1,2,4)", "(5,)", "(4,2,1,0)", "('a',)", "(None,)", "[4,2]", "((1,),)", "(1000000,)"),
    "(100000000,)",
)
VALUES = (
    *REALS,
    *TUPLES,
    *("2.5", "10**3", "1,5", "half", "", " ", "None", "none", "True", "yes", "(1.0,", "4,2,1"),
    *("{}", "AdamW", "DMD", "float16", "random", "nowhere", "..", "/", "/dev/null", "~"),
    *("mnist_teacher", "moving_digits_teacher", "teacher", "generator", "train", "test"),
    *("tset", "train[:10%]", "train[:0]", "cifar10000", "mnist", 300 * "x"),
)
FLAG_VALUES = (
    *VALUES,
    *("data=2", "data=0", "data", "fsdp=3", "data=2,data=2", "frames=3", "window=1"),
    *("window=x", "sink=-1", "a.jpg", "a", ".png", "a.png,b.gif", "4,2,", "4, 2", "euler"),
    *("v5p", "cpu:x", "cpu:0", "v5p:3x3", "1 2"),
)
# What stands in the place of a value of JSON.
JSON = (None, True, -1, 0, 1, 7, 2.5, 1e300, 10**30, "", "x", "1", [], [1], [[]], {}, {"a": 1})


def load_config(path="dmd.py"):
    """The config of a program in configs/ and, after the colon, its variant."""
    file, _, variant = path.partition(":")
    spec = importlib.util.spec_from_file_location("config_program", ROOT / "configs" / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant)


# Good files, which the mistakes are made in.


def network(make, seed):
    """A Denoiser of random weights."""
    shapes, rng = jax.eval_shape(lambda: make(nnx.Rngs(0))), np.random.default_rng(seed)
    return Denoiser(
        jax.tree.map(lambda x: (0.3 * rng.standard_normal(x.shape)).astype(x.dtype), shapes)
    )


def good_files(folder):
    """Writes one good file or folder of each kind."""
    dit = network(lambda rngs: DiT(DIT, rngs=rngs), 0)
    wan = network(lambda rngs: Wan(WAN, rngs=rngs), 1)
    weights.save(folder / "teacher.safetensors", dit)
    weights.save(folder / "student.safetensors", dit, times=(1.0, 0.5), shift=2.0, method="dmd")
    weights.save(folder / "video.safetensors", wan, times=(1.0, 0.5), shift=2.0, method="dmd")
    export.original(folder / "wan", wan.net)
    export.self_forcing(folder / "wan.pt", wan.net)
    rng = np.random.default_rng(2)

    def embed(texts):
        return [rng.standard_normal((3, 8)) for _ in texts]

    embeddings.write(folder / "embeddings", ["a", "b", "c"], "", embed, 4, 8, shard=2)
    videos = [(rng.standard_normal(VIDEO), row) for row in (0, 1, 2, 1)]
    latents.write(folder / "latents", videos, np.asarray, VIDEO, shard=3)
    (folder / "prompts.txt").write_text("a slow three\n120: a fast seven\n", encoding="utf-8")
    start_run(folder)


def trained_by(folder):
    """The flags of the run in `folder`/run."""
    teacher = folder.parent / "good" / "teacher.safetensors"
    values = {"teacher.weights": teacher, "batch_size": 8}
    flags = [f"--config.{name}={value}" for name, value in values.items()]
    return ["--config=configs/dmd.py", f"--workdir={folder}/run", *flags]


def start_run(folder):
    """Writes the folder of a run that was stopped after its first step."""
    config = load_config()
    config.batch_size, config.teacher.weights = 8, str(folder / "teacher.safetensors")
    run = build(config)
    with jax.set_mesh(run.mesh), Checkpointer(folder / "run") as checkpoints:
        state, _ = run.start()
        for step in (1, 2):
            checkpoints.save(step, state, {"window": {}, "monitor": {}})
        checkpoints.save_best(1, state.ema, 1.0)
    identity = json.dumps(loop._identity(run), indent=2, sort_keys=True)
    (folder / "run" / "config.json").write_text(identity)
    (folder / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n' * 2)
    (folder / "run" / "evaluation.json").write_text('{"every": 400}\n')
    (folder / "run" / "lock").write_text("1")


# Ways to spoil text, JSON and files. Each takes a random.Random.


def misspelt(rng, word):
    """A word with one letter missing, doubled, replaced or swapped."""
    at = rng.randrange(len(word))
    return rng.choice(
        (
            word[:at] + word[at + 1 :],
            word[: at + 1] + word[at:],
            word[:at] + rng.choice("aeionstr_") + word[at + 1 :],
            word[:at] + word[at : at + 2][::-1] + word[at + 2 :],
            word.upper(),
            word.replace("_", "") if "_" in word else word + "s",
        )
    )


def spoilt_json(rng, value):
    """A JSON value with one node deleted, renamed or replaced."""
    parents, stack = [], [value]
    while stack:
        node = stack.pop()
        children = node.values() if isinstance(node, dict) else node
        if isinstance(node, dict | list) and node:
            parents.append(node)
            stack += children
    parent = rng.choice(parents)
    key = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
    how = rng.randrange(4)
    if how == 0:
        del parent[key]
    elif how == 1 and isinstance(parent, dict):
        parent[misspelt(rng, key) if key else "x"] = parent.pop(key)
    else:
        parent[key] = rng.choice(JSON)
    return value


def spoil_json_file(rng, path):
    path.write_text(json.dumps(spoilt_json(rng, json.loads(path.read_text()))))


def spoil_header(rng, path):
    """One node of a safetensors file's header, or of our own header in it."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    ours = "dmd_jax" in header.get("__metadata__", {})
    if ours and rng.random() < 0.6:
        own = json.loads(header["__metadata__"]["dmd_jax"])
        header["__metadata__"]["dmd_jax"] = json.dumps(spoilt_json(rng, own))
    else:
        header = spoilt_json(rng, header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def spoil_tensors(rng, path):
    """A tensor of a safetensors file: its numbers, dtype, shape or name."""
    with path.open("rb") as file:
        text = file.read(int.from_bytes(file.read(8), "little"))
    metadata = json.loads(text).get("__metadata__")
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    how = rng.randrange(7)
    if how == 0:
        tensors[name] = np.full_like(tensor, rng.choice((np.nan, np.inf)))
    elif how == 1:
        tensor = tensor.copy()
        tensor.flat[rng.randrange(tensor.size)] = np.nan
        tensors[name] = tensor
    elif how == 2:
        kind = rng.choice((np.int32, np.uint8, np.bool_))
        tensors = {name: value.astype(kind) for name, value in tensors.items()}
    elif how == 3:
        tensors[name] = tensor.astype(rng.choice((np.int8, np.int64)))
    elif how == 4:
        tensors[name] = np.ascontiguousarray(tensor[..., :-1])
    elif how == 5:
        del tensors[name]
    else:
        tensors[misspelt(rng, name)] = tensors.pop(name)
    save_file(tensors, path, metadata)


def spoil_array(rng, path):
    """An .npy file: its dtype, shape or numbers."""
    array = np.load(path)
    how = rng.randrange(5)
    if how == 0:
        array = array.astype(rng.choice((np.float64, np.int64, np.uint8, np.complex64)))
    elif how == 1:
        array = array[:-1]
    elif how == 2:
        array = array[None]
    elif how == 3:
        array = array.copy()
        if array.dtype == np.uint16:
            array.flat[rng.randrange(array.size)] = 0x7FC0  # NaN of bfloat16
        else:
            array.flat[rng.randrange(array.size)] = rng.choice((-1, 9999))
    else:
        array = np.array([{"a": 1}], object)
    np.save(path, array)


def spoil_bytes(rng, path):
    """The bytes of any file: cut, emptied, overwritten, missing, a folder."""
    content = path.read_bytes()
    how = rng.randrange(8)
    if how == 0:
        path.unlink()
    elif how == 1:
        path.unlink()
        path.mkdir()
    elif how == 2:
        path.write_bytes(b"")
    elif how == 3:
        path.write_bytes(rng.randbytes(rng.choice((1, 7, 8, 9, 100, 5000))))
    elif how == 4:
        path.write_bytes("größer".encode("latin-1") + content[:20])
    elif how == 5:
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    elif how == 6:
        path.write_bytes(content + b"\0" * rng.choice((1, 100)))
    else:
        path.write_bytes(content[: rng.randrange(len(content) or 1)])


SPOILS = {
    ".json": (spoil_json_file, spoil_json_file, spoil_bytes),
    ".safetensors": (spoil_header, spoil_tensors, spoil_tensors, spoil_bytes),
    ".npy": (spoil_array, spoil_bytes),
}


def spoil(rng, path):
    """Spoils a file, or one file of a folder."""
    if path.is_dir():
        path = rng.choice(sorted(p for p in path.rglob("*") if p.is_file()))
    rng.choice(SPOILS.get(path.suffix, (spoil_bytes,)))(rng, path)
    return path.name
