"""What `run.build` refuses: entries of a config, and parts of a run, that do not go together.

A class checks its own fields; here is what no single class can know. Every error names the entry,
both values and what to do. Imports models and the configuration.
"""

from dmd_jax.models.experts import Experts
from dmd_jax.training.configuration import config_role, flatten, unknown

KEYS = (
    *("seed", "steps", "batch_size", "accumulate", "generator_every", "reuse_rollout"),
    *("data", "method", "ema", "mesh", "log", "checkpoint", "health", "evaluate"),
)
# Entries that must be 1 or more and that no class checks.
POSITIVE = ("steps", "batch_size", "accumulate", "generator_every")


def entries(config):
    """Refuses unknown, missing and impossible entries that no class checks.

    Raises:
        ValueError: the entry.
    """
    if "cls" not in config.get("method", {}):
        raise ValueError("config.method names no class; write config.method = dict(cls=DMD, ...)")
    kind = config.method.cls
    roles = (*kind.trainable, *kind.frozen)
    known = (*KEYS, *roles, "vae", "reward")
    for name in config:
        if name not in known:
            raise ValueError(unknown(f"config.{name}", name, known))
    needed = [*KEYS, *roles, *(f"{role}.weights" for role in roles)]
    needed += [f"{role}.optimizer" for role in kind.trainable]
    if "cls" not in config.get("data", {}):
        needed.append("data.name")
    missing = [name for name in needed if not _has(config, name)]
    if missing:
        raise ValueError(f"config lacks {missing}; {kind.__name__} needs them")
    for role in kind.frozen:
        if config[role].weights == "random":
            raise ValueError(
                f"config.{role}.weights='random', but the {role} is not trained: name the file of "
                "its weights"
            )
    values = flatten(config)
    for name in POSITIVE:
        if values[name] < 1:
            raise ValueError(f"config.{name} is {values[name]}; it must be 1 or more")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"config.seed is {config.seed}; it must be 0 or more and below 2**32")


def _has(config, path):
    """Whether a config has an entry, by its path: "generator.weights"."""
    for name in path.split("."):
        if name not in config:
            return False
        config = config[name]
    return True


def guidance(config, source):
    """Refuses pairs that were made with another guidance than the method's.

    Args:
        config: the config of the run.
        source: the training data; those without a `guidance` of their own pass.

    Raises:
        ValueError: both numbers.
    """
    made, wanted = getattr(source, "guidance", None), config.method.get("guidance")
    if None not in (made, wanted) and made != wanted:
        raise ValueError(
            f"config.data: its pairs were made with guidance={made}, but config.method.guidance="
            f"{wanted}: both losses must aim at one teacher. Change the second, or make pairs with "
            f"`python -m dmd_jax.ode_pairs --guidance={wanted} --out=...`"
        )


def fit(nets, source):
    """Refuses networks of other samples or conditions than the data's, and two score schedules.

    Args:
        nets: {role: abstract Denoiser}.
        source: the training data.

    Raises:
        ValueError: the role, or both schedules.
    """
    for role, denoiser in nets.items():
        source.require_fit(f"config.{role}", denoiser.net.config)
    schedules = {role: nets[role].schedule for role in ("teacher", "fake_score") if role in nets}
    if len(set(schedules.values())) > 1:
        raise ValueError(f"teacher and fake_score must share one schedule, but have {schedules}")


def networks(method, nets):
    """Refuses networks that the method cannot use; experts, unless it says which it can.

    Args:
        method: a dataclass of `methods/`.
        nets: {role: abstract network}, those of `fit` and a discriminator.

    Raises:
        ValueError: the role, and which networks the method can use.
    """
    if hasattr(method, "check_networks"):
        try:
            return method.check_networks(nets)
        except ValueError as error:
            raise ValueError(f"config.method: {error}") from error
    for role, net in nets.items():
        if isinstance(getattr(net, "net", None), Experts):
            raise ValueError(
                f"config.{config_role(role)} has experts, one of which is called for a "
                f"whole batch, and {type(method).__name__} draws a time for each sample: use "
                "PhasedDMD, or one network"
            )


def fallback(log, checkpoint):
    """Refuses settings by which all checkpoints could come from steps that were not judged yet.

    Health is judged at multiples of log.every. Up to ceil((log.every - 1) / checkpoint.every)
    checkpoints lie between two of them, and one more must be kept.

    Args:
        log: `writers.Log`.
        checkpoint: `checkpoints.Checkpoints`.

    Raises:
        ValueError: all three numbers.
    """
    every, keep, window = checkpoint.every, checkpoint.keep, log.every
    if (keep - 1) * every < window - 1:
        raise ValueError(
            f"config.checkpoint.keep={keep} checkpoints, one every config.checkpoint.every={every} "
            f"steps, do not reach back over config.log.every={window} steps, after which the "
            "health of a run is judged: if it diverges, none of them may be good. Lower log.every, "
            "or raise checkpoint.every or checkpoint.keep"
        )
