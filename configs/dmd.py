"""Distils the shipped teacher, 50 guided steps, into a student of four, two or one.

Variants and their commands:

    python -m dmd_jax.main --config=configs/dmd.py             one student for 4, 2 and 1 steps
    python -m dmd_jax.main --config=configs/dmd.py:one_step    a student for 1 step alone
    python -m dmd_jax.main --config=configs/dmd.py:sid         the first, by score identity

On two CPU cores each takes about five minutes. Expect, as means of three seeds, an FD-MNIST64 of
0.52 in 4 steps, 0.46 in 2 and 1.29 in 1, and 0.81 from `one_step`; the teacher has 0.36 in 50.
"""

import ml_collections
from ml_collections import config_dict

from dmd_jax.configuration import complete, unknown
from dmd_jax.health import Thresholds
from dmd_jax.methods.dmd import DMD
from dmd_jax.methods.sid import SiD
from dmd_jax.optimizer import AdamW
from dmd_jax.step import EMA


def get_config(arg=""):
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.steps = 1_800
    config.batch_size = 32
    config.accumulate = 1
    config.generator_every = 2
    config.reuse_rollout = True
    config.data = dict(name="mnist5k", data_dir=config_dict.placeholder(str))
    config.method = dict(
        cls=DMD,
        times=(1.0, 0.75, 0.5, 0.25),
        strides=(1, 2, 4),
        last_step_share=0.3,
        guidance=1.25,
    )
    compute = dict(dtype="float32", remat="none", unroll=6)
    config.teacher = dict(weights="mnist_teacher", compute=compute)
    config.generator = dict(
        weights="teacher",
        compute=compute,
        optimizer=dict(cls=AdamW, learning_rate=2e-4, b1=0.0, b2=0.99, decay="linear"),
    )
    config.fake_score = dict(
        weights="teacher",
        compute=compute,
        optimizer=dict(cls=AdamW, learning_rate=4e-4, b1=0.0, b2=0.99),
    )
    config.ema = dict(cls=EMA, decay=0.97, start=0)
    config.mesh = dict(data=-1, fsdp=1, context=1, tensor=1)
    config.log = dict(every=50, tensorboard=True)
    config.health = dict(cls=Thresholds)
    config.checkpoint = dict(every=600, keep=2)
    config.evaluate = dict(
        features="mnist_metric",
        every=600,
        samples=500,
        num=2_000,
        steps=(4, 2, 1),
        teacher_steps=(50, 16, 8, 4),
        teacher_guidance=1.25,
        recompute=False,  # the teacher's rows, which are kept as long as nothing changes them
    )
    if arg not in VARIANTS:
        raise KeyError(unknown(f"variant configs/dmd.py:{arg}", arg, VARIANTS))
    VARIANTS[arg](config)
    return complete(config)


def _four_steps(config):
    """The default."""


def _one_step(config):
    config.method.times = (1.0,)
    config.method.strides = (1,)
    config.method.last_step_share = 0.0
    config.method.guidance = 1.5
    config.steps = 1_200
    config.evaluate.steps = (1,)


def _sid(config):
    config.method.cls = SiD


VARIANTS = {"": _four_steps, "one_step": _one_step, "sid": _sid}
