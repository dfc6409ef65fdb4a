"""Quality of a checkpoint of images in numbers, compared with real images.

python -m dmd_jax.evaluate --checkpoint=runs/dmd/generator.safetensors
python -m dmd_jax.evaluate --checkpoint=mnist_teacher --steps=50,16,8,4 --guidance=2 --store
"""

import dataclasses
import json
import sys

import absl.logging
from absl import app, flags

from dmd_jax import data, weights
from dmd_jax.devices import cores
from dmd_jax.devices.disk import check_file, check_writable, local_path
from dmd_jax.devices.precision import use_float32_products
from dmd_jax.quality import report
from dmd_jax.quality.evaluation import data_judge, real_row, teacher_rows
from dmd_jax.quality.features import SHIPPED, load_features
from dmd_jax.rollouts import samplers

FLAGS = flags.FLAGS


def define_flags():
    flags.DEFINE_string("checkpoint", None, "A safetensors file, or the name of a shipped one.")
    flags.DEFINE_list("steps", None, "Numbers of steps to judge; default: that of the checkpoint.")
    flags.DEFINE_list("guidance", None, "Guidance weights of a teacher to judge; 1 disables it.")
    flags.DEFINE_float("shift", None, "Time shift; default: that of the checkpoint.")
    flags.DEFINE_integer("num", 2_000, "Samples to judge.")
    flags.DEFINE_string("data", "mnist5k", "The TFDS data set to judge against.")
    flags.DEFINE_string("split", "test", "The split to judge against.")
    flags.DEFINE_string("data_dir", None, "Directory of prepared data sets; default: that of TFDS.")
    flags.DEFINE_string("features", SHIPPED, "The feature network: a file, or a shipped name.")
    flags.DEFINE_string("out", None, "Also write the rows here, as JSON.")
    flags.DEFINE_bool("store", False, "Store a teacher's rows in its folder, for later reports.")
    flags.mark_flag_as_required("checkpoint")


def main(argv):
    if not FLAGS["verbosity"].present:
        absl.logging.set_verbosity(absl.logging.WARNING)
    if len(argv) > 1:
        sys.exit(f"error: unknown argument {argv[1]!r}; options start with --")
    use_float32_products("float32")  # the networks of images and of features
    try:
        with cores.shared(samplers.BATCH):
            judge_checkpoint()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


def judge_checkpoint():
    """Prints the table of --checkpoint, and writes it to the files that flags name."""
    path = weights.find(FLAGS.checkpoint)
    ways = [
        dataclasses.replace(
            samplers.sampler_for(path, steps=steps, guidance=guidance, shift=FLAGS.shift),
            name=path.stem,
        )
        for guidance in _numbers("guidance", float)
        for steps in _numbers("steps", int)
    ]
    source = data.load(FLAGS.data, FLAGS.split, FLAGS.data_dir)
    source.require_fit(f"--checkpoint={path}", weights.abstract(path).net.config)
    load_features(FLAGS.features).require_fit(source)
    out = local_path(FLAGS.out) if FLAGS.out else None
    if out:
        check_file(out)
    if FLAGS.store:
        check_writable(path.parent)
    judge = data_judge(FLAGS.data, FLAGS.data_dir, FLAGS.features, split=FLAGS.split)
    real = real_row(judge, FLAGS.num)  # before any sampling: refuses a --num that does not fit
    store = path.with_suffix(".rows.json") if FLAGS.store else None
    table = teacher_rows(path, ways, judge, FLAGS.num, recompute=True, store=store)
    table = [real, *table]
    print(report.markdown(table, judge.name, judge.reference))
    if out:
        out.write_text(json.dumps(table, indent=1) + "\n")


def _numbers(flag, kind):
    """The comma-separated numbers of a flag; [None] where it was not given."""
    texts = FLAGS[flag].value or ()
    try:
        return [kind(text) for text in texts] or [None]
    except ValueError:
        raise ValueError(f"--{flag}={','.join(texts)}: not numbers with commas between") from None


if __name__ == "__main__":
    define_flags()
    app.run(main)
