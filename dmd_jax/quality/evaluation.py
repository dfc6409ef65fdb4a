"""The rows of a report: a network judged under each of its samplers, beside real images.

All rows of a table are made from the same labels and noise, and stand beside the floor: real images
judged as if they were samples. Imports the rooms below.
"""

import functools
import hashlib
import json
import logging

import jax

from dmd_jax import data, weights
from dmd_jax.devices.disk import write_text
from dmd_jax.quality import report
from dmd_jax.quality.features import SHIPPED, load_features
from dmd_jax.quality.judge import Judge
from dmd_jax.rollouts import samplers

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
