"""A Wan of moderate size against the same built on diffusers in PyTorch, on this machine's CPU.

    pip install torch diffusers        (a CPU build will do)
    python benchmarks/wan.py
    python benchmarks/wan.py --frames=12 --only=forward     3,072 tokens

Three programs in float32, batch 1, the two sides in turn in one process, medians over the rounds:
the forward pass; a generator update of one-step DMD (generator, critic, two teacher passes,
backward, AdamW); a critic update (generator, critic forward and backward, AdamW). FLOPs are
arithmetic (two per weight of a layer and token, plus attention; a backward pass is two forward
ones), the matmul peak is measured in the same process.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from flax import nnx
from peak import matmul_peak

from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.methods.dmd import DMD
from dmd_jax.models.wan import Wan, WanConfig
from dmd_jax.weights import wan as names
from dmd_jax.weights.table import fill

FRAMES = flags.DEFINE_integer("frames", 3, "Latent frames of 32x32: 256 tokens each.")
TEXT = flags.DEFINE_integer("text", 64, "Text tokens.")
ROUNDS = flags.DEFINE_integer("rounds", 7, "Rounds over all programs.")
THREADS = flags.DEFINE_integer("threads", 2, "PyTorch's threads.")
ONLY = flags.DEFINE_list("only", None, "Which of forward, generator, critic; all if none.")

CONFIG = WanConfig(dim=384, ffn=1536, heads=6, depth=8, unroll=8)
SIDE = 32
GUIDANCE, RATE = 4.0, 1e-5


def ours(state, x, text):
    """{program: callable} of this library, each on networks with the weights of `state`."""
    abstract = jax.eval_shape(lambda: Wan(CONFIG, rngs=nnx.Rngs(0)))
    net = fill(abstract, names.table(CONFIG, "diffusers"), lambda name: state[name].numpy())
    denoiser = Denoiser(net)
    method = DMD(sample_shape=x.shape[1:], times=(1.0,), guidance=GUIDANCE, batched_guidance=False)
    batch = {"cond": text, "uncond": jnp.zeros_like(text), "index": jnp.arange(len(x))}
    tx = optax.adamw(RATE, weight_decay=0.01)
    key = jax.random.key(0)

    def apply(grads, state):
        net, moments = state
        updates, moments = tx.update(grads, moments, net)
        return optax.apply_updates(net, updates), moments

    def generator(state, nets):
        def loss(net):
            return method.generator_loss(net, nets, batch, key)[0]

        return apply(jax.grad(loss)(state[0]), state)

    def critic(state, nets):
        samples = method.rollout(nets["generator"], nets, batch, key)

        def loss(net):
            return method.critic_loss({"fake_score": net}, nets, samples, batch, key)[0]

        return apply(jax.grad(loss)(state[0]), state)

    forward = jax.jit(lambda net, x: net(x, jnp.full(len(x), 500.0), text))
    nets = dict.fromkeys(("teacher", "fake_score", "generator"), denoiser)
    updates = {}
    for role, update in (("generator", generator), ("critic", critic)):
        updates[role] = stepper(jax.jit(update, donate_argnums=0), denoiser, tx, nets)
    return {"forward": lambda: forward(net, x).block_until_ready(), **updates}


def stepper(update, denoiser, tx, nets):
    """A callable that takes one step, and keeps the state for the next one."""
    buffers = {}

    def step():
        if not buffers:  # buffers of its own, since a step eats them
            fresh = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), denoiser)
            buffers["state"] = fresh, tx.init(fresh)
        buffers["state"] = jax.block_until_ready(update(buffers["state"], nets))

    return step


def theirs(x, text):
    """({program: callable} on diffusers and PyTorch, the weights)."""
    import torch
    from diffusers import WanTransformer3DModel

    torch.set_num_threads(THREADS.value)
    torch.manual_seed(0)
    settings = names.to_settings(CONFIG, "diffusers")
    settings.pop("_class_name")

    def network():
        net = WanTransformer3DModel(**settings)
        net.load_state_dict(state)
        return net

    first = WanTransformer3DModel(**settings)
    with torch.no_grad():  # a fresh head is zero: nothing would flow back
        first.proj_out.weight.normal_(std=0.02)
    state = {name: value.clone() for name, value in first.state_dict().items()}
    nets = {role: network() for role in ("generator", "teacher", "fake_score")}
    adams = {
        role: torch.optim.AdamW(nets[role].parameters(), lr=RATE, weight_decay=0.01)
        for role in ("generator", "fake_score")
    }
    x = torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy())
    text = torch.from_numpy(np.array(text))

    def x0(net, x_t, t, text):
        time = torch.full((len(x_t),), 1000.0 * t)
        return x_t - t * net(x_t, time, text, return_dict=False)[0]

    def forward():
        with torch.no_grad():
            return nets["generator"](x, torch.full((len(x),), 500.0), text, return_dict=False)[0]

    def generator():
        samples, t = x0(nets["generator"], torch.randn_like(x), 1.0, text), 0.5
        with torch.no_grad():
            x_t = (1 - t) * samples + t * torch.randn_like(samples)
            fake = x0(nets["fake_score"], x_t, t, text)
            cond = x0(nets["teacher"], x_t, t, text)
            uncond = x0(nets["teacher"], x_t, t, torch.zeros_like(text))
            real = uncond + GUIDANCE * (cond - uncond)
            grad = (fake - real) / (samples - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
        loss = 0.5 * torch.nn.functional.mse_loss(samples, (samples - grad).detach())
        adams["generator"].zero_grad()
        loss.backward()
        adams["generator"].step()

    def critic():
        with torch.no_grad():
            samples, t = x0(nets["generator"], torch.randn_like(x), 1.0, text), 0.5
            eps = torch.randn_like(samples)
            x_t = (1 - t) * samples + t * eps
        time = torch.full((len(x),), 1000.0 * t)
        raw = nets["fake_score"](x_t, time, text, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(raw, eps - samples)
        adams["fake_score"].zero_grad()
        loss.backward()
        adams["fake_score"].step()

    return {"forward": forward, "generator": generator, "critic": critic}, state


def forward_flops(frames, text):
    """FLOPs of one forward pass: weights of the layers, self- and cross-attention."""
    c, tokens = CONFIG, frames * (SIDE // 2) ** 2
    own = 2 * tokens * (6 * c.dim**2 + 2 * c.dim * c.ffn) + 2 * text * 2 * c.dim**2
    return c.depth * (own + 4 * tokens * (tokens + text) * c.dim)


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main(_):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, FRAMES.value, SIDE, SIDE, CONFIG.in_channels)), jnp.float32)
    text = jnp.asarray(rng.normal(size=(1, TEXT.value, CONFIG.text_dim)), jnp.float32)
    their_programs, state = theirs(x, text)
    our_programs = ours(state, x, text)
    named = ONLY.value or list(our_programs)
    times = {(name, who): [] for name in named for who in ("ours", "PyTorch")}
    for round_ in range(ROUNDS.value + 1):
        for name in named:
            for who, programs in (("ours", our_programs), ("PyTorch", their_programs)):
                taken = seconds(programs[name])
                if round_:  # the first round compiles
                    times[name, who].append(taken)
    peak = matmul_peak()
    flops = forward_flops(FRAMES.value, TEXT.value)
    passes = {"forward": 1, "generator": 1 + 1 + 2 + 2, "critic": 1 + 1 + 2}
    print(f"{FRAMES.value * (SIDE // 2) ** 2} tokens; matmul peak {peak / 1e9:.0f} GFLOP/s")
    print(f"{'':<12}{'ours':>10}{'PyTorch':>10}{'ratio':>8}{'of peak':>9}")
    for name in named:
        mine, other = (statistics.median(times[name, who]) for who in ("ours", "PyTorch"))
        rate = passes[name] * flops / mine / peak
        print(f"{name:<12}{mine:>8.3f} s{other:>8.3f} s{mine / other:>8.2f}{rate:>9.0%}")


if __name__ == "__main__":
    app.run(main)
