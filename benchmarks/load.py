"""How fast, and in how much memory, a real-size Wan is loaded; the same by diffusers' own loader.

    pip install torch diffusers accelerate       (a CPU build will do)
    python benchmarks/load.py --folder=/tmp/wan_1_3b
    python benchmarks/load.py --folder=/tmp/wan_1_3b --forward

Where there is none, writes a random checkpoint with the names, shapes and layout of
Wan2.1-T2V-1.3B-Diffusers: two shards and their index, in bfloat16 (2.8 GB; the published one is in
float32), split where float32 shards of 5 GB are. Each load is a process of its own, all kinds in
turn; the files are in the page cache for all.

    copy        numpy.fromfile and astype: the bytes alone, in one thread
    ours        dmd_jax.weights.load
    sharded     the same, onto eight virtual devices: fsdp=8, by Wan's sharding rules
    diffusers   WanTransformer3DModel.from_pretrained

diffusers maps the files, and reads a weight when it is used. Therefore every loader is also timed
until one number of every page was read. User and system seconds are of all threads; of a machine
with other work, they say more than seconds. Most of the system's are pages of new memory.
Peaks are of resident memory, mapped pages of the files included. --forward compares one latent
frame of 60 x 104 with 512 text tokens (12 GB of memory). The folder is left for the next run.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import time
import zlib
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from absl import app, flags
from flax import nnx

from dmd_jax import weights
from dmd_jax.devices import sharding
from dmd_jax.models.wan import SHARDING_RULES, T2V_1_3B, Wan
from dmd_jax.weights import export, table, wan

FOLDER = flags.DEFINE_string("folder", None, "Of the checkpoint, written if absent.", required=True)
ROUNDS = flags.DEFINE_integer("rounds", 3, "Times that each loads.")
FORWARD = flags.DEFINE_bool("forward", False, "Compare one forward pass instead.")
CHILD = flags.DEFINE_string("child", None, "What a process started by this program does.")

PAGE = 4096
DTYPES = ("bfloat16", "float32")
COLUMNS = ("seconds", "and read", "user s", "system s", "GB before", "GB at the peak")


def write(folder):
    """The checkpoint: matrices keep variance, vectors spread."""
    net = jax.eval_shape(lambda: Wan(T2V_1_3B, rngs=nnx.Rngs(0)))
    net = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, ml_dtypes.bfloat16), net)
    rows = wan.table(T2V_1_3B, "diffusers")
    shapes = table.their_shapes(net, rows)

    def draw(name):
        shape = shapes[name]
        scale = 0.1 if len(shape) == 1 else np.prod(shape[1:]) ** -0.5
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        return np.float32(scale) * rng.standard_normal(shape, np.float32)

    export.SHARD //= 2  # half the bytes of float32: the same tensors in each
    export.diffusers(folder, table.fill(net, rows, draw), scheduler=export.many_step(shift=3.0))


# The loaders: (folder, dtype) -> what is loaded, and numpy's view of its parts.


def copy(folder, dtype):
    files = sorted(folder.glob("transformer/*.safetensors"))
    arrays = [np.fromfile(file, ml_dtypes.bfloat16).astype(dtype, copy=False) for file in files]
    return arrays, arrays


def ours(folder, dtype, shardings=None):
    net = jax.block_until_ready(weights.load(folder, dtype, shardings=shardings))
    shards = [shard for leaf in jax.tree.leaves(net) for shard in leaf.addressable_shards]
    return net, [np.asarray(shard.data) for shard in shards]


def sharded(folder, dtype):
    jax.config.update("jax_num_cpu_devices", 8)
    mesh = sharding.make_mesh(data=1, fsdp=8)
    abstract = weights.abstract_part(folder)
    return ours(folder, dtype, sharding.infer(abstract, SHARDING_RULES, mesh))


def diffusers(folder, dtype):
    torch, library = foreign()
    dtype = getattr(torch, dtype)
    net = library.WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=dtype)
    return net, [parameter.detach().view(torch.uint8).numpy() for parameter in net.parameters()]


def foreign():
    """The modules of the other side, in whose memory and time importing them is not counted."""
    import diffusers
    import torch

    diffusers.WanTransformer3DModel  # noqa: B018 (diffusers imports it when it is asked for)
    return torch, diffusers


LOADERS = {"copy": copy, "ours": ours, "sharded": sharded, "diffusers": diffusers}


def memory(kind):
    """GB of this process: "VmRSS" now, "VmHWM" at the peak."""
    return int(re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e6


def measure(folder, who, dtype):
    """The COLUMNS of one load, in this process."""
    if who == "diffusers":
        foreign()
    before, start, times = memory("VmRSS"), time.perf_counter(), os.times()
    _, parts = LOADERS[who](folder, dtype)
    loaded = time.perf_counter()
    for part in parts:
        part.reshape(-1)[:: PAGE // part.itemsize].max()
    read = time.perf_counter()
    user, system = (now - then for now, then in zip(os.times()[:2], times[:2], strict=True))
    return loaded - start, read - start, user, system, before, memory("VmHWM")


# One forward pass.


def inputs():
    """(latents [1, 1, 60, 104, 16], time, text [1, 512, 4096])."""
    rng = np.random.default_rng(1)
    x, text = rng.standard_normal((1, 1, 60, 104, 16)), rng.standard_normal((1, 512, 4096))
    return x.astype(np.float32), np.array([700.0], np.float32), text.astype(np.float32)


def forward(folder, who, dtype):
    """What the network predicts, [1, 1, 60, 104, 16] in float32."""
    x, t, text = inputs()
    if who == "ours":
        net = weights.denoiser(folder, dtype=dtype).net
        return np.asarray(jax.jit(lambda net, *given: net(*given))(net, x, t, text), np.float32)
    torch, _ = foreign()
    net, _ = diffusers(folder, dtype)
    x, text = (torch.tensor(value, dtype=getattr(torch, dtype)) for value in (x, text))
    with torch.no_grad():
        out = net(x.permute(0, 4, 1, 2, 3), torch.tensor(t), text, return_dict=False)[0]
    return out.permute(0, 2, 3, 4, 1).float().numpy()


def compare(folder):
    """Prints |a - b| / |b|, where b is diffusers in float32."""
    outputs = {(who, dtype): None for dtype in DTYPES[::-1] for who in ("diffusers", "ours")}
    for who, dtype in outputs:
        run(folder, "forward", who, dtype)
        outputs[who, dtype] = np.load(folder / f"{who}_{dtype}.npy").astype(np.float64)
    wanted = outputs.pop(("diffusers", "float32"))
    for (who, dtype), found in outputs.items():
        error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        print(f"{who}, {dtype}: relative error {error:.2e} of diffusers in float32")


# Processes.


def run(folder, *what):
    """The last line of a process of its own."""
    command = [sys.executable, __file__, f"--folder={folder}", f"--child={','.join(what)}"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip().rpartition("\n")[2]


def child(folder, kind, who, dtype):
    if kind == "load":
        print(json.dumps(measure(folder, who, dtype)))
    else:
        np.save(folder / f"{who}_{dtype}.npy", forward(folder, who, dtype))


def tabulate(folder):
    """Prints medians over the rounds."""
    size = sum(file.stat().st_size for file in folder.glob("transformer/*.safetensors")) / 1e9
    print(f"{size:.2f} GB in bfloat16; medians of {ROUNDS.value}\n")
    columns = ("loader", "dtype", *COLUMNS, "GB/s")
    print(f"| {' | '.join(columns)} |\n| --- | --- |{' ---: |' * (len(columns) - 2)}")
    for dtype in DTYPES:
        rounds = {who: [] for who in LOADERS}
        for _ in range(ROUNDS.value):
            for who, found in rounds.items():
                found.append(json.loads(run(folder, "load", who, dtype)))
        for who, found in rounds.items():
            row = [statistics.median(column) for column in zip(*found, strict=True)]
            cells = " | ".join(f"{cell:.2f}" for cell in (*row, size / row[1]))
            print(f"| {who} | {dtype} | {cells} |", flush=True)


def main(_):
    folder = Path(FOLDER.value)
    if CHILD.value:
        return child(folder, *CHILD.value.split(","))
    if not folder.exists():
        write(folder)
    compare(folder) if FORWARD.value else tabulate(folder)


if __name__ == "__main__":
    app.run(main)
