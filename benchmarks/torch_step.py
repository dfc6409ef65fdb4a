"""The train step of `configs/dmd.py` in PyTorch, on our weights: what train_step.py compares with.

    step = TorchStep(run, nets, compiled=False)
    step(update_generator=True)

A plain program of its kind: the same network, rollout, guided teacher, fake score, DMD gradient,
AdamW behind a clipped gradient norm, and moving average, in float32. Noise and times come from
PyTorch's own generator. `compiled` gives every network to torch.compile, forward and backward.
"""

import copy
import math
import random
import re
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dmd_jax.devices.paths import path_name


class Block(nn.Module):
    """A layer of `models.dit`: tokens [B, L, D], modulation [B, 6, D]."""

    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.query_norm, self.key_norm = (nn.RMSNorm(dim // heads, eps=1e-6) for _ in range(2))
        self.out = nn.Linear(dim, dim)
        self.gate, self.up = nn.Linear(dim, hidden), nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)
        self.offset = nn.Parameter(torch.zeros(6, dim))

    def forward(self, x, modulation):
        parts = (modulation + self.offset).unsqueeze(2).unbind(1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        x = x + gate1 * self.attend(_norm(x) * (1 + scale1) + shift1)
        y = _norm(x) * (1 + scale2) + shift2
        return x + gate2 * self.down(F.silu(self.gate(y)) * self.up(y))

    def attend(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.query_norm(q), self.key_norm(k)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _norm(x):
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


class DiT(nn.Module):
    """`models.dit.DiT` of a DiTConfig; the names of its parameters are ours."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        pixels, tokens = c.patch**2 * c.channels, (c.image_size // c.patch) ** 2
        self.patch = nn.Linear(pixels, c.dim)
        self.position = nn.Parameter(torch.zeros(tokens, c.dim))
        self.label = nn.Embedding(c.num_classes + 1, c.dim)
        self.time_mlp = nn.ModuleDict(
            {"up": nn.Linear(256, c.dim), "down": nn.Linear(c.dim, c.dim)}
        )
        self.modulation = nn.Linear(c.dim, 6 * c.dim)
        hidden = c.hidden or 32 * round(c.dim / 12)
        self.blocks = nn.ModuleList(Block(c.dim, c.heads, hidden) for _ in range(c.depth))
        self.head_modulation = nn.Linear(c.dim, 2 * c.dim)
        self.head = nn.Linear(c.dim, pixels)

    def forward(self, x, t, label):
        """x [B, H, W, C], t [B] in 0..1000, label [B] -> [B, H, W, C]."""
        size, p = x.shape[1] // self.config.patch, self.config.patch
        x = x.unflatten(1, (size, p)).unflatten(3, (size, p)).transpose(2, 3)
        x = self.patch(x.flatten(3).flatten(1, 2)) + self.position
        frequencies = torch.exp(-math.log(1e4) * torch.arange(128) / 128)
        angles = t[:, None] * frequencies
        time = torch.cat([angles.cos(), angles.sin()], -1)
        time = self.time_mlp["down"](F.silu(self.time_mlp["up"](time)))
        condition = F.silu(time + self.label(label))
        modulation = self.modulation(condition).unflatten(-1, (6, -1))
        for block in self.blocks:
            x = block(x, modulation)
        shift, scale = self.head_modulation(condition)[:, None].chunk(2, -1)
        x = self.head(_norm(x) * (1 + scale) + shift)
        x = x.unflatten(1, (size, size)).unflatten(3, (p, p, -1)).transpose(2, 3)
        return x.reshape(len(x), size * p, size * p, -1)


def from_ours(net):
    """A DiT with the weights of one of ours, whose layers are stacked and matrices [in, out]."""
    state = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(net):
        name, array = path_name(path), np.array(leaf)
        if name.endswith("kernel"):
            array = array.swapaxes(-1, -2)
        name = re.sub("(kernel|embedding|scale)$", "weight", name).replace("/", ".")
        if name.startswith("blocks."):
            for layer, part in enumerate(array):
                state[name.replace("blocks", f"blocks.{layer}", 1)] = torch.tensor(part)
        else:
            state[name] = torch.tensor(array)
    ported = DiT(net.config)
    ported.load_state_dict(state)
    return ported


def require_same(run, denoiser, tolerance=1e-5):
    """Stops where the port's forward or backward pass is not ours to float32 rounding."""
    rng, size = np.random.default_rng(0), run.config.batch_size
    x = rng.standard_normal((size, *run.method.sample_shape), np.float32)
    t, labels = rng.uniform(0, 1000, size).astype(np.float32), np.arange(size) % 10

    def square(net):
        out = net(x, t, labels)
        return jnp.mean(jnp.square(out)), out

    (_, ours), gradient = jax.jit(jax.value_and_grad(square, has_aux=True))(denoiser.net)
    port = from_ours(denoiser.net)
    out = port(*map(torch.tensor, (x, t, labels)))
    out.square().mean().backward()
    pairs = {
        "output": (out.detach(), ours),
        "gradient of position": (port.position.grad, gradient.position[...]),
        "gradient of qkv": (port.blocks[0].qkv.weight.grad.T, gradient.blocks.qkv.kernel[0]),
    }
    for name, (theirs, wanted) in pairs.items():
        wanted = np.asarray(wanted)
        error = np.abs(theirs.numpy() - wanted).max() / np.abs(wanted).max()
        print(f"PyTorch against ours, {name}: largest difference {error:.1e} of the largest value")
        if error > tolerance:
            raise SystemExit(f"the port is another network: {error:.1e} is above {tolerance:.0e}")


class TorchStep:
    """The step, with networks, optimizers and average as its state.

    Args:
        run: the resolved run, of method DMD with flow matching, a velocity and AdamW.
        nets: our {"generator", "fake_score", "teacher"}, whose weights it starts from.
        compiled: call torch.compile on every network.
    """

    def __init__(self, run, nets, *, compiled):
        self.method, self.batch_size, self.ema_decay = (
            run.method,
            run.config.batch_size,
            run.ema.decay,
        )
        self.num_classes = run.source.num_classes
        self.nets = {role: from_ours(denoiser.net) for role, denoiser in nets.items()}
        self.nets["teacher"].requires_grad_(False)
        self.average = copy.deepcopy(self.nets["generator"]).requires_grad_(False)
        self.optimizers = {
            role: self._adamw(role, run.config[role].optimizer) for role in run.method.trainable
        }
        self.clip = 10.0
        self.draw = random.Random(0)
        if compiled:
            for net in self.nets.values():
                net.compile(dynamic=False)

    def _adamw(self, role, spec):
        rate, betas = spec.learning_rate, (spec.b1, spec.b2)
        return torch.optim.AdamW(self.nets[role].parameters(), rate, betas, weight_decay=0.0)

    def __call__(self, *, update_generator):
        labels = torch.randint(self.num_classes, (self.batch_size,))
        with torch.no_grad():
            x, t = self.rollout(labels)
        if update_generator:
            x0 = self.x0("generator", x, t, labels)
            x0.backward(self.gradient(x0.detach(), labels))
            self.update("generator")
            pairs = zip(self.average.parameters(), self.nets["generator"].parameters(), strict=True)
            with torch.no_grad():
                for average, weight in pairs:
                    average.lerp_(weight, 1.0 - self.ema_decay)
            x0 = x0.detach()
        else:
            with torch.no_grad():
                x0 = self.x0("generator", x, t, labels)
        x_t, t, eps = self.diffuse(x0)
        F.mse_loss(self.nets["fake_score"](x_t, 1000 * t, labels), eps - x0).backward()
        self.update("fake_score")

    def x0(self, role, x_t, t, labels):
        return x_t - t.view(-1, 1, 1, 1) * self.nets[role](x_t, 1000 * t, labels)

    def rollout(self, labels):
        """(input, time) of the generator's last call, by backward simulation."""
        times = self.method.times[:: self.draw.choice(self.method.strides)]
        last = self.draw.random() < self.method.last_step_share
        exit_step = len(times) - 1 if last else self.draw.randrange(len(times))
        x = torch.randn(self.batch_size, *self.method.sample_shape)
        for time, after in pairwise(times[: exit_step + 1]):
            x0 = self.x0("generator", x, torch.full((self.batch_size,), time), labels)
            x = (1 - after) * x0 + after * torch.randn_like(x0)
        return x, torch.full((self.batch_size,), times[exit_step])

    def diffuse(self, x0):
        t = torch.rand(self.batch_size).clamp(*self.method.clip)
        eps, shaped = torch.randn_like(x0), t.view(-1, 1, 1, 1)
        return (1 - shaped) * x0 + shaped * eps, t, eps

    @torch.no_grad()
    def gradient(self, x0, labels):
        """The distribution-matching gradient at x0, over the number of elements."""
        x_t, t, _ = self.diffuse(x0)
        none = torch.full_like(labels, self.num_classes)
        both = self.x0(
            "teacher", torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([labels, none])
        )
        cond, uncond = both.chunk(2)
        real = uncond + self.method.guidance * (cond - uncond)
        fake = self.x0("fake_score", x_t, t, labels)
        return (fake - real) / (x0 - real).abs().mean((1, 2, 3), keepdim=True) / x0.numel()

    def update(self, role):
        weights, optimizer = self.nets[role].parameters(), self.optimizers[role]
        norm = nn.utils.clip_grad_norm_(weights, self.clip)
        if torch.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad()
