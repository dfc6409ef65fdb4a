"""Trains the shipped teacher: a class-conditional flow-matching DiT on 4,000 MNIST digits.

On two CPU cores this takes about half an hour; dmd_jax/assets/mnist_teacher.md has its quality:

    python -m dmd_jax.main --config=configs/pretrain.py

Square images of any data set in the TFDS catalogue will do: --config.data.name=cifar10, with
--config.generator.model.patch=4 and a wider model for its richer images.
"""

import ml_collections
from ml_collections import config_dict

from dmd_jax.configuration import complete
from dmd_jax.denoiser import Velocity
from dmd_jax.health import Thresholds
from dmd_jax.methods.pretrain import Pretrain
from dmd_jax.models.dit import DiTConfig
from dmd_jax.optimizer import AdamW
from dmd_jax.schedule import FlowMatching
from dmd_jax.step import EMA


def get_config():
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.steps = 12_000
    config.batch_size = 64
    config.accumulate = 1
    config.generator_every = 1
    config.reuse_rollout = True
    config.data = dict(name="mnist5k", data_dir=config_dict.placeholder(str))
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
    config.log = dict(every=100, tensorboard=True)
    config.health = dict(cls=Thresholds)
    config.checkpoint = dict(every=1_000, keep=2)
    config.evaluate = dict(
        features="mnist_metric", every=2_000, samples=500, num=2_000, steps=(50,), guidance=1.25
    )
    return complete(config)
