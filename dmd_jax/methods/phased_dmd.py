"""Phased DMD: the calls of the generator in phases, each with an expert and scores of its own."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from dmd_jax.devices import randomness
from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.diffusion.schedule import Schedule, sample_time, shift_time
from dmd_jax.losses import subintervals
from dmd_jax.methods import Batch, Index, Nets, Observed, OneKey, Scalar
from dmd_jax.methods.dmd import DMD
from dmd_jax.models.experts import Experts, expert_of, network_times
from dmd_jax.rollouts.backward_simulation import Rollout
from dmd_jax.rollouts.phased import check_phases, phase_ends, phased
from dmd_jax.rollouts.samplers import Sampler, few_step

# Fields of DMD that rollouts in phases do not have, and the values that mean nothing.
UNUSED = {
    "video": None,
    "strides": (1,),
    "step_range": None,
    "last_step_share": 0.0,
    "above_exit": False,
    "below_exit": False,
}


@dataclasses.dataclass(frozen=True)
class PhasedDMD(DMD):
    """Phased DMD (Fan et al. 2025, arXiv 2510.27684): DMD in subintervals of time.

    Phase k turns samples at the end of phase k - 1, or noise, into samples x_s at its own end s:
    the time of the next phase's first call, or 0. Its scores are those of x_t diffused from x_s,
    t > s, and the fake score's targets are exact for them (`losses.subintervals`). A step draws one
    phase, by the exit step, for the whole batch.

    Generator and fake score are one network each, or `models.experts.Experts` with an expert for
    each phase. The teacher may be a pair that is divided at the end of a phase.

    Attributes:
        phases: the number of calls of each phase, from noise; they add up to those of `times`.
        nested: compare the scores of a phase from its end up to t = 1, the paper's choice; False
            ends at the beginning of the phase, so that no two phases share a time, and one fake
            score may serve all.
        clip: how far above the end of the phase the lowest time is; the highest time.

    Raises:
        ValueError: phases that are not the calls, a field of rollouts of other kinds, or a clip
            that leaves a phase no times.
    """

    phases: tuple[int, ...] = (2, 2)
    nested: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_phases(self.times, self.phases)
        for name, unused in UNUSED.items():
            if (value := getattr(self, name)) != unused:
                raise ValueError(
                    f"{name}={value}: rollouts in phases exit at each call alike: leave it {unused}"
                )
        for start, end in zip(self.levels, self.levels[1:], strict=False):
            low, high = end + self.clip[0], min(start, self.clip[1])
            if low >= high:
                raise ValueError(
                    f"clip={self.clip} leaves no times between {end:.4g} and {start:.4g}, where "
                    "the scores of one of the phases are compared: lower its first number, raise "
                    "its second, or join two phases"
                )

    @property
    def levels(self) -> tuple[float, ...]:
        """1, and the times, after the shift, at which the phases end."""
        ends = phase_ends(self.times, self.phases)
        return (1.0, *(float(shift_time(end, self.shift)) for end in ends))

    def check_networks(self, nets: Nets) -> None:
        """Raises ValueError where the networks of a run are not those of its phases.

        Args:
            nets: {role: Denoiser} of all roles; weights may be abstract.
        """
        if nets["generator"].schedule != nets["teacher"].schedule:
            raise ValueError(
                f"the samples of a phase go on from the generator's {nets['generator'].schedule} "
                f"to the teacher's {nets['teacher'].schedule}: they must be the same schedule"
            )
        for role in ("generator", "fake_score"):
            self._check_experts(role, nets[role])
        for role in ("generator", "teacher"):
            self._check_boundaries(role, nets[role])

    def _check_boundaries(self, role, denoiser):
        if not isinstance(denoiser.net, Experts):
            return
        ends = network_times(denoiser, self.levels[1:-1])
        if odd := [b for b in denoiser.net.boundaries if not _near(b, ends)]:
            raise ValueError(
                f"the {role}'s experts are divided at {odd}, where no phase ends: the phases "
                f"of {self.phases} calls at {self.times} with shift={self.shift} end at {ends}"
            )

    def _check_experts(self, role, denoiser):
        phases, experts = len(self.phases), 1
        if isinstance(denoiser.net, Experts):
            experts = len(denoiser.net.nets)
        if experts not in (1, phases):
            raise ValueError(f"the {role} has {experts} experts for the {phases} phases")
        if role == "fake_score" and self.nested and experts != phases:
            raise ValueError(
                f"nested=True needs a fake_score of {phases} experts, one for each phase: at the "
                "same times they learn the scores of different samples; or set nested=False"
            )

    def sampler(self, steps: int, guidance: float) -> Sampler:
        return few_step(self.times, steps, guidance, self.shift, phases=self.phases)

    def rollout(self, generator: Denoiser, nets: Nets, batch: Batch, key: OneKey) -> Rollout:
        noise_key, exit_key = jax.random.split(key)
        return phased(
            generator,
            randomness.normal(noise_key, batch["index"], self.sample_shape),
            batch["cond"],
            jax.random.randint(exit_key, (), 0, len(self.times)),
            times=self.times,
            phases=self.phases,
            schedule=generator.schedule,
            shift=self.shift,
        )

    def compare(
        self, rollout: Rollout, nets: Nets, batch: Batch, time_key: OneKey, eps_key: OneKey
    ) -> tuple[Scalar, Observed]:
        fake_score = expert_of(nets["fake_score"], rollout.phase.number)
        nets = {**nets, "fake_score": fake_score}
        return super().compare(rollout, nets, batch, time_key, eps_key)

    def critic_loss(
        self, critics: Nets, nets: Nets, rollout: Rollout, batch: Batch, key: OneKey
    ) -> tuple[Scalar, Observed]:
        """The fake score's regression on the exact targets of the phase; see `DMD`."""
        rollout = jax.lax.stop_gradient(rollout)
        number, x_s, s = rollout.phase
        fake_score = expert_of(critics["fake_score"], number)
        schedule = fake_score.schedule
        time_key, eps_key = jax.random.split(key)
        x_t, t, eps = self.diffuse(rollout, schedule, batch["index"], time_key, eps_key)
        x0, noise = subintervals.targets(x_s, eps, s, t, schedule)
        weight = subintervals.weight(s, t, schedule)
        return self.regress(fake_score, x_t, t, x0, noise, rollout, weight), {}

    def diffuse(
        self, rollout: Rollout, schedule: Schedule, index: Index, time_key: OneKey, eps_key: OneKey
    ) -> tuple[Float32[Array, " B *data"], Float32[Array, " B"], Float32[Array, " B *data"]]:
        """Diffuses the samples from the end of their phase on, to random times: (x_t, t, eps).

        The times of a batch are of one subinterval, and so is the teacher's expert. With `nested`,
        each is drawn as often as single times would be in it.
        """
        number, x_s, s = rollout.phase
        levels = jnp.asarray(self.levels, jnp.float32)
        # The same before the shift of the times, which are uniform there.
        bounds = [shift_time(level, 1.0 / self.score_shift) for level in self.levels]
        bounds = jnp.asarray(bounds, jnp.float32)
        part = number
        if self.nested:
            time_key, part_key = jax.random.split(time_key)
            u = jax.random.uniform(part_key, minval=bounds[number + 1], maxval=1.0)
            part = jnp.sum(u < bounds[1:-1])

        def draw(key):
            return sample_time(
                key,
                low=bounds[part + 1],
                high=bounds[part],
                shift=self.score_shift,
                clip=self.clip,
            )

        t = randomness.per_sample(draw, time_key, index)
        # The expert of a level itself is the one above it.
        low = jnp.maximum(s + self.clip[0], levels[part + 1])
        t = jnp.clip(t, low, levels[part] - 1e-6)
        eps = randomness.normal(eps_key, index, x_s.shape[1:])
        return subintervals.add_noise(x_s, eps, s, t, schedule), t, eps


def _near(time, times):
    """Whether a network's time is one of others, up to the rounding of a config's numbers."""
    return any(abs(time - other) <= 1e-3 * max(abs(other), 1e-3) for other in times)
