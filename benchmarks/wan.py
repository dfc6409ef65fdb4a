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

import importlib.util
import statistics
import sys
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

FLAGS = flags.FLAGS
CONFIG = WanConfig(dim=384, ffn=1536, heads=6, depth=8, unroll=8)
SIDE = 32
GUIDANCE, RATE = 4.0, 1e-5


def define_flags():
    flags.DEFINE_integer("frames", 3, "Latent frames of 32x32: 256 tokens each.")
    flags.DEFINE_integer("text", 64, "Text tokens.")
    flags.DEFINE_integer("rounds", 7, "Rounds over all programs.")
    flags.DEFINE_integer("threads", 2, "PyTorch's threads.")
    flags.DEFINE_list("only", None, "Which of forward, generator, critic; all if none.")


def abstract(config):
    """A Wan without values."""
    return jax.eval_shape(lambda: Wan(config, rngs=nnx.Rngs(0)))


def frozen(denoiser):
    """The three roles, in the network's compute dtype."""
    dtype = denoiser.net.config.dtype
    cast = jax.tree.map(lambda leaf: leaf.astype(dtype), denoiser)
    return dict.fromkeys(("teacher", "fake_score", "generator"), cast)


OPTIMIZER = optax.adamw(RATE, weight_decay=0.01)


def programs(sample_shape):
    """{program: jitted function of this library}.

    forward(net, x, text) gives the velocity; generator and critic (state, nets, text) give a new
    state in the place of the old one: (the trained network, its moments).
    """
    method = DMD(sample_shape=sample_shape, times=(1.0,), guidance=GUIDANCE, batched_guidance=False)
    key = jax.random.key(0)

    def batch(text):
        return {"cond": text, "uncond": jnp.zeros_like(text), "index": jnp.arange(len(text))}

    def apply(grads, state):
        net, moments = state
        updates, moments = OPTIMIZER.update(grads, moments, net)
        return optax.apply_updates(net, updates), moments

    def forward(net, x, text):
        return net(x, jnp.full(len(x), 500.0), text)

    def generator(state, nets, text):
        def loss(net):
            return method.generator_loss(net, nets, batch(text), key)[0]

        return apply(jax.grad(loss)(state[0]), state)

    def critic(state, nets, text):
        samples = method.rollout(nets["generator"], nets, batch(text), key)

        def loss(net):
            return method.critic_loss({"fake_score": net}, nets, samples, batch(text), key)[0]

        return apply(jax.grad(loss)(state[0]), state)

    updates = {update.__name__: update for update in (generator, critic)}
    jitted = {name: jax.jit(update, donate_argnums=0) for name, update in updates.items()}
    return {"forward": jax.jit(forward), **jitted}


def ours(config, state, x, text):
    """{program: callable} of this library, each on networks with the weights of `state`."""
    table = names.table(config, "diffusers")
    denoiser = Denoiser(fill(abstract(config), table, lambda name: state[name].numpy()))
    nets, functions = frozen(denoiser), programs(x.shape[1:])
    forward = functions.pop("forward")
    calls = {"forward": lambda: forward(nets["generator"].net, x, text).block_until_ready()}
    return calls | {role: stepper(f, denoiser, nets, text) for role, f in functions.items()}


def stepper(update, denoiser, nets, text):
    """A callable that takes one step, and keeps the state for the next one."""
    buffers = {}

    def step():
        if not buffers:  # buffers of its own, since a step eats them
            fresh = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), denoiser)
            buffers["state"] = fresh, OPTIMIZER.init(fresh)
        buffers["state"] = jax.block_until_ready(update(buffers["state"], nets, text))

    return step


def theirs(config, x, text, device="cpu"):
    """({program: callable} on diffusers and PyTorch, the weights).

    In bfloat16, networks compute by autocast. The weights of those that are trained stay float32.
    """
    import torch
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    settings = names.to_settings(config, "diffusers")
    settings.pop("_class_name")
    dtype = getattr(torch, config.dtype)
    mixed = torch.autocast(device, dtype, enabled=dtype != torch.float32)

    def network():
        net = WanTransformer3DModel(**settings)
        net.load_state_dict(state)
        if config.remat == "full":
            net.enable_gradient_checkpointing()
        return net.to(device)

    first = WanTransformer3DModel(**settings)
    with torch.no_grad():  # a fresh head is zero: nothing would flow back
        first.proj_out.weight.normal_(std=0.02)
    state = {name: value.clone() for name, value in first.state_dict().items()}
    teacher = network().requires_grad_(False)
    for name, parameter in teacher.named_parameters():
        if not any(part in name for part in teacher._keep_in_fp32_modules):
            parameter.data = parameter.to(dtype)
    nets = {role: network() for role in ("generator", "fake_score")}
    adams = {
        role: torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=0.01)
        for role, net in nets.items()
    }
    x = torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy()).to(device)
    text = torch.from_numpy(np.array(text)).to(device)

    def velocity(net, x_t, t, text):
        time = torch.full((len(x_t),), 1000.0 * t, device=device)
        return net(x_t, time, text, return_dict=False)[0]

    def x0(net, x_t, t, text):
        return x_t - t * velocity(net, x_t, t, text)

    def forward():
        with torch.no_grad(), mixed:
            return finished(velocity(teacher, x, 0.5, text))

    def generator():
        with mixed:
            samples, t = x0(nets["generator"], torch.randn_like(x), 1.0, text), 0.5
            with torch.no_grad():
                x_t = (1 - t) * samples + t * torch.randn_like(samples)
                fake = x0(nets["fake_score"], x_t, t, text)
                cond = x0(teacher, x_t, t, text)
                uncond = x0(teacher, x_t, t, torch.zeros_like(text))
                real = uncond + GUIDANCE * (cond - uncond)
                scale = (samples - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
                grad = (fake - real) / scale
            loss = 0.5 * torch.nn.functional.mse_loss(samples, (samples - grad).detach())
        update("generator", loss)

    def critic():
        with mixed:
            with torch.no_grad():
                samples, t = x0(nets["generator"], torch.randn_like(x), 1.0, text), 0.5
                eps = torch.randn_like(samples)
                x_t = (1 - t) * samples + t * eps
            raw = velocity(nets["fake_score"], x_t, t, text)
            loss = torch.nn.functional.mse_loss(raw, eps - samples)
        update("fake_score", loss)

    def update(role, loss):
        adams[role].zero_grad()
        loss.backward()
        adams[role].step()
        finished()

    def finished(out=None):
        if device == "cuda":
            torch.cuda.synchronize()
        return out

    return {"forward": forward, "generator": generator, "critic": critic}, state


# Forward passes that each program's FLOPs are; a backward pass is two. What is computed again for
# the backward pass does not count.
PASSES = {"forward": 1, "generator": 1 + 1 + 2 + 2, "critic": 1 + 1 + 2}


def forward_flops(config, tokens, text):
    """FLOPs of one forward pass: weights of the layers, self- and cross-attention."""
    c = config
    own = 2 * tokens * (6 * c.dim**2 + 2 * c.dim * c.ffn) + 2 * text * 2 * c.dim**2
    return c.depth * (own + 4 * tokens * (tokens + text) * c.dim)


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def require_pytorch(named):
    """Ends the process where PyTorch, beside which these programs are timed, is missing."""
    if named and not all(map(importlib.util.find_spec, ("torch", "diffusers"))):
        sys.exit(f"error: {', '.join(named)}: pip install torch diffusers, or leave them out")


def main(_):
    require_pytorch(FLAGS.only or PASSES)
    import torch

    torch.set_num_threads(FLAGS.threads)
    rng, tokens = np.random.default_rng(0), FLAGS.frames * (SIDE // 2) ** 2
    x = jnp.asarray(rng.normal(size=(1, FLAGS.frames, SIDE, SIDE, CONFIG.in_channels)), jnp.float32)
    text = jnp.asarray(rng.normal(size=(1, FLAGS.text, CONFIG.text_dim)), jnp.float32)
    their_programs, state = theirs(CONFIG, x, text)
    our_programs = ours(CONFIG, state, x, text)
    named = FLAGS.only or list(our_programs)
    times = {(name, who): [] for name in named for who in ("ours", "PyTorch")}
    for round_ in range(FLAGS.rounds + 1):
        for name in named:
            for who, programs in (("ours", our_programs), ("PyTorch", their_programs)):
                taken = seconds(programs[name])
                if round_:  # the first round compiles
                    times[name, who].append(taken)
    peak = matmul_peak()
    flops = forward_flops(CONFIG, tokens, FLAGS.text)
    print(f"{tokens} tokens; matmul peak {peak / 1e9:.0f} GFLOP/s")
    print(f"{'':<12}{'ours':>10}{'PyTorch':>10}{'ratio':>8}{'of peak':>9}")
    for name in named:
        mine, other = (statistics.median(times[name, who]) for who in ("ours", "PyTorch"))
        rate = PASSES[name] * flops / mine / peak
        print(f"{name:<12}{mine:>8.3f} s{other:>8.3f} s{mine / other:>8.2f}{rate:>9.0%}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
