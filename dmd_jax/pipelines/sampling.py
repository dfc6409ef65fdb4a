"""Samples from a checkpoint: its denoiser on the mesh, and videos of prompts.

    for video in sampling.sample_videos("student.safetensors", ["waves at night"]):
        save_video("waves.mp4", video)

Imports `wan`, `digits` and the rooms below.
"""

import itertools
from collections.abc import Iterator, Sequence
from os import PathLike

import jax
import numpy as np

from dmd_jax import weights
from dmd_jax.devices.disk import local_path
from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.models.experts import combine
from dmd_jax.models.wan import WanConfig
from dmd_jax.pipelines import digits, wan
from dmd_jax.rollouts.samplers import CAUSAL, draw, require_blocks, sampler_for
from dmd_jax.weights import parts


def network_config(checkpoint: str | PathLike, boundary: float | None = None):
    """The config of the network at `checkpoint`; reads headers only.

    Args:
        checkpoint, boundary: as for `load_denoiser`.

    Raises:
        FileNotFoundError, ValueError: as `load_denoiser`.
    """
    wanted = _parts(checkpoint, boundary)
    config, *_ = (weights.abstract(checkpoint, part=part).net.config for part in wanted)
    return config


def video_config(checkpoint: str | PathLike, boundary: float | None = None) -> WanConfig:
    """`network_config` of a network of videos; ValueError for any other."""
    config = network_config(checkpoint, boundary)
    if not isinstance(config, WanConfig):
        raise ValueError(f"{checkpoint} is a network of images: it takes no prompts")
    return config


def load_denoiser(
    checkpoint: str | PathLike, *, boundary: float | None = None, dtype: str = "float32"
) -> Denoiser:
    """The Denoiser of a checkpoint, on the current mesh (`jax.set_mesh`) or the first device.

    Args:
        checkpoint: a file, a folder, or a name on the Hugging Face hub, as for `weights.denoiser`.
        boundary: of Wan 2.2's pair of experts, the time in [0, 1] from which on the high-noise
            expert is called; None for a single network.
        dtype: in which the network computes, "float32" or "bfloat16".

    Raises:
        FileNotFoundError, ValueError: of `weights.denoiser`; or a pair without a boundary, or one
            expert of it is missing.
    """
    mesh, denoisers = jax.sharding.get_mesh(), []
    for part in _parts(checkpoint, boundary):
        shardings = None
        if not mesh.empty:
            abstract = weights.abstract(checkpoint, part=part, dtype=dtype)
            shardings = weights.shardings(abstract, [abstract], mesh)
        denoisers.append(weights.denoiser(checkpoint, part=part, shardings=shardings, dtype=dtype))
    return denoisers[0] if len(denoisers) == 1 else combine(denoisers, (boundary,))


def sample_videos(
    checkpoint: str | PathLike,
    prompts: Sequence[str],
    *,
    steps: int | None = None,
    guidance: float | None = None,
    shift: float | None = None,
    solver: str | None = None,
    negative: str = "",
    images: Sequence[str | PathLike] | None = None,
    pipeline: str | None = None,
    boundary: float | None = None,
    num_frames: int = 81,
    height: int = 480,
    width: int = 832,
    seed: int = 0,
    batch: int = 1,
    dtype: str = "float32",
) -> Iterator[np.ndarray]:
    """Samples a video for each prompt, on the current mesh (`jax.set_mesh`) or the first device.

    Everything is checked, and prompts are embedded, before this function returns; sampling starts
    with the first video that is taken from the result.

    Args:
        checkpoint: a student or teacher of videos, as for `load_denoiser`.
        prompts: N texts.
        steps, guidance, shift, solver: as for `samplers.sampler_for`.
        negative: the negative prompt, the unconditional input of guidance.
        images: files of first frames, one for all videos or one for each; None for text alone.
        pipeline: the checkpoint that has VAE, text encoder and tokenizer; `checkpoint` if None.
            Networks of digits need none, and their videos have a fixed size.
        boundary: as for `load_denoiser`.
        num_frames, height, width: size of the videos in pixels.
        seed: of the noise; that of video i does not depend on `batch`.
        batch: videos in one call.
        dtype: in which the network computes and the text encoder is stored.

    Returns:
        An iterator of N videos, uint8 [T, H, W, 3], in the order of the prompts.

    Raises:
        FileNotFoundError, ValueError: something is missing, or does not fit together.
        ImportError: an optional library is missing.
    """
    options = dict(steps=steps, guidance=guidance, shift=shift, solver=solver)
    sampler = sampler_for(checkpoint, **options)
    config = video_config(checkpoint, boundary)
    if isinstance(sampler, CAUSAL) and (images is not None or boundary is not None):
        raise ValueError(
            f"{checkpoint} is causal: one network makes its videos, of prompts alone; drop "
            "--images and --boundary"
        )
    around = pipeline_around(checkpoint, pipeline, (num_frames, height, width), dtype)
    require_blocks("the latents of the video", around.sample_shape[0], sampler)
    frames = None if images is None else wan.first_frames(images, len(prompts), height, width)
    cond, uncond = around.conditions(prompts, negative, config, frames)
    denoiser = load_denoiser(checkpoint, boundary=boundary, dtype=dtype)
    if isinstance(cond, wan.Start):
        denoiser = wan.Continuation(denoiser)
    latents = draw(denoiser, sampler, cond, uncond, around.sample_shape, seed, batch=batch)
    return itertools.chain.from_iterable(map(around.frames, latents))


def _parts(checkpoint, boundary):
    """The transformers of a checkpoint: its only one, or the pair of Wan 2.2."""
    if boundary is not None:
        return "transformer", "transformer_2"
    root = local_path(checkpoint)
    if any((root / name).is_dir() for name in parts.SUBFOLDERS["transformer_2"]):
        raise ValueError(
            f"{root} holds a pair of transformers: give the time that divides them, --boundary"
        )
    return ("transformer",)


def pipeline_around(checkpoint, pipeline, size, dtype, *, keep_text_encoder=False):
    """The DigitsPipeline or WanPipeline around the network at `checkpoint`.

    Args:
        checkpoint, pipeline, dtype: as for `sample_videos`.
        size: (frames, height, width) of the videos in pixels.
        keep_text_encoder: as for `WanPipeline`.

    Raises:
        FileNotFoundError, ValueError: a part is missing, or the size does not fit it.
    """
    if (notes := weights.notes(checkpoint)).get("data") in digits.DATA:
        return digits.DigitsPipeline(notes)
    if pipeline is None and local_path(checkpoint).is_file():
        raise ValueError(
            f"{checkpoint} is a transformer alone: name with --pipeline the checkpoint that has "
            "its VAE, text encoder and tokenizer"
        )
    return wan.WanPipeline(str(pipeline or checkpoint), *size, dtype, keep_text_encoder)
