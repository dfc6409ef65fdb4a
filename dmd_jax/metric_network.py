"""Trains the classifier in whose features quality is measured, and writes its card.

    python -m dmd_jax.metric_network --name=FD-MNIST64 --out=dmd_jax/assets/mnist_metric.safetensors

It learns from the train split alone. The test split is read once, after the last step, for the
accuracy in the card. `--data` names another data set.
"""

import shlex
import sys

import absl.logging
from absl import app, flags

from dmd_jax.data import load
from dmd_jax.devices.disk import check_file, local_path
from dmd_jax.devices.precision import use_float32_products
from dmd_jax.quality import metric_network

FLAGS = flags.FLAGS


def define_flags():
    flags.DEFINE_string("out", None, "The file, *.safetensors; the card is written beside it.")
    flags.DEFINE_string("data", "mnist5k", "The TFDS data set to learn from.")
    flags.DEFINE_string("data_dir", None, "Directory of prepared data sets; default: that of TFDS.")
    flags.DEFINE_string("name", None, "Name of the distance; FD-DATA-FEATURES if not given.")
    flags.DEFINE_integer("steps", 4000, "Steps of the optimizer.", lower_bound=1)
    flags.DEFINE_integer("batch", 50, "Images per step.", lower_bound=1)
    flags.DEFINE_integer(
        "seed",
        0,
        "Seed of the weights, the batches and the augmentation.",
        lower_bound=0,
        upper_bound=2**32 - 1,
    )
    flags.mark_flag_as_required("out")


def main(argv):
    if argv[1:]:
        sys.exit(f"error: unknown argument {argv[1]!r}; options start with --")
    if not FLAGS["verbosity"].present:
        absl.logging.set_verbosity(absl.logging.WARNING)
    use_float32_products("float32")
    try:  # what would otherwise fail after the training
        out = local_path(FLAGS.out)
        if out.suffix != ".safetensors":
            raise ValueError(f"--out={out}: the ending must be .safetensors")
        check_file(out)
        train, test = (load(FLAGS.data, split, FLAGS.data_dir) for split in ("train", "test"))
        if FLAGS.batch > len(train):
            raise ValueError(f"--batch={FLAGS.batch}: there are {len(train)} images")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    card = metric_network.write(
        out,
        train,
        test,
        name=FLAGS.name,
        command=shlex.join(["python", "-m", "dmd_jax.metric_network", *sys.argv[1:]]),
        steps=FLAGS.steps,
        batch=FLAGS.batch,
        seed=FLAGS.seed,
    )
    print(card)


if __name__ == "__main__":
    define_flags()
    app.run(main)
