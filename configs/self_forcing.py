"""Self-Forcing: distils a bidirectional teacher into a causal student that streams.

python -m dmd_jax.main --config=configs/self_forcing.py
"""

import ml_collections

from dmd_jax.data import BouncingDigits
from dmd_jax.methods.causal import SelfForcing
from dmd_jax.methods.dmd import DMD
from dmd_jax.models.attention import Causal
from dmd_jax.quality.evaluation import Evaluation
from dmd_jax.training.checkpoints import Checkpoints
from dmd_jax.training.configuration import complete, unknown
from dmd_jax.training.health import Thresholds
from dmd_jax.training.optimizer import AdamW
from dmd_jax.training.step import EMA
from dmd_jax.training.writers import Log


def get_config(arg=""):
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.steps = 600
    config.batch_size = 16
    config.accumulate = 1
    config.generator_every = 5
    config.reuse_rollout = True
    config.data = dict(cls=BouncingDigits)
    config.method = dict(
        cls=DMD,
        times=(1.0, 0.75, 0.5, 0.25),
        shift=3.0,
        score_shift=3.0,
        guidance=2.0,
        video=dict(cls=SelfForcing, causal=dict(cls=Causal, frames_per_block=3, window=6, sink=3)),
    )
    compute = dict(dtype="float32", remat="none", unroll=6)
    adamw = dict(cls=AdamW, learning_rate=2e-4, b1=0.0, b2=0.99)
    config.teacher = dict(weights="bouncing_teacher", compute=compute)
    config.generator = dict(weights="bouncing_start", compute=compute, optimizer=adamw)
    config.fake_score = dict(weights="bouncing_small", compute=compute, optimizer=adamw)
    config.ema = dict(cls=EMA, decay=0.97, start=0)
    config.mesh = dict(data=-1, fsdp=1, context=1, tensor=1)
    config.log = dict(cls=Log, every=25, tensorboard=True)
    config.health = dict(cls=Thresholds, saturation=1.0)  # latents are not bounded
    config.checkpoint = dict(cls=Checkpoints, every=100, keep=2)
    config.evaluate = dict(
        cls=Evaluation,
        features="",
        every=300,
        samples=1,
        num=200,
        steps=(4,),
        teacher_steps=(50,),
        teacher_guidance=2.0,
        frames=48,
    )
    if arg not in VARIANTS:
        raise KeyError(unknown(f"variant configs/self_forcing.py:{arg}", arg, VARIANTS))
    VARIANTS[arg](config)
    return complete(config)


def _blocks_of_three(config):
    """The default."""


VARIANTS = {"": _blocks_of_three}
