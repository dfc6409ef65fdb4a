"""Quality of a checkpoint in numbers and pictures.

    python -m dmd_jax.evaluate --checkpoint=runs/dmd/generator.safetensors
    python -m dmd_jax.evaluate --checkpoint=mnist_teacher --steps=50,16,8,4 --guidance=2 --store

All rows of a table are made from the same labels and noise, and stand beside the floor: real images
judged as if they were samples. Imports the rooms below; `train` uses it at a run's end.
"""

import functools
import hashlib
import json
import logging
import sys
from pathlib import Path

import jax
from absl import app, flags

from dmd_jax import checkpoint, data, report, samplers, weights
from dmd_jax.features import SHIPPED, load_features
from dmd_jax.judge import Judge

log = logging.getLogger(__name__)

REPORT = "report.md"
SEED = 1_000_003  # of the noise of judged samples


@functools.cache
def data_judge(name, data_dir=None, features=SHIPPED):
    """The Judge of a data set: its test split, seen through a feature network.

    Args:
        name, data_dir: as for `data.load`.
        features: a metric network's file or shipped name, or Inception's weights (see
            `features.load_features`).
    """
    test, train = (data.arrays(data.load(name, split, data_dir)) for split in ("test", "train"))
    return Judge(load_features(features), test=test, train=train)


def require_numbers(features, num_classes, **counts):
    """Raises ValueError where so many samples cannot be judged, class by class."""
    least = max(2 * num_classes, features.dim + 1)
    for name, count in counts.items():
        if count % num_classes or count < least:
            raise ValueError(
                f"{name}={count} must be a multiple of the {num_classes} classes, {least} at least "
                f"({features.name} has {features.dim} features)"
            )


def rows(denoiser, ways, judge, num, seed=SEED):
    """Judges a network of images under each sampler of `ways`.

    Returns:
        One dict a sampler: "name", "steps", "calls" (of the network, a sample) and the numbers
        of `Judge`.
    """
    labels = samplers.balanced(num, denoiser.net.config.num_classes)
    table = []
    for sampler in ways:
        numbers = judge(samplers.draw_images(denoiser, sampler, labels, seed), labels)
        log.info("%s in %d steps: %s %.3f", sampler.name, sampler.steps, judge.name, numbers["fd"])
        about = {"name": sampler.name, "steps": sampler.steps, "calls": sampler.calls}
        table.append(about | numbers)
    return table


def real_row(judge, num):
    """The row of real images, judged as if they were `num` samples."""
    return {"name": "real images", "steps": 0, "calls": 0, **judge.floor(num)}


def teacher_rows(path, ways, judge, num, *, recompute=False, store=None):
    """The rows of a teacher: the stored ones, where all that they depend on is unchanged.

    Args:
        path: the teacher's file or shipped name; `<file>.rows.json` beside it is looked at first.
        ways: ManyStep samplers.
        recompute: compute them whatever is stored.
        store: where to keep, and look for, rows that are not beside the teacher; None for nowhere.
    """
    path = weights.find(path)
    common = f"{weights.fingerprint(path)} {judge.fingerprint} {num} {SEED}"
    keys = {sampler: f"{sampler} {_digest(common)}" for sampler in ways}
    stored = _stored_rows(store) | _stored_rows(path.with_suffix(".rows.json"))
    held = {} if recompute else stored
    missing = [sampler for sampler in ways if keys[sampler] not in held]
    if missing:
        log.info("judging the teacher: no rows are stored for %s", missing)
        table = rows(weights.denoiser(path), missing, judge, num)
        held |= dict(zip((keys[sampler] for sampler in missing), table, strict=True))
        if store and jax.process_index() == 0:
            write_text(store, json.dumps(_stored_rows(store) | held, indent=1) + "\n")
    return [held[key] for key in keys.values()]


def _digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _stored_rows(path):
    """{key: row} of a file of rows; {} where there is none that can be read."""
    try:
        return json.loads(path.read_text()) if path else {}
    except (OSError, ValueError):
        return {}


def report_text(title, body):
    """A report as Markdown; its figure is report.png beside it."""
    return f"# {title}\n\n![samples](report.png)\n\n{body}"


def write_report(directory, title, table, pictures, labels, metric):
    """Writes report.json (the rows), report.png (the figure) and report.md."""
    (directory / "report.json").write_text(json.dumps(table, indent=1) + "\n")
    report.figure(directory / "report.png", table, pictures, labels, metric=metric, title=title)
    write_text(directory / REPORT, report_text(title, report.markdown(table, metric)))


def write_text(path, text):
    """Writes a file whole or not at all: what a kill leaves is the old one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


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
        checkpoint.check_writable(Path(FLAGS.out).parent)
    if FLAGS.store:
        checkpoint.check_writable(path.parent)
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
