r"""An ODE start for configs/self_forcing.py, to set beside its consistency start.

    python benchmarks/ode_start.py --out=runs/ode
    python -m dmd_jax.main --config=benchmarks/ode_start.py:runs/ode --workdir=runs/ode/start
    python -m dmd_jax.main --config=configs/self_forcing.py --workdir=runs/ode/student \
        --config.generator.weights=runs/ode/start/generator.safetensors \
        "--config.evaluate.beside=(('start','runs/ode/start/generator.safetensors'),)"

The first command writes captions and videos of bouncing digits, and the trajectories on which the
shipped causal teacher makes each block of them anew (`python -m dmd_jax.ode_pairs`; started again,
it goes on). The second trains a student of four steps on these, with the network, blocks, steps and
rates of `configs/self_forcing.py:consistency`. The third trains that student on its own videos, and
its report measures both. The numbers are in docs/causal_start.md and docs/self_forcing.md.
"""

import argparse
import runpy
import subprocess
import sys
from pathlib import Path

from dmd_jax.data import BouncingDigits, OdePairs, embeddings, latents, word_vectors
from dmd_jax.data.bouncing_digits import FRAMES, PROMPTS, SHAPE, TEXT_LENGTH
from dmd_jax.methods.causal_ode import CausalODE
from dmd_jax.training.configuration import complete

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def get_config(folder):
    config = runpy.run_path(str(CONFIGS / "self_forcing.py"))["get_config"]("consistency")
    causal, shift = config.method.causal, config.method.shift
    config.method = dict(cls=CausalODE, causal=causal, shift=shift)
    config.data = dict(
        cls=OdePairs,
        embeddings=f"{folder}/captions",
        latents=f"{folder}/trajectories",
        sample_shape=(FRAMES, *SHAPE),
    )
    with config.unlocked():
        del config.teacher
    config.evaluate.update(frames=0, teacher_steps=(), teacher_guidance=1.0)
    return complete(config)


def write_videos(folder, num):
    """Captions, and `num` videos of the training scans with the row of their captions."""
    source = BouncingDigits(frames=FRAMES, num=num)
    embeddings.write(
        folder / "captions",
        PROMPTS,
        "",
        word_vectors.embed,
        TEXT_LENGTH,
        word_vectors.DIM,
        source="bouncing digits",
    )
    latents.write(
        folder / "videos",
        ((source.examples([i])["data"][0], i % len(PROMPTS)) for i in range(num)),
        lambda video: video,
        (FRAMES, *SHAPE),
        source=["bouncing digits", num],
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--num", type=int, default=1_200, help="videos")
    parser.add_argument("--steps", type=int, default=24, help="of the teacher's solver")
    args = parser.parse_args()
    write_videos(args.out, args.num)
    settings = {
        "checkpoint": "bouncing_causal",
        "embeddings": args.out / "captions",
        "latents": args.out / "videos",
        "out": args.out / "trajectories",
        "steps": args.steps,
        "guidance": 2,
        "shift": 5,
        "frames_per_block": 3,
        "window": 6,
        "batch": min(40, args.num),
    }
    flags = [f"--{key}={value}" for key, value in settings.items()]
    sys.exit(subprocess.run([sys.executable, "-m", "dmd_jax.ode_pairs", *flags]).returncode)


if __name__ == "__main__":
    main()
