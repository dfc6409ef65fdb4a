"""Trains the shipped teacher: a class-conditional flow-matching DiT on 4,000 MNIST digits.

On two CPU cores this takes about half an hour; dmd_jax/assets/mnist_teacher.md has its quality:

    python -m dmd_jax.main --config=configs/pretrain.py

It also trains on square images of any data set in the TFDS catalogue: --config.data.name=cifar10,
with --config.generator.model.patch=4 and a wider model for its richer images. The shipped metric
is for digits only. Train one with `python -m dmd_jax.metric_network --data=cifar10` and give its
file as --config.evaluate.features, or give '' for a run that is not judged.

The two networks of `configs/dmd.py:wan_tiny`, on videos of moving digits with their captions, take
about as long; their quality is in dmd_jax/assets/moving_digits_teacher.md and ..._small.md:

    python -m dmd_jax.main --config=configs/pretrain.py:wan_teacher
    python -m dmd_jax.main --config=configs/pretrain.py:wan_small

Those of `configs/self_forcing.py`, on videos of bouncing digits, are a bidirectional teacher, a
smaller network from which the fake score starts, and that network made causal by teacher forcing:

    python -m dmd_jax.main --config=configs/pretrain.py:bouncing_teacher
    python -m dmd_jax.main --config=configs/pretrain.py:bouncing_small
    python -m dmd_jax.main --config=configs/pretrain.py:bouncing_causal
"""

import ml_collections
from ml_collections import config_dict

from dmd_jax.data import BouncingDigits, MovingDigits
from dmd_jax.diffusion.denoiser import X0, Velocity
from dmd_jax.diffusion.schedule import FlowMatching
from dmd_jax.methods.causal_pretrain import TeacherForcing
from dmd_jax.methods.pretrain import Pretrain
from dmd_jax.models.attention import Causal
from dmd_jax.models.dit import DiTConfig
from dmd_jax.models.wan import WanConfig
from dmd_jax.quality.evaluation import Evaluation
from dmd_jax.training.checkpoints import Checkpoints
from dmd_jax.training.configuration import complete, unknown
from dmd_jax.training.health import Thresholds
from dmd_jax.training.optimizer import AdamW, Muon
from dmd_jax.training.step import EMA
from dmd_jax.training.writers import Log


def get_config(arg=""):
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.steps = 12_000
    config.batch_size = 64
    config.accumulate = 1
    config.generator_every = 1
    config.reuse_rollout = True
    config.data = dict(name="mnist5k", split="train", data_dir=config_dict.placeholder(str))
    config.method = dict(cls=Pretrain, dropout=0.1)
    config.generator = dict(
        weights="random",
        # Image size, channels and classes come from the data.
        model=dict(cls=DiTConfig, patch=7, dim=128, depth=6, heads=4),
        schedule=dict(cls=FlowMatching),
        prediction=dict(cls=Velocity),
        compute=dict(dtype="float32", remat="none", unroll=6),
        optimizer=dict(
            cls=AdamW,
            learning_rate=3e-3,
            b2=0.99,
            weight_decay=0.01,
            clip=1.0,
            warmup=500,
            decay="cosine",
        ),
    )
    config.ema = dict(cls=EMA, decay=0.999, start=1_000)
    config.mesh = dict(data=-1, fsdp=1, context=1, tensor=1)
    config.log = dict(cls=Log, every=100, tensorboard=True)
    config.health = dict(cls=Thresholds)
    config.checkpoint = dict(cls=Checkpoints, every=1_000, keep=2)
    config.evaluate = dict(
        cls=Evaluation,
        features="mnist_metric",
        every=2_000,
        samples=500,
        num=2_000,
        steps=(50,),
        guidance=1.25,
    )
    if arg not in VARIANTS:
        raise KeyError(unknown(f"variant configs/pretrain.py:{arg}", arg, VARIANTS))
    VARIANTS[arg](config)
    return complete(config)


def _digits(config):
    """The default."""


def _wan(config, **model):
    config.data = dict(cls=MovingDigits)
    config.generator.model = dict(cls=WanConfig, reach=4, **model)
    config.generator.compute.unroll = model["depth"]
    config.generator.optimizer.learning_rate = 2e-3
    config.health.saturation = 1.0  # latents are not bounded
    config.batch_size = 8
    config.evaluate = dict(
        cls=Evaluation, features="", every=2_000, samples=1, num=320, steps=(50,), guidance=2.0
    )


def _wan_teacher(config):
    _wan(config, dim=128, ffn=384, heads=4, depth=6)


def _wan_small(config):
    _wan(config, dim=96, ffn=256, heads=4, depth=4)


def _bouncing(config, **model):
    _wan(config, **model)
    config.data = dict(cls=BouncingDigits)
    config.generator.model.reach = 12
    # A token has 144 channels, more than the network is wide: it can name a digit, but not the
    # noise that a velocity contains. After 600 steps it was better than a velocity's after 5,000.
    config.generator.prediction = dict(cls=X0)
    config.steps, config.batch_size = 4_000, 16
    config.method.shift = 5.0
    config.generator.optimizer.update(cls=Muon, learning_rate=6e-3, warmup=200)


def _bouncing_teacher(config):
    _bouncing(config, dim=128, ffn=384, heads=4, depth=4)


def _bouncing_small(config):
    _bouncing(config, dim=96, ffn=256, heads=4, depth=3)
    config.steps = 2_000


def _bouncing_causal(config):
    """The small network goes on as a causal one."""
    _bouncing_small(config)
    config.steps = 3_000
    config.method = dict(
        cls=TeacherForcing,
        causal=dict(cls=Causal, frames_per_block=3, window=6),
        dropout=0.1,
        shift=5.0,
    )
    config.generator.weights = "bouncing_small"
    config.ema.start = 0


VARIANTS = {
    "": _digits,
    "wan_teacher": _wan_teacher,
    "wan_small": _wan_small,
    "bouncing_teacher": _bouncing_teacher,
    "bouncing_small": _bouncing_small,
    "bouncing_causal": _bouncing_causal,
}
