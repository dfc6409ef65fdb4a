"""Embeds prompts once, so that training needs no text encoder.

    python -m dmd_jax.embed --prompts=prompts.txt --checkpoint=Wan-AI/Wan2.1-T2V-1.3B-Diffusers \
        --out=prompts

With a folder of videos as --prompts, it embeds their captions: see `dmd_jax.encode`. The result is
read by `dmd_jax.data.embeddings.Embeddings`. Started again after an interruption, it resumes.
"""

import logging
import sys

import absl.logging
from absl import app, flags

from dmd_jax.devices.precision import use_float32_products
from dmd_jax.pipelines.precompute import embed_prompts

FLAGS = flags.FLAGS


def define_flags():
    flags.DEFINE_string(
        "prompts", None, "A text file, one prompt a line; or a folder of videos with captions."
    )
    flags.DEFINE_string(
        "checkpoint",
        None,
        "A Wan checkpoint or its text encoder: a folder, a file, a name on the Hugging Face hub.",
    )
    flags.DEFINE_string("out", None, "The folder of the embeddings.")
    flags.DEFINE_string(
        "tokenizer",
        None,
        "The tokenizer, or another checkpoint that has it, where --checkpoint does not.",
    )
    flags.DEFINE_string(
        "negative", "", "The negative prompt. Wan's teachers expect the one of their model card."
    )
    flags.DEFINE_integer("batch", 8, "Prompts in one call of the text encoder.", lower_bound=1)
    flags.DEFINE_integer(
        "length", 512, "Tokens of an embedding, zeros behind the prompt's end.", lower_bound=1
    )
    flags.mark_flags_as_required(["prompts", "checkpoint", "out"])


def main(argv):
    if argv[1:]:
        sys.exit(f"error: unknown argument {argv[1]!r}; options start with --")
    if not FLAGS["verbosity"].present:
        absl.logging.set_verbosity(absl.logging.WARNING)
    logging.getLogger("dmd_jax").setLevel(logging.INFO)
    use_float32_products("float32")  # the text encoder, whatever its weights are stored in
    try:
        result = embed_prompts(
            FLAGS.prompts,
            FLAGS.checkpoint,
            FLAGS.out,
            tokenizer=FLAGS.tokenizer,
            negative=FLAGS.negative,
            batch=FLAGS.batch,
            length=FLAGS.length,
        )
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(f"{len(result)} prompts and the negative one, {list(result.shape)} each: {FLAGS.out}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
