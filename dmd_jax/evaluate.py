"""Quality of a checkpoint in numbers and pictures.

python -m dmd_jax.evaluate --checkpoint=runs/dmd/generator.safetensors
python -m dmd_jax.evaluate --checkpoint=mnist_teacher --steps=50,16,8,4 --guidance=2 --store
"""

import json
import sys
from pathlib import Path

from absl import app, flags

from dmd_jax import data, weights
from dmd_jax.devices import cores
from dmd_jax.devices.disk import check_writable
from dmd_jax.quality import report
from dmd_jax.quality.evaluation import data_judge, real_row, teacher_rows
from dmd_jax.quality.features import SHIPPED
from dmd_jax.rollouts import samplers

FLAGS = flags.FLAGS


def define_flags():
    flags.DEFINE_string("checkpoint", None, "A safetensors file, or the name of a shipped one.")
    flags.DEFINE_list(
        "steps", None, "Numbers of steps to judge it in; the checkpoint's own if none."
    )
    flags.DEFINE_list("guidance", None, "Guidance weights of a teacher, each judged; 1 is none.")
    flags.DEFINE_float("shift", None, "Time shift; the checkpoint's own if not given.")
    flags.DEFINE_integer("num", 2_000, "Samples to judge.")
    flags.DEFINE_string("data", "mnist5k", "The TFDS data set to judge against.")
    flags.DEFINE_string("data_dir", None, "Where TFDS keeps it; its own default if not given.")
    flags.DEFINE_string(
        "features", SHIPPED, "The feature network to judge with: a file, or shipped."
    )
    flags.DEFINE_string("out", None, "Also write the rows here, as JSON.")
    flags.DEFINE_bool("store", False, "Keep a teacher's rows beside its file, for every later run.")
    flags.mark_flag_as_required("checkpoint")


def main(argv):
    del argv
    try:
        with cores.shared(samplers.BATCH):
            judge_checkpoint()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


def judge_checkpoint():
    """Prints the table of --checkpoint, and keeps it where the flags say so."""
    path = weights.find(FLAGS.checkpoint)
    ways = [
        samplers.sampler_for(path, steps=steps, guidance=guidance, shift=FLAGS.shift)
        for guidance in _numbers("guidance", float)
        for steps in _numbers("steps", int)
    ]
    source = data.load(FLAGS.data, "test", FLAGS.data_dir)
    source.require_fit(f"--checkpoint={path}", weights.abstract(path).net.config)
    if FLAGS.out:
        check_writable(Path(FLAGS.out).parent)
    if FLAGS.store:
        check_writable(path.parent)
    judge = data_judge(FLAGS.data, FLAGS.data_dir, FLAGS.features)
    real = real_row(judge, FLAGS.num)  # before any sampling: refuses a --num that will not do
    beside = path.with_suffix(".rows.json") if FLAGS.store else None
    table = teacher_rows(path, ways, judge, FLAGS.num, recompute=True, store=beside)
    table = [real, *table]
    print(report.markdown(table, judge.name))
    if FLAGS.out:
        Path(FLAGS.out).write_text(json.dumps(table, indent=1) + "\n")


def _numbers(flag, kind):
    """The numbers of a flag, with commas between them; None alone where it was not given."""
    texts = FLAGS[flag].value or ()
    try:
        return [kind(text) for text in texts] or [None]
    except ValueError:
        raise ValueError(f"--{flag}={','.join(texts)}: not numbers with commas between") from None


if __name__ == "__main__":
    define_flags()
    app.run(main)
