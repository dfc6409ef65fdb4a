"""The published program of Self-Forcing as it is, but tiny, in float32 and on a CPU.

Used by self_forcing_parity.py. Their files are imported from a clone and not changed. What only a
GPU and the published sizes need is replaced from outside:

    flash attention            torch's scaled_dot_product_attention
    from_pretrained            a network of given sizes, then its weights from a file
    30 layers, 12 heads of 128, 1560 tokens a frame, 21 frames     those of the given sizes
    text encoder, VAE, .cuda(), the broadcast of exit steps        nothing
    random draws               given numbers

Gradient checkpointing stays on: without it PyTorch refuses their backward pass, because the caches
are overwritten before it.
"""

import contextlib
import importlib
import itertools
import sys
import types
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from einops import rearrange
from omegaconf import OmegaConf

CONFIGS = "default_config.yaml", "self_forcing_dmd.yaml"


def attention(q, k, v, k_lens=None, **unused):
    """Softmax attention of [B, L, heads, channels] over all keys."""
    if k_lens is not None and (k_lens != k.shape[1]).any():
        raise ValueError(f"{k.shape[1]} keys, of which {k_lens} count: nothing here is padded")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def program(folder):
    """(their module model.dmd, their module utils.wan_wrapper), made fit for a CPU."""
    sys.path.insert(0, str(folder))
    for name in ("wan", "wan.modules", "pipeline", "model"):
        # Without their __init__.py, which imports everything that they have.
        package = types.ModuleType(name)
        package.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = package
    for name in ("tokenizers", "t5", "vae"):
        sys.modules[f"wan.modules.{name}"] = mock.MagicMock()
    training = importlib.import_module("pipeline.self_forcing_training")
    sys.modules["pipeline"].SelfForcingTrainingPipeline = training.SelfForcingTrainingPipeline
    importlib.import_module("wan.modules.model").flash_attention = attention
    importlib.import_module("wan.modules.causal_model").attention = attention
    base = importlib.import_module("model.base")
    base.WanTextEncoder = base.WanVAEWrapper = torch.nn.Identity
    torch.Tensor.cuda = lambda tensor: tensor
    return tuple(map(importlib.import_module, ("model.dmd", "utils.wan_wrapper")))


def to_torch(x):
    """Our [B, F, H, W, C] as their [B, F, C, H, W]."""
    return rearrange(torch.tensor(np.array(x)), "b f h w c -> b f c h w")


def to_numpy(x):
    """Their [B, F, C, H, W] as our [B, F, H, W, C]."""
    return rearrange(x.detach(), "b f c h w -> b f h w c").numpy()


class Published:
    """Their DMD class with three networks, of the settings in configs/self_forcing_dmd.yaml.

    Args:
        folder: the clone, a Path.
        sizes: arguments of their networks.
        files: {"generator" | "real_score" | "fake_score": path}, weights in Self-Forcing's layout.
        frames: of a video.
        tokens: of a frame.
    """

    def __init__(self, folder, sizes, files, *, frames, tokens):
        dmd, wrapper = program(folder)
        self.wrapper = wrapper.WanDiffusionWrapper
        make = classmethod(lambda network, path, **settings: network(**sizes, **settings))
        for network in ("WanModel", "CausalWanModel"):
            getattr(wrapper, network).from_pretrained = make
        settings = (OmegaConf.load(folder / "configs" / name) for name in CONFIGS)
        changed = {
            "mixed_precision": False,
            "gradient_checkpointing": False,  # switched on below
            "num_training_frames": frames,
        }
        self.dmd = dmd.DMD(OmegaConf.merge(*settings, changed), torch.device("cpu"))
        for role, file in files.items():
            network = getattr(self.dmd, role)
            network.load_state_dict(torch.load(file)["generator_ema"])
            network.seq_len = frames * tokens
            # Their switch calls a method of diffusers that refuses their networks today.
            network.model.gradient_checkpointing = True
        self.dmd._initialize_inference_pipeline()
        self._shrink(self.dmd.inference_pipeline, sizes, frames, tokens)

    @staticmethod
    def _shrink(pipeline, sizes, frames, tokens):
        """Gives the caches of their rollout the sizes of the network."""
        heads, layers = sizes["num_heads"], sizes["num_layers"]
        pipeline.num_transformer_blocks, pipeline.frame_seq_length = layers, tokens
        pipeline.kv_cache_size = frames * tokens
        allocate = pipeline._initialize_kv_cache

        def initialize(**settings):
            allocate(**settings)
            for layer in pipeline.kv_cache1:
                for part in ("k", "v"):
                    layer[part] = layer[part][:, :, :heads, : sizes["dim"] // heads].clone()

        pipeline._initialize_kv_cache = initialize

    def rollout(
        self,
        noise,
        text,
        step_noise,
        exits,
        functional,
        *,
        shared=False,
        clean=False,
        constant=False,
    ):
        """Their rollout, its gradient, and (from, to) of the exit step.

        Args:
            noise, text, step_noise: numpy, as of our `self_forcing`.
            exits: exit step of each block.
            functional: the gradient is that of sum(latents * functional).
            shared: their `same_step_across_blocks`.
            clean: mend the context, which gets no noise then.
            constant: mend the caches, which are constants then.

        Returns:
            (latents [B, F, H, W, C], {name: gradient}, (from, to)).
        """
        pipeline = self.dmd.inference_pipeline
        pipeline.same_step_across_blocks = shared
        scheduler, generator = pipeline.scheduler, pipeline.generator
        add_noise = scheduler.add_noise

        def add_no_noise_at_0(x0, eps, t):
            return x0 if clean and not t.any() else add_noise(x0, eps, t)

        def with_constant_cache(*, kv_cache, **inputs):
            for layer in kv_cache if constant else ():
                layer.update(k=layer["k"].detach(), v=layer["v"].detach())
            return generator(kv_cache=kv_cache, **inputs)

        drawn = itertools.chain.from_iterable(
            (*block[:exit_step], block[-1])
            for block, exit_step in zip(step_noise, exits, strict=True)
        )
        with (
            mock.patch.object(
                torch, "randn_like", lambda x: to_torch(next(drawn)).reshape(x.shape)
            ),
            mock.patch.object(pipeline, "generate_and_sync_list", lambda *_, **__: list(exits)),
            mock.patch.object(scheduler, "add_noise", add_no_noise_at_0),
            mock.patch.object(pipeline, "generator", with_constant_cache),
        ):
            latents, *bounds = pipeline.inference_with_trajectory(
                to_torch(noise), prompt_embeds=torch.tensor(text)
            )
        self.dmd.generator.zero_grad()
        (latents * to_torch(functional)).sum().backward()
        return to_numpy(latents), gradients(self.dmd.generator), bounds

    def generator_loss(self, x0, text, null, eps, drawn):
        """Their DMD loss at given latents: (loss, its gradient at x0, times 0 ... 1000 [B]).

        Args:
            x0, eps: numpy [B, F, H, W, C].
            text, null: embeddings of the prompts and of the negative prompt.
            drawn: the integers 0 ... 999 of the samples that the times are computed from.
        """
        x0 = to_torch(x0).requires_grad_()
        with self._draws(eps, drawn):
            loss, log = self.dmd.compute_distribution_matching_loss(
                x0, {"prompt_embeds": torch.tensor(text)}, {"prompt_embeds": torch.tensor(null)}
            )
        loss.backward()
        return loss.item(), to_numpy(x0.grad), log["timestep"][:, 0].numpy()

    def critic_loss(self, x0, text, eps, drawn):
        """Their critic's loss at given latents: (loss, {name: gradient})."""
        self.dmd.fake_score.zero_grad()
        generated = to_torch(x0), None, None, None
        with (
            self._draws(eps, drawn),
            mock.patch.object(self.dmd, "_run_generator", lambda **_: generated),
        ):
            shape = list(generated[0].shape)
            loss, _ = self.dmd.critic_loss(shape, {"prompt_embeds": torch.tensor(text)}, {}, None)
        loss.backward()
        return loss.item(), gradients(self.dmd.fake_score)

    def _draws(self, eps, drawn):
        frames = eps.shape[1]
        times = torch.tensor(drawn)[:, None].expand(-1, frames)
        stack = contextlib.ExitStack()
        stack.enter_context(mock.patch.object(self.dmd, "_get_timestep", lambda *_, **__: times))
        stack.enter_context(mock.patch.object(torch, "randn_like", lambda x: to_torch(eps)))
        return stack

    def velocity_through_x0(self, velocity, x_t, t, dtype):
        """A network's velocity, turned into x0 and back as their critic's loss does.

        Args:
            velocity, x_t: numpy [N, C, H, W].
            t: one time, 0 ... 1000.
            dtype: of the network's output, "bfloat16" in their training.

        Returns:
            (velocity in that dtype, what the loss sees of it).
        """
        v, x_t = (torch.tensor(a).to(getattr(torch, dtype)) for a in (velocity, x_t))
        t = torch.full([len(v)], t)
        x0 = self.dmd.fake_score._convert_flow_pred_to_x0(v, x_t, t)
        seen = self.wrapper._convert_x0_to_flow_pred(self.dmd.scheduler, x0, x_t, t)
        return v.float().numpy(), seen.float().numpy()


def gradients(network):
    """{name without "model.": gradient} of their wrapper around a network."""
    return {name: weight.grad.numpy().copy() for name, weight in network.model.named_parameters()}
