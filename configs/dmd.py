"""Distils the shipped teacher, 50 guided steps, into a student of four, two or one.

Variants and their commands:

    python -m dmd_jax.main --config=configs/dmd.py             one student for 4, 2 and 1 steps
    python -m dmd_jax.main --config=configs/dmd.py:one_step    a student for 1 step alone
    python -m dmd_jax.main --config=configs/dmd.py:sid         the first, by score identity
    python -m dmd_jax.main --config=configs/dmd.py:any_step    a student for any number of steps
    python -m dmd_jax.main --config=configs/dmd.py:dmd2        a student for 4 steps, with a GAN
    python -m dmd_jax.main --config=configs/dmd.py:sida        dmd2, by score identity
    python -m dmd_jax.main --config=configs/dmd.py:f_distill   dmd2, by Jensen-Shannon
    python -m dmd_jax.main --config=configs/dmd.py:dmd1        a student for 1 step, from pairs too
    python -m dmd_jax.main --config=configs/dmd.py:reward      a student for 4 steps, of high reward
    python -m dmd_jax.main --config=configs/dmd.py:decoupled   a student for 4 steps, decoupled
    python -m dmd_jax.main --config=configs/dmd.py:phased      the same, in phases of two experts
    python -m dmd_jax.main --config=configs/dmd.py:tdm         each call a phase, one network (TDM)
    python -m dmd_jax.main --config=configs/dmd.py:lora        the first, by adapters of one network
    python -m dmd_jax.main --config=configs/dmd.py:consistency   consistency distillation, 4 steps
    python -m dmd_jax.main --config=configs/dmd.py:scm         the same in continuous time
    python -m dmd_jax.main --config=configs/dmd.py:meanflow    the same by a network of two times
    python -m dmd_jax.main --config=configs/dmd.py:rcm         a student for 4 steps, DMD and sCM
    python -m dmd_jax.main --config=configs/dmd.py:wan_tiny    videos: Wan in miniature
    python -m dmd_jax.main --config=configs/dmd.py:wan_t2v_1_3b  Wan2.1: 14B to 1.3B
    python -m dmd_jax.main --config=configs/dmd.py:wan_t2v_a14b  Wan2.2: its pair, in two phases

All but the last three are for digits. Training the first three takes 10 TFLOP, 10 and 21, some
minutes on two CPU cores. Expect, as means of three seeds, an FD-MNIST64 of 0.51 in 4 steps, 0.44 in
2 and 1.23 in 1 from the first, and 0.81 from `one_step`; the teacher has 0.36 in 50. `dmd2` and
`sida` take 16 TFLOP each, and have 0.40 and 0.36 in 4 steps (three seeds each); they and
`f_distill` train on real digits too. `lora` trains adapters of rank 16 on the teacher's weights.
What the others reach in half the work of the default, `benchmarks/methods.py` shows and
docs/choosing.md tells; `lora`, `dmd1` and `reward` were run for some steps only. `consistency`,
`scm`, `meanflow` and `rcm` learn from real digits too; `reward` from a classifier, the one that
also judges it; `dmd1` from pairs of a noise and what its teacher makes of it, which have to be made
first:

    python -m dmd_jax.ode_pairs --checkpoint=mnist_teacher --guidance=1.5 --num=5000 --out=pairs

`wan_tiny` generates videos of moving digits from captions, after a few minutes on these cores. The
student starts from its teacher and the fake score from a smaller network. Both are shipped and were
trained by configs/pretrain.py:wan_teacher and :wan_small.

`wan_t2v_1_3b` uses the published numbers of Self-Forcing for a bidirectional student. README.md has
its command for eight GPUs, docs/wan.md a compiler's estimate for 64 TPU chips; `--dry_run` prints
the memory of each role. It has not been run. --config.data.embeddings is the folder that
`python -m dmd_jax.embed` wrote.

`wan_t2v_a14b` distils Wan 2.2's pair of experts into a pair, by Phased DMD, with the numbers of
LightX2V's recipe. Its three roles are six networks of 14B. It has not been run either.

A flag overrides any entry, also one that may be None or a class:
--config.generator.optimizer.clip=None, --config.method.regression=X0. It also puts another class of
the same base in the place of a section's: --config.generator.optimizer.cls=Muon. Fields that only
the new class has then keep their defaults; to set them, write the section in a config program.
"""

import ml_collections
from ml_collections import config_dict

from dmd_jax.data import ImagePairs, MovingDigits, Prompts
from dmd_jax.methods.consistency import Consistency
from dmd_jax.methods.decoupled_dmd import DecoupledDMD
from dmd_jax.methods.dmd import DMD
from dmd_jax.methods.dmd1 import DMD1
from dmd_jax.methods.dmd2 import DMD2
from dmd_jax.methods.f_distill import FDistill
from dmd_jax.methods.mean_flow import MeanFlow
from dmd_jax.methods.phased_dmd import PhasedDMD
from dmd_jax.methods.rcm import RCM
from dmd_jax.methods.reward_dmd import RewardDMD
from dmd_jax.methods.scm import SCM
from dmd_jax.methods.sid import SiD
from dmd_jax.methods.sida import SiDA
from dmd_jax.models.discriminator import DiscriminatorConfig
from dmd_jax.models.wan import T2V_1_3B, T2V_14B, T2V_A14B
from dmd_jax.quality.evaluation import Evaluation
from dmd_jax.quality.rewards import LabelProbability
from dmd_jax.training.adapters import LoRA
from dmd_jax.training.checkpoints import Checkpoints
from dmd_jax.training.configuration import complete, unknown
from dmd_jax.training.health import Thresholds
from dmd_jax.training.optimizer import AdamW
from dmd_jax.training.roles import ByNoise, stated
from dmd_jax.training.step import EMA
from dmd_jax.training.writers import Log


def get_config(arg=""):
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.steps = 1_600
    config.batch_size = 16
    config.accumulate = 1
    config.generator_every = 1
    config.reuse_rollout = True
    config.data = dict(name="mnist5k", split="train", data_dir=config_dict.placeholder(str))
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
        optimizer=dict(cls=AdamW, learning_rate=1.5e-4, b1=0.0, b2=0.99, decay="linear"),
    )
    config.fake_score = dict(
        weights="teacher",
        compute=compute,
        optimizer=dict(cls=AdamW, learning_rate=4e-4, b1=0.0, b2=0.99),
    )
    config.ema = dict(cls=EMA, decay=0.98, start=0)
    config.mesh = dict(data=-1, fsdp=1, context=1, tensor=1)
    config.log = dict(cls=Log, every=50, tensorboard=True)
    config.health = dict(cls=Thresholds)
    config.checkpoint = dict(cls=Checkpoints, every=400, keep=2)
    config.evaluate = dict(
        cls=Evaluation,
        features="mnist_metric",
        every=400,
        samples=500,
        num=2_000,
        steps=(4, 2, 1),
        teacher_steps=(50, 16, 8, 4),
        teacher_guidance=1.25,
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
    _larger_batches(config)
    config.steps = 1_200
    config.evaluate.steps = (1,)


def _any_step(config):
    config.method.update(strides=(1,), step_range=(1, 8))
    config.evaluate.steps = (8, 4, 3, 2, 1)


def _dmd1(config):
    _one_step(config)
    config.method.update(cls=DMD1, regression_weight=0.25)
    config.data = dict(
        cls=ImagePairs,
        pairs="pairs",
        name="mnist5k",
        split="train",
        data_dir=config_dict.placeholder(str),
    )


def _sid(config):
    config.method.cls = SiD
    _larger_batches(config)
    config.steps = 1_800


def _dmd2(config):
    config.method.update(cls=DMD2, strides=(1,), gan_weight=0.2, r1=0.01)
    config.discriminator = dict(
        weights="random",
        model=dict(cls=DiscriminatorConfig, blocks=(1, 3), hidden=64),
        optimizer=dict(cls=AdamW, learning_rate=1e-3, b1=0.0, b2=0.99),
    )
    config.steps = 1_540
    config.evaluate.steps = (4,)


def _sida(config):
    _dmd2(config)
    config.method.cls = SiDA
    _larger_batches(config)
    config.steps = 880


def _f_distill(config):
    _dmd2(config)
    config.method.cls = FDistill


def _reward(config):
    config.method.update(cls=RewardDMD, strides=(1,), beta=0.0, reward_weight=0.05)
    config.reward = dict(cls=LabelProbability)
    config.evaluate.steps = (4,)


def _decoupled(config):
    config.method.update(cls=DecoupledDMD, strides=(1,))
    config.evaluate.steps = (4,)


def _phased(config):
    config.method.update(cls=PhasedDMD, strides=(1,), last_step_share=0.0, phases=(2, 2))
    for role in (config.generator, config.fake_score):
        role.experts = dict(cls=ByNoise, boundaries=(0.5,))
    config.evaluate.steps = (4,)


def _tdm(config):
    config.method.update(cls=PhasedDMD, strides=(1,), last_step_share=0.0)
    config.method.update(phases=(1, 1, 1, 1), nested=False)
    config.evaluate.steps = (4,)


def _flow_map(config, cls):
    config.method = dict(cls=cls, times=(1.0, 0.75, 0.5, 0.25), guidance=1.25)
    del config.fake_score
    config.batch_size = 64
    config.generator.optimizer.update(b1=0.9, learning_rate=1e-4)
    config.evaluate.steps = (4, 2, 1)


def _consistency(config):
    _flow_map(config, Consistency)


def _scm(config):
    _flow_map(config, SCM)
    config.method.warmup = 400


def _mean_flow(config):
    _flow_map(config, MeanFlow)
    config.method.warmup = 400


def _rcm(config):
    config.method.update(cls=RCM, strides=(1,), consistency=0.1, warmup=400)
    config.evaluate.steps = (4,)


def _lora(config):
    config.generator.adapter = dict(cls=LoRA, rank=16, alpha=16.0)
    config.fake_score.adapter = dict(cls=LoRA, rank=16, alpha=16.0)


def _larger_batches(config):
    """The batch, rates and intervals with which `one_step` and `sid` were measured."""
    config.batch_size = 32
    config.generator_every = 2
    config.generator.optimizer.learning_rate = 2e-4
    config.ema.decay = 0.97
    config.checkpoint.every = config.evaluate.every = 600


def _wan_tiny(config):
    compute = dict(dtype="float32", remat="none", unroll=6)
    adamw = dict(cls=AdamW, learning_rate=2e-4, b1=0.0, b2=0.99)
    config.data = dict(cls=MovingDigits)
    # Without these shifts students collapse to black frames. Most of a frame is black, and only at
    # high noise do the scores show that a digit is missing: the shifts draw more of those times.
    config.method.update(guidance=2.0, shift=3.0, score_shift=5.0)
    config.generator_every = 5
    config.ema.decay = 0.97
    config.teacher = dict(weights="moving_digits_teacher", compute=compute)
    config.generator = dict(weights="teacher", compute=compute, optimizer=adamw)
    config.fake_score = dict(weights="moving_digits_small", compute=compute, optimizer=adamw)
    config.health.saturation = 1.0  # latents are not bounded
    config.batch_size = 16
    config.steps = 600
    config.evaluate = dict(
        cls=Evaluation,
        features="",
        every=300,
        samples=1,
        num=160,
        steps=(4, 1),
        teacher_steps=(50, 4),
        teacher_guidance=2.0,
    )


def _wan_t2v_1_3b(config):
    adamw = dict(cls=AdamW, b1=0.0, b2=0.999, weight_decay=0.01, clip=10.0)
    small = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    config.data = dict(cls=Prompts, embeddings="embeddings", sample_shape=(21, 60, 104, 16))
    config.method = dict(
        cls=DMD,
        times=(1.0, 0.75, 0.5, 0.25),
        shift=5.0,
        score_shift=5.0,
        guidance=4.0,  # Self-Forcing's 3.0: docs/guidance.md
        batched_guidance=False,
    )
    config.teacher = stated(T2V_14B, "Wan-AI/Wan2.1-T2V-14B-Diffusers")
    config.generator = stated(T2V_1_3B, small, optimizer=adamw | dict(learning_rate=2e-6))
    config.fake_score = stated(T2V_1_3B, small, optimizer=adamw | dict(learning_rate=4e-7))
    config.ema = dict(cls=EMA, decay=0.99, start=200)
    config.generator_every = 5
    config.steps = 3_000
    config.batch_size = 64
    config.mesh = dict(data=1, fsdp=-1, context=1, tensor=1)
    config.health.saturation = 1.0
    config.evaluate = dict(
        cls=Evaluation,
        features="",
        every=500,
        samples=1,
        num=1,
        steps=(4,),
        teacher_steps=(50,),
        teacher_guidance=5.0,
    )


def _wan_t2v_a14b(config):
    _wan_t2v_1_3b(config)
    config.method = dict(
        cls=PhasedDMD,
        times=(1.0, 0.75, 0.5, 0.25),
        phases=(2, 2),
        nested=False,  # each network stays at the noise levels that it was trained for
        shift=7.0,  # the first phase ends at the pair's boundary: 0.5, shifted, is 0.875
        score_shift=7.0,
        clip=(0.02, 0.999),
        guidance=4.0,
        batched_guidance=False,
    )
    for name, rate in {"teacher": None, "generator": 2e-6, "fake_score": 4e-7}.items():
        config[name] = stated(T2V_A14B, "Wan-AI/Wan2.2-T2V-A14B-Diffusers")
        config[name].experts = dict(
            cls=ByNoise, boundaries=(0.875,), parts=("transformer", "transformer_2")
        )
        if rate:
            config[name].optimizer = dict(
                cls=AdamW, b1=0.0, b2=0.999, weight_decay=0.01, clip=1.0, learning_rate=rate
            )
    config.steps = 4_000
    config.evaluate.teacher_guidance = 4.0


VARIANTS = {
    "": _four_steps,
    "one_step": _one_step,
    "any_step": _any_step,
    "dmd1": _dmd1,
    "sid": _sid,
    "dmd2": _dmd2,
    "sida": _sida,
    "f_distill": _f_distill,
    "reward": _reward,
    "decoupled": _decoupled,
    "phased": _phased,
    "tdm": _tdm,
    "consistency": _consistency,
    "scm": _scm,
    "meanflow": _mean_flow,
    "rcm": _rcm,
    "lora": _lora,
    "wan_tiny": _wan_tiny,
    "wan_t2v_1_3b": _wan_t2v_1_3b,
    "wan_t2v_a14b": _wan_t2v_a14b,
}
