"""Computed once before training: embeddings of prompts, and latents of videos.

Training then needs neither a text encoder nor a video encoder. Both functions write folders that
`dmd_jax.data` reads, and resume where an interrupted call stopped. Imports this room's
prompts, clips, text and video, and the rooms below.
"""

import functools
import hashlib
import json
import time
from collections.abc import Callable
from os import PathLike

from dmd_jax import weights
from dmd_jax.data import embeddings, latents, to_float
from dmd_jax.devices.disk import check_writable, local_path
from dmd_jax.devices.paths import named_leaves
from dmd_jax.pipelines import clips, text, wan
from dmd_jax.pipelines.prompts import embed, read_prompts
from dmd_jax.pipelines.video import read_video
from dmd_jax.weights import parts


def embed_prompts(
    prompts: str | PathLike,
    checkpoint: str | PathLike,
    out: str | PathLike,
    *,
    tokenizer: str | PathLike | None = None,
    negative: str = "",
    batch: int = 8,
    length: int = 512,
) -> embeddings.Embeddings:
    """Embeds the prompts of a file into a folder.

    Args:
        prompts: a text file, one prompt a line; or a folder of videos with captions.
        checkpoint: a Wan checkpoint or its text encoder, as for `weights.load`.
        out: the folder of the embeddings.
        tokenizer: the tokenizer, or a checkpoint that has it; that of `checkpoint` if None.
        negative: the negative prompt, the unconditional input of guidance.
        batch: prompts in one call of the text encoder.
        length: tokens of an embedding, zeros behind the end of the prompt.

    Raises:
        FileNotFoundError, ValueError: something is missing or damaged, or `out` holds other
            embeddings or cannot be written to.
        ImportError: an optional library is missing.
    """
    texts, out = read_prompts(prompts), local_path(out)
    check_writable(out)
    root = parts.companion(tokenizer or checkpoint, text.FOLDERS[1:])
    tokenize = text.Tokenizer(root, length)
    net = weights.load(checkpoint, dtype="bfloat16", part="text_encoder")
    encoder = weights.digest(named_leaves(net).items(), tokenize.path.read_bytes())
    encode = functools.partial(embed, net, tokenize, batch)
    source = f"text encoder {encoder}"
    embeddings.write(out, texts, negative, encode, length, net.config.dim, source=source)
    return embeddings.Embeddings(out)


def encode_videos(
    videos: str | PathLike,
    checkpoint: str | PathLike,
    embedded: str | PathLike,
    out: str | PathLike,
    *,
    num_frames: int = 81,
    height: int = 480,
    width: int = 832,
    fps: float = 16,
    progress: Callable[[str], None] = lambda line: None,
) -> latents.Latents:
    """Encodes a folder of videos with a VAE into a folder of latents.

    Args:
        videos: a folder of videos with captions (`clips.captioned`). The beginning of each is read.
        checkpoint: a Wan checkpoint or its VAE, as for `weights.load`.
        embedded: the folder that `embed_prompts` wrote for the captions.
        out: the folder of the latents.
        num_frames, height, width: size of a video in pixels; it is scaled and cropped.
        fps: frames per second to read at: 16 for most Wans, 24 for 2.2's 5B.
        progress: is called with a line of text after each video.

    Raises:
        FileNotFoundError, ValueError: something is missing, damaged or too small, or `out` holds
            other latents or cannot be written to.
        ImportError: an optional library is missing.
    """
    root, out = local_path(videos), local_path(out)
    captioned = clips.captioned(root)
    rows = _caption_rows(captioned, embeddings.Embeddings(local_path(embedded)), videos)
    around = wan.WanPipeline(str(checkpoint), num_frames, height, width)
    paths, size = [path for path, _ in captioned], dict(height=height, width=width)
    clips.require_clips(paths, frames=num_frames, fps=fps, **size)
    check_writable(out)

    def encode(numbered):
        number, path = numbered
        start = time.time()
        video = read_video(path, frames=num_frames, fps=fps, **size)
        [latent] = around.encode(to_float(video)[None])
        progress(f"video {number} of {len(paths)}, {time.time() - start:.1f} s: {path}")
        return latent

    listed = [
        (path.relative_to(root).as_posix(), path.stat().st_size, row)
        for path, row in zip(paths, rows, strict=True)
    ]
    source = {
        "vae": weights.digest(named_leaves(around.vae).items()),
        "videos": hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16],
        "fps": fps,
    }
    numbered = zip(enumerate(paths, 1), rows, strict=True)
    latents.write(out, numbered, encode, around.sample_shape, source=source)
    return latents.Latents(out)


def _caption_rows(captioned, texts, folder):
    """The row of each video's caption in `texts`; ValueError where one is not embedded."""
    rows = {prompt: row for row, prompt in enumerate(texts.prompts)}
    if absent := [path for path, caption in captioned if caption not in rows]:
        raise ValueError(
            f"{texts.path} lacks the captions of {len(absent)} of {len(captioned)} videos, as of "
            f"{absent[0]}: embed them with `python -m dmd_jax.embed --prompts={folder} ...`"
        )
    return [rows[caption] for _, caption in captioned]
