"""The pipeline of Wan: prompts and images to conditions of the transformer, latents to frames.

The text encoder is in memory only while prompts are embedded. Imports prompts, text and video
beside it, and the rooms below.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dmd_jax import weights
from dmd_jax.data import to_float, to_uint8
from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.models.wan import Conditions
from dmd_jax.models.wan_vae import decode_step
from dmd_jax.pipelines import text, video
from dmd_jax.pipelines.prompts import embed
from dmd_jax.weights import parts


class Start(NamedTuple):
    """Conditions of a video with a given first frame: see `Continuation`."""

    text: jax.Array  # [B, L, D]
    frame: jax.Array  # [B, 1, H, W, C]: latents


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Continuation:
    """A text-to-video Denoiser with a given first frame, clean and at time 0 (Wan 2.2's 5B).

    It is called as a Denoiser, with a `Start` as conditions.
    """

    denoiser: Denoiser

    @property
    def schedule(self):
        return self.denoiser.schedule

    def __call__(self, x_t, t, cond):
        x_t = x_t.at[:, :1].set(cond.frame)
        times = jnp.broadcast_to(t[:, None], x_t.shape[:2]).at[:, :1].set(0.0)
        return self.denoiser(x_t, times, cond.text).at[:, :1].set(cond.frame)


@dataclasses.dataclass(frozen=True)
class WanPipeline:
    """The VAE, text encoder and tokenizer of a Wan checkpoint.

    Attributes:
        path: a folder of either layout, or a name on the Hugging Face hub.
        num_frames, height, width: of the videos, in pixels.
        dtype: of the text encoder's weights; those of the VAE keep their stored dtype.
        keep_text_encoder: whether the text encoder stays in memory, for prompts that come later.

    Raises:
        ValueError: the VAE's strides do not divide the number of frames or the sides.
    """

    path: str
    num_frames: int = 81
    height: int = 480
    width: int = 832
    dtype: str = "bfloat16"
    keep_text_encoder: bool = False

    def __post_init__(self):
        c = self._vae_config
        side = 2 * c.space_factor
        if self.height % side or self.width % side or (self.num_frames - 1) % c.time_factor:
            raise ValueError(
                f"{self.num_frames} frames of {self.height}x{self.width}: this VAE takes "
                f"{c.time_factor} k + 1 frames, and sides that {side} divides"
            )

    @functools.cached_property
    def _vae_config(self):
        return weights.abstract_part(self.path, part="vae").config

    @property
    def sample_shape(self):
        """(F, H, W, C) of the latents."""
        c = self._vae_config
        return (
            (self.num_frames - 1) // c.time_factor + 1,
            self.height // c.space_factor,
            self.width // c.space_factor,
            c.channels,
        )

    @functools.cached_property
    def vae(self):
        return weights.load(self.path, part="vae")

    def conditions(self, prompts, negative, config, images=None, *, batch=8):
        """(cond, uncond) of N prompts, as `samplers.draw` takes them.

        Args:
            prompts: N strings.
            negative: the negative prompt, the unconditional input of guidance.
            config: the WanConfig of the network, which determines how it takes an image.
            images: uint8 [N, height, width, 3], the first frames; None for text alone.
            batch: prompts in one call of the text encoder.

        Raises:
            ValueError: the network needs images and got None, or these parts do not fit it.
        """
        self._require_fit(config, images)
        features = clip_features(self.path, images) if config.image_dim else None
        rows = self._embedded([*prompts, negative], batch)
        cond, uncond = rows[:-1], np.broadcast_to(rows[-1], rows[:-1].shape)
        if images is None:
            return cond, uncond
        if config.in_channels == config.out_channels:
            frame = self.encode(to_float(images)[:, None])
            return Start(cond, frame), Start(uncond, frame)
        frames = self._frames_to_fill(to_float(images))
        return Conditions(cond, frames, features), Conditions(uncond, frames, features)

    def _require_fit(self, config, images):
        """Refuses a network that these parts do not fit, before weights are read."""
        if images is None and config.in_channels > config.out_channels:
            raise ValueError("this is an image-to-video network: give it --images")
        text_dim = weights.abstract_part(self.path, part="text_encoder").config.dim
        wanted, found = (config.out_channels, config.text_dim), (self.sample_shape[-1], text_dim)
        if wanted != found:
            raise ValueError(
                f"the network generates latents of {wanted[0]} channels and reads texts of width "
                f"{wanted[1]}; VAE and text encoder of {self.path} have {found[0]} and {found[1]}: "
                "name with --pipeline the checkpoint that it was trained from"
            )

    def _embedded(self, prompts, batch):
        """[N, L, D] in `dtype`; see `keep_text_encoder`."""
        tokenizer = text.Tokenizer(parts.companion(self.path, text.FOLDERS[1:]))
        encoder = self._text_encoder if self.keep_text_encoder else self._load_text_encoder()
        rows = embed(encoder, tokenizer, batch, prompts)
        padded = np.zeros((len(rows), tokenizer.length, rows[0].shape[-1]), jnp.dtype(self.dtype))
        for place, row in zip(padded, rows, strict=True):
            place[: len(row)] = row
        return padded

    @functools.cached_property
    def _text_encoder(self):
        return self._load_text_encoder()

    def _load_text_encoder(self):
        return weights.load(self.path, self.dtype, part="text_encoder")

    def encode(self, videos):
        """[N, T, H, W, 3] in [-1, 1] -> normalised latents [N, F, h, w, C], one at a time."""
        return np.concatenate([np.asarray(_encode(self.vae, one[None])) for one in videos])

    def _frames_to_fill(self, images):
        """The input of an image-to-video network besides the noise: [N, F, H, W, 4 + C].

        Four mask channels, one for each pixel frame of a latent frame, are 1 where the frame is
        given; C channels are the latents of the image followed by grey frames.
        """
        grey = np.zeros((len(images), self.num_frames - 1, *images.shape[1:]), np.float32)
        latents = self.encode(np.concatenate([images[:, None], grey], axis=1))
        given = np.zeros((*latents.shape[:-1], self._vae_config.time_factor), np.float32)
        given[:, 0] = 1.0
        return np.concatenate([given, latents], axis=-1)

    def frames(self, latents):
        """Decodes latents [N, F, H, W, C]; yields N videos, uint8 [T, H, W, 3]."""
        for one in latents:
            yield self.decoder()(one[None])

    def decoder(self):
        """A function that decodes one video in pieces, in order; it keeps the VAE's caches.

        It takes latents [1, n, H, W, C] and returns uint8 [T, height, width, 3].
        """
        caches = None

        def decode(latents):
            nonlocal caches
            frames = []
            for index in range(latents.shape[1]):
                frame, caches = decode_step(self.vae, latents[:, index : index + 1], caches)
                frames.append(to_uint8(frame[0]))
            return np.concatenate(frames)

        return decode

    def latent_frames(self, frames):
        """How many latent frames a video of so many frames has; the last may be longer."""
        return -(-(frames - 1) // self._vae_config.time_factor) + 1


@jax.jit
def _encode(vae, video):
    return vae.encode(video)


def clip_features(path, images):
    """Image features for Wan 2.1's image-to-video networks: CLIP's last layer but one.

    Args:
        path: a diffusers pipeline folder, with `image_encoder` and `image_processor`.
        images: uint8 [N, H, W, 3].

    Returns:
        float32 [N, 257, 1280].

    Raises:
        ImportError: transformers or torch is not installed; only this function needs them.
    """
    try:
        import torch
        from transformers import CLIPImageProcessor, CLIPVisionModel
    except ImportError as error:
        raise ImportError(
            f"CLIP's features need transformers and torch ({error}): pip install transformers torch"
        ) from error
    folders = "image_processor", "image_encoder"
    roots = [parts.companion(path, (folder,)) for folder in folders]
    processor = CLIPImageProcessor.from_pretrained(roots[0] / folders[0])
    encoder = CLIPVisionModel.from_pretrained(roots[1] / folders[1])
    with torch.no_grad():
        inputs = processor(images=list(images), return_tensors="pt")
        return encoder(**inputs, output_hidden_states=True).hidden_states[-2].float().numpy()


def first_frames(paths, count, height, width):
    """Reads the first frames of `count` videos, scaled and cropped.

    Args:
        paths: one image for all videos, or one for each.

    Returns:
        uint8 [count, height, width, 3].

    Raises:
        ValueError: another number of images, or one that cannot be read.
        FileNotFoundError: an image is missing.
    """
    if len(paths) not in (1, count):
        raise ValueError(f"{len(paths)} images for {count} prompts: give one, or one for each")
    images = [video.read_image(path, height, width) for path in paths]
    return np.stack(images * (count // len(images)))
