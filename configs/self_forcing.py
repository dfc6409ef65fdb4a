"""Self-Forcing: distils a bidirectional teacher into a causal student that streams.

    python -m dmd_jax.main --config=configs/self_forcing.py                  bouncing digits
    python -m dmd_jax.main --config=configs/self_forcing.py:frame            frame by frame
    python -m dmd_jax.main --config=configs/self_forcing.py:teacher_forcing  for comparison
    python -m dmd_jax.main --config=configs/self_forcing.py:consistency      their start
    python -m dmd_jax.main --config=configs/self_forcing.py:wan_t2v_1_3b     Wan2.1: 14B to 1.3B
    python -m dmd_jax.main --config=configs/self_forcing.py:long             then on long videos

The first four train on a CPU, on videos of digits that leave each wall in a random direction.
`consistency` turns the causal network of configs/pretrain.py:bouncing_causal into a student of four
steps; Self-Forcing, the default, trains that student on its own videos in blocks of 3 frames,
`frame` in blocks of 1, and `teacher_forcing` after real blocks (CausVid). The report measures
quality by frame, up to four times the length of the teacher's videos: expect the digit asked for in
98% of all frames from the default. It takes 9.6 TFLOP, some minutes on two CPU cores.

`wan_t2v_1_3b` has the published numbers of Self-Forcing (Huang et al. 2025): 600 iterations of 64
videos of 21 latent frames, in blocks of 3. It needs some 64 accelerators of 80 GB or a TPU slice;
`--dry_run` prints the memory of each role. It has not been run. Give the causal start, a folder or
a file, as --config.generator.weights, and --config.data.embeddings, which `python -m dmd_jax.embed`
writes.

`long` is LongLive's second stage (Yang et al. 2025): the student of the first, trained with
`--config.method.video.causal.window=12 --config.method.video.causal.sink=3`, goes on with videos of
240 latent frames, whose prompts change once. As in LongLive, student and fake score train adapters
(LoRA) of rank 256, without an average. It has not been run.
"""

import dataclasses

import ml_collections

from dmd_jax.data import BouncingDigits, Prompts
from dmd_jax.methods.causal import CausVid, SelfForcing
from dmd_jax.methods.causal_consistency import CausalConsistency
from dmd_jax.methods.dmd import DMD
from dmd_jax.methods.long_tuning import LongTuning
from dmd_jax.models.attention import Causal
from dmd_jax.models.wan import T2V_1_3B, T2V_14B
from dmd_jax.models.wan_vae import WAN_2_1, WanVAEConfig
from dmd_jax.quality.evaluation import Evaluation
from dmd_jax.training.adapters import LoRA
from dmd_jax.training.checkpoints import Checkpoints
from dmd_jax.training.configuration import complete, unknown
from dmd_jax.training.health import Thresholds
from dmd_jax.training.optimizer import AdamW
from dmd_jax.training.roles import stated
from dmd_jax.training.step import EMA
from dmd_jax.training.writers import Log

# Of the digits. Six frames show the rhythm of a slow one, which moves in every fourth.
BLOCKS = dict(cls=Causal, frames_per_block=3, window=6)
SINGLE = dict(cls=Causal, frames_per_block=1, window=6)
SMALL = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


def get_config(arg=""):
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.accumulate = 1
    config.generator_every = 5
    config.reuse_rollout = True
    config.log = dict(cls=Log, every=25, tensorboard=True)
    config.health = dict(cls=Thresholds, saturation=1.0)  # latents are not bounded
    config.checkpoint = dict(cls=Checkpoints, every=100, keep=2)
    if arg not in VARIANTS:
        raise KeyError(unknown(f"variant configs/self_forcing.py:{arg}", arg, VARIANTS))
    VARIANTS[arg](config)
    return complete(config)


def _digits(config):
    """The default."""
    compute = dict(dtype="float32", remat="none", unroll=4)
    adamw = dict(cls=AdamW, learning_rate=2e-4, b1=0.0, b2=0.99)
    config.steps, config.batch_size = 600, 16
    # The student makes videos of 12 to 36 frames; the last 12 are compared: the teacher's length.
    config.data = dict(cls=BouncingDigits, frames=36)
    config.method = dict(
        cls=DMD,
        times=(1.0, 0.75, 0.5, 0.25),
        shift=5.0,
        score_shift=5.0,
        guidance=2.0,
        video=dict(cls=SelfForcing, causal=BLOCKS, compared=12, least_blocks=4),
    )
    config.teacher = dict(weights="bouncing_teacher", compute=compute)
    # With a constant rate, two runs in twelve moved too little: docs/self_forcing.md.
    falling = adamw | dict(decay="linear")
    config.generator = dict(weights="bouncing_start", compute=compute, optimizer=falling)
    config.fake_score = dict(weights="bouncing_small", compute=compute, optimizer=adamw)
    config.ema = dict(cls=EMA, decay=0.97, start=0)
    config.mesh = dict(data=-1, fsdp=1, context=1, tensor=1)
    config.evaluate = dict(
        cls=Evaluation,
        features="",
        every=200,
        samples=1,
        num=200,
        steps=(4,),
        teacher_steps=(25,),
        teacher_guidance=2.0,
        frames=48,
        beside=(("start", "bouncing_start"), ("teacher forcing", "bouncing_teacher_forcing")),
    )


def _frame(config):
    _digits(config)
    config.method.video.update(causal=SINGLE, least_blocks=12)


def _teacher_forcing(config):
    _digits(config)
    config.data.frames = 12  # real videos, of the teacher's length
    config.method.video = dict(cls=CausVid, teacher_forcing=True, causal=BLOCKS)
    config.evaluate.beside = (("start", "bouncing_start"),)


def _consistency(config):
    _digits(config)
    config.data.frames = 12
    config.method = dict(cls=CausalConsistency, causal=BLOCKS, steps=24, shift=5.0, guidance=2.0)
    del config.fake_score
    config.teacher.weights = config.generator.weights = "bouncing_causal"
    config.generator_every = 1
    config.steps = 800
    config.generator.optimizer.update(learning_rate=5e-4, warmup=100, clip=1.0)
    config.ema.decay = 0.99
    config.evaluate.beside = ()


def _wan_t2v_1_3b(config):
    adamw = dict(cls=AdamW, b1=0.0, b2=0.999, weight_decay=0.01, clip=10.0)
    config.data = dict(cls=Prompts, embeddings="embeddings", sample_shape=(21, 60, 104, 16))
    config.method = dict(
        cls=DMD,
        times=(1.0, 0.75, 0.5, 0.25),
        shift=5.0,
        score_shift=5.0,
        guidance=4.0,  # Self-Forcing's 3.0: docs/guidance.md
        batched_guidance=False,
        video=dict(cls=SelfForcing, causal=dict(cls=Causal, frames_per_block=3)),
    )
    config.teacher = stated(T2V_14B, "Wan-AI/Wan2.1-T2V-14B-Diffusers")
    config.generator = stated(T2V_1_3B, "causal_start", optimizer=adamw | dict(learning_rate=2e-6))
    config.fake_score = stated(T2V_1_3B, SMALL, optimizer=adamw | dict(learning_rate=4e-7))
    config.ema = dict(cls=EMA, decay=0.99, start=200)
    config.steps, config.batch_size = 600, 64
    config.mesh = dict(data=1, fsdp=-1, context=1, tensor=1)
    config.evaluate = dict(
        cls=Evaluation,
        features="",
        every=200,
        samples=1,
        num=1,
        steps=(4,),
        teacher_steps=(50,),
        teacher_guidance=5.0,
    )


def _long(config):
    _wan_t2v_1_3b(config)
    causal = dict(cls=Causal, frames_per_block=3, window=12, sink=3)
    config.method.video = dict(cls=LongTuning, causal=causal, image_latent=True)
    config.vae = dict(weights=SMALL, model=dict(cls=WanVAEConfig, **dataclasses.asdict(WAN_2_1)))
    config.generator.weights = "student"
    config.generator.adapter = dict(cls=LoRA, rank=256, alpha=256.0)
    config.fake_score.adapter = dict(cls=LoRA, rank=256, alpha=256.0)
    config.generator.optimizer.learning_rate = 1e-5
    config.fake_score.optimizer.learning_rate = 2e-6
    config.reuse_rollout = False
    config.steps = 3_000
    config.ema.update(decay=0.0, start=0)


VARIANTS = {
    "": _digits,
    "frame": _frame,
    "teacher_forcing": _teacher_forcing,
    "consistency": _consistency,
    "wan_t2v_1_3b": _wan_t2v_1_3b,
    "long": _long,
}
