"""The published code of Self-Forcing beside ours, number by number, on a CPU.

    git clone https://github.com/guandeh17/Self-Forcing
    pip install torch diffusers omegaconf        (a CPU build of torch will do)
    python benchmarks/self_forcing_parity.py --self_forcing=Self-Forcing

Both run the same tiny networks in float32, from one file of weights, with the same noise, exit
steps and times: the rollout, its gradient, the DMD loss and the critic's. Where ours differs on
purpose (docs/self_forcing.md), it is compared twice: as it is, and with one of the two changed from
outside to do what the other does. The second must agree to float32 rounding, which shows that
nothing else differs; the first is the size of the difference.

The columns "theirs" and "ours" say what was changed: nothing where they are empty. "largest" is the
largest difference over the largest value, of a gradient over weights that of the worst tensor.
The networks are random; in trained ones, differences have other sizes. Ends with an error where
numbers differ that should agree.
"""

import dataclasses
import tempfile
from functools import partial
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from dmd_jax.diffusion.denoiser import Denoiser, Velocity
from dmd_jax.diffusion.schedule import FlowMatching, shift_time
from dmd_jax.methods.dmd import DMD
from dmd_jax.models.wan import Causal, Wan, WanConfig
from dmd_jax.rollouts.backward_simulation import Rollout
from dmd_jax.rollouts.self_forcing import self_forcing
from dmd_jax.weights import export, table, wan

FOLDER = flags.DEFINE_string("self_forcing", "Self-Forcing", "A clone of their repository.")

CONFIG = WanConfig(dim=48, ffn=96, heads=2, depth=2, text_dim=24, freq_dim=32)
ROLES = "generator", "real_score", "fake_score"
BLOCKS, SIZE, SIDE, TEXT = 3, 3, 4, 5
FRAMES = BLOCKS * SIZE
TOKENS = SIDE * SIDE // 4  # of a frame
TIMES, SHIFT = (1.0, 0.75, 0.5, 0.25), 5.0
SCORE_SHIFT = 8.0  # of the table in which their scores look sigma up
EXITS = 3, 1, 2
DRAWN = 8, 100, 500  # of 1000: what the times of the scores are computed from
LAST = float(shift_time(0.001, SHIFT))  # the last level of their table, which they call time 0
ROUNDING = 5e-5  # of float32, in the worst tensor of a gradient


# The published behaviour, put into ours from outside.


class TimeZero(Velocity):
    """The context has the noise of LAST, but the network is told that its time is 0."""

    def inputs(self, x_t, t, schedule):
        x_t, time = super().inputs(x_t, t, schedule)
        return x_t, jnp.where(t <= LAST, 0.0, time)


def from_table(t, shift):
    """Their sigma of a time: the entry of a table of 1,000 that is nearest."""
    entries = shift_time(1.0 - jnp.arange(1000) / 1000, shift)
    return entries[jnp.argmin(jnp.abs(entries - jnp.asarray(t)[..., None]), axis=-1)]


@dataclasses.dataclass(frozen=True)
class Table(FlowMatching):
    """Noise is added by the generator's table."""

    def sigma(self, t):
        return from_table(t, SHIFT)


def scaled(scale, net, x, timestep, text):
    """A network whose velocity is multiplied by a function of the time."""
    return net(x, timestep, text) * scale(timestep / 1000)[:, None, None, None, None]


def x0_by_table(t):
    """Ours is x_t - t v, theirs x_t - sigma v with sigma of the scores' table."""
    return from_table(t, SCORE_SHIFT) / t


def velocity_by_tables(t):
    """Their critic's velocity is (x_t - x0) / sigma, with sigma of the generator's table."""
    return from_table(t, SCORE_SHIFT) / from_table(t, SHIFT)


def score(net, scale=None):
    """A score as it is here, or with the tables of theirs."""
    if scale is None:
        return Denoiser(net)
    return Denoiser(jax.tree_util.Partial(partial(scaled, scale), net), Table())


# What is compared.


class Rows:
    """Prints what is compared, and keeps what should agree and does not."""

    def __init__(self):
        self.wrong = []
        self._print("", "theirs", "ours", "largest", "|a-b|/|b|")

    def add(self, what, their_change, our_change, theirs, ours, *, same):
        """`theirs` and `ours` are arrays, or {name: array}; the changes say what was put in."""
        if not isinstance(theirs, dict):
            theirs, ours = {"": theirs}, {"": ours}
        pairs = [(np.asarray(ours[name]), np.asarray(theirs[name])) for name in theirs]
        largest = max(np.abs(a - b).max() / np.abs(b).max() for a, b in pairs)
        difference, size = (
            np.linalg.norm(np.concatenate([x.ravel() for x in xs]))
            for xs in ([a - b for a, b in pairs], [b for _, b in pairs])
        )
        self._print(what, their_change, our_change, f"{largest:.1e}", f"{difference / size:.1e}")
        if same and not largest < ROUNDING:
            self.wrong.append(f"{what} ({their_change}, {our_change}): {largest:.1e}")

    @staticmethod
    def _print(what, their_change, our_change, largest, whole):
        print(f"{what:34}{their_change:18}{our_change:18}{largest:>9}{whole:>11}", flush=True)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def random_network(seed):
    """A Wan of random weights everywhere: an untrained one answers 0."""
    leaves, tree = jax.tree.flatten(Wan(CONFIG, rngs=nnx.Rngs(seed)))
    leaves = [x + 0.1 * normal([seed, i], *x.shape) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(tree, leaves)


def by_their_names(net):
    """{name in their files: array} of a network, or of a gradient over its weights."""
    return dict(table.theirs(net, wan.table(CONFIG, "original")))


# One sample: their context noise is for batches of one.
SHAPE = FRAMES, SIDE, SIDE, CONFIG.out_channels
NOISE = normal(1, 1, *SHAPE)
STEP_NOISE = normal(2, BLOCKS, len(TIMES) + 1, 1, SIZE, *SHAPE[1:])
FUNCTIONAL = normal(3, 1, *SHAPE)  # the gradient is that of sum(latents * FUNCTIONAL)
CONTEXT, NULL = normal(4, 1, TEXT, CONFIG.text_dim), normal(5, 1, TEXT, CONFIG.text_dim)
INPUTS = NOISE, CONTEXT, STEP_NOISE
EPS = normal(6, 1, *SHAPE)


@partial(jax.jit, static_argnames="context_time")
def our_rollout(generator, context_time):
    """(latents, gradient of sum(latents * FUNCTIONAL))."""

    def functional(generator):
        x0 = self_forcing(
            generator,
            jnp.asarray(NOISE),
            CONTEXT,
            jax.random.key(0),
            times=TIMES,
            shift=SHIFT,
            schedule=generator.schedule,
            causal=Causal(SIZE),
            context_time=context_time,
            exit_step=jnp.asarray(EXITS),
            step_noise=jnp.asarray(STEP_NOISE),
        ).x0
        return jnp.sum(x0 * FUNCTIONAL), x0

    gradient, x0 = jax.grad(functional, has_aux=True)(generator)
    return x0, gradient.net


def compare_rollouts(rows, theirs, net):
    """The latents of every block and their gradient over the weights; returns our latents."""
    x0, gradient = our_rollout(Denoiser(net), 0.0)
    noisy_x0, noisy_gradient = our_rollout(Denoiser(net, prediction=TimeZero()), LAST)
    gradient, noisy_gradient = by_their_names(gradient), by_their_names(noisy_gradient)

    def roll(**mended):
        x0, gradient, _ = theirs.rollout(*INPUTS, EXITS, FUNCTIONAL, **mended)
        return to_blocks(x0), gradient

    as_it_is, leaking = roll()
    clean, _ = roll(clean=True)
    _, constant = roll(constant=True)
    _, both = roll(clean=True, constant=True)
    for i, block in enumerate(to_blocks(x0)):
        what = f"latents, block {i + 1}"
        rows.add(what, "", "noisy context", as_it_is[i], to_blocks(noisy_x0)[i], same=True)
        rows.add(what, "clean context", "", clean[i], block, same=True)
        rows.add(what, "", "", as_it_is[i], block, same=i == 0)
    what = "gradient over the weights"
    rows.add(what, "constant caches", "noisy context", constant, noisy_gradient, same=True)
    rows.add(what, "clean, constant", "", both, gradient, same=True)
    rows.add(what, "constant caches", "", constant, gradient, same=False)
    rows.add(what, "", "noisy context", leaking, noisy_gradient, same=False)
    rows.add(what, "", "", leaking, gradient, same=False)
    return x0


def to_blocks(x):
    """The blocks of [B, F, ...]."""
    return np.split(np.asarray(x), BLOCKS, axis=1)


def compare_exits(rows, theirs, net):
    """The interval of the exit step, in which the scores' times may be drawn."""

    @jax.jit
    def ours(exit_step):
        rollout = self_forcing(
            Denoiser(net),
            jnp.asarray(NOISE),
            CONTEXT,
            jax.random.key(0),
            times=TIMES,
            shift=SHIFT,
            schedule=FlowMatching(),
            causal=Causal(SIZE),
            exit_step=exit_step,
        )
        return rollout.t_from, rollout.t_to

    for step in range(len(TIMES)):
        *_, bounds = theirs.rollout(*INPUTS, [step] * BLOCKS, FUNCTIONAL, shared=True)
        what = f"interval of exit step {step}"
        rows.add(what, "", "", np.array(bounds) / 1000, np.array(ours(step)), same=True)


@partial(jax.jit, static_argnames="tables")
def our_losses(x0, nets, t, tables):
    """DMD's loss and its gradient at x0, the critic's and its gradient over the weights.

    Args:
        x0: latents.
        nets: by role.
        t: time of the scores, [1].
        tables: whether sigma is looked up in their two tables.
    """
    method = DMD(sample_shape=SHAPE, guidance=4.0)
    batch = {"uncond": NULL, "index": jnp.arange(1)}
    key = jax.random.key(0)  # of draws that `diffuse` does not make
    x0_scale, velocity_scale = (x0_by_table, velocity_by_tables) if tables else (None, None)

    def diffuse(self, rollout, schedule, *unused):
        return schedule.add_noise(rollout.x0, EPS, t), t, EPS

    def rollout(x0):
        return Rollout(x0, None, jnp.float32(1.0), jnp.float32(0.0), CONTEXT)

    def dmd(x0):
        scores = {
            "teacher": score(nets["real_score"], x0_scale),
            "fake_score": score(nets["fake_score"], x0_scale),
        }
        return method.compare(rollout(x0), scores, batch, key, key)[0]

    def critic(net):
        critics = {"fake_score": score(net, velocity_scale)}
        return method.critic_loss(critics, {}, rollout(x0), batch, key)[0]

    with mock.patch.object(DMD, "diffuse", diffuse):
        return *jax.value_and_grad(dmd)(x0), *jax.value_and_grad(critic)(nets["fake_score"])


def compare_losses(rows, theirs, nets, x0):
    """DMD's loss and gradient, and the critic's, at given latents, times and noise."""
    for drawn in DRAWN:
        t = np.clip(shift_time(np.float32([drawn]) / 1000, SHIFT), *DMD.clip)
        loss, gradient, time = theirs.generator_loss(x0, CONTEXT, NULL, EPS, [drawn])
        fake_loss, fake_gradient = theirs.critic_loss(x0, CONTEXT, EPS, [drawn])
        rows.add(f"time of the scores: {t[0]:.3f}", "", "", time / 1000, t, same=True)
        for tables, change in ((True, "their tables"), (False, "")):
            ours = our_losses(x0, nets, t, tables)
            our_gradient = by_their_names(ours[3])
            rows.add("DMD loss", "", change, loss, ours[0], same=tables)
            rows.add("DMD gradient", "", change, gradient, ours[1], same=tables)
            rows.add("critic's loss", "", change, fake_loss, ours[2], same=tables)
            rows.add("critic's gradient", "", change, fake_gradient, our_gradient, same=tables)


def compare_critic_velocities(rows, theirs):
    """What the critic's loss sees of a velocity: theirs by way of x0, ours as it is."""
    velocity, x_t = normal(7, 64, 16, 8, 8), normal(8, 64, 16, 8, 8)
    for t in (0.02, 0.1, 0.5, 0.98):
        scale = np.asarray(velocity_by_tables(t))
        for dtype in ("float32", "bfloat16"):
            said, seen = theirs.velocity_through_x0(velocity, x_t, 1000 * t, dtype)
            what, exact = f"velocity at {t}, {dtype}", dtype == "float32"
            rows.add(what, "", "their tables", seen, said * scale, same=exact)
            rows.add(what, "", "", seen, said, same=False)


def main(argv):
    del argv
    folder = Path(FOLDER.value).expanduser()
    if not (folder / "pipeline" / "self_forcing_training.py").is_file():
        raise SystemExit(
            f"--self_forcing={folder} is no clone of Self-Forcing: "
            "git clone https://github.com/guandeh17/Self-Forcing"
        )
    from published_self_forcing import Published  # torch is not needed to say the above

    nets = {role: random_network(seed) for seed, role in enumerate(ROLES)}
    sizes = dict(
        dim=CONFIG.dim,
        ffn_dim=CONFIG.ffn,
        num_heads=CONFIG.heads,
        num_layers=CONFIG.depth,
        freq_dim=CONFIG.freq_dim,
        text_dim=CONFIG.text_dim,
        text_len=TEXT,
    )
    with tempfile.TemporaryDirectory() as temporary:
        files = {role: Path(temporary) / f"{role}.pt" for role in ROLES}
        for role, net in nets.items():
            export.self_forcing(files[role], net)
        theirs = Published(folder, sizes, files, frames=FRAMES, tokens=TOKENS)
    rows = Rows()
    x0 = compare_rollouts(rows, theirs, nets["generator"])
    compare_exits(rows, theirs, nets["generator"])
    compare_losses(rows, theirs, nets, x0)
    compare_critic_velocities(rows, theirs)
    if rows.wrong:
        raise SystemExit("these should agree:\n" + "\n".join(rows.wrong))


if __name__ == "__main__":
    app.run(main)
