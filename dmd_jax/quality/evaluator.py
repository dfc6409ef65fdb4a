"""Judges one run during training, and writes its report. Imports the rooms below.

A run creates one `Evaluator`. The training loop calls `preview` between steps and `report` at the
end; neither takes a config.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from dmd_jax import weights
from dmd_jax.data import Images, load
from dmd_jax.devices import sharding
from dmd_jax.devices.disk import write_text
from dmd_jax.diffusion.denoiser import Denoiser
from dmd_jax.quality import drift, evaluation, report
from dmd_jax.quality.evaluation import LIMIT, SEED, Evaluation, draw_images
from dmd_jax.quality.features import load_features
from dmd_jax.rollouts import samplers
from dmd_jax.rollouts.samplers import Sampler

REPORT = "report.md"
FIGURE = "report.png"
SETTINGS = "evaluation.json"
SHOWN = 6  # videos of each network in the figures
BEST_LIMIT = 10_000  # training images that the best network of a run is selected against


class Preview(Protocol):
    """What a report reads from a data source, besides what training reads (`data.Source`).

    Attributes:
        columns: number of pictures in a row.
        measures: for data that can measure samples without a feature network, descriptions by the
            name of the number; such data are `Measured`.
    """

    columns: int
    measures: Mapping[str, str]

    def preview_conditions(self) -> tuple[Any, Any]:
        """(conditions, unconditional inputs) of the samples to show."""
        ...

    def pictures(self, x0: np.ndarray) -> np.ndarray:
        """Samples [N, ...] as uint8 pictures [N, H, W, C]."""
        ...


class Measured(Preview, Protocol):
    """Data that measure samples themselves, such as `MovingDigits`."""

    def measured_conditions(self, num: int) -> tuple[np.ndarray, Any, Any]:
        """(rows, conditions, unconditional inputs) of `num` samples to measure."""
        ...

    def measure(self, x0: np.ndarray, rows: np.ndarray) -> dict[str, float]:
        """Numbers by the names of `measures`."""
        ...

    def floor(self, num: int) -> dict[str, float]:
        """The same numbers of real data."""
        ...


class Score(NamedTuple):
    """Numbers of a network during training.

    Attributes:
        numbers: of `Judge`, against the training images.
        judge: changes with everything but the network that the numbers depend on; scores of
            different judges are not comparable.
    """

    numbers: dict[str, float]
    judge: str


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Judges and reports one run. In a job of many processes, all of them make every call.

    Attributes:
        settings: what to judge.
        source: the data that the run trains on; `Images` where `settings.features` names a network.
        samplers: of the trained network; the first is the one used during training.
        teacher_samplers: of the teacher.
        batch: samples per call for sources other than `Images`.
    """

    settings: Evaluation
    source: Preview
    samplers: Sequence[Sampler]
    teacher_samplers: Sequence[Sampler]
    batch: int

    def check(self) -> None:
        """Raises ValueError where the run could not be judged; computes nothing."""
        spec = self.settings
        self._check_by_frame()
        if not spec.features:
            return
        if not isinstance(self.source, Images):
            raise ValueError(
                f"features={spec.features!r} judges images of a named data set, and this run has "
                f"other data: set features=''"
            )
        if spec.split == self.source.split:
            raise ValueError(
                f"split={spec.split!r} is the split that the run learns from and that its best "
                "network is selected against, and a report needs other images. Name another split, "
                "or cut one: config.data.split='train[:90%]', config.evaluate.split='train[90%:]'"
            )
        try:
            features = load_features(spec.features)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"features: {error}") from error
        try:
            features.require_fit(self.source)
            test = load(self.source.name, spec.split, self.source.data_dir)
        except ValueError as error:
            raise ValueError(
                f"features={spec.features!r}, split={spec.split!r}: {error}\n"
                "A run with features='' is not judged"
            ) from error
        counts = {name: getattr(spec, name) for name in ("samples", "num")}
        evaluation.require_numbers(features, self.source.num_classes, **counts)
        evaluation.require_real(features, test, self.source, spec.num)

    def _check_by_frame(self):
        spec, source = self.settings, self.source
        if spec.frames and not hasattr(source, "asked"):
            raise ValueError(f"frames={spec.frames}: {source.name!r} is not measured by frame")
        beside = [self._beside(name, path) for name, path in spec.beside]
        if not spec.frames:
            if beside:
                raise ValueError(f"beside={spec.beside} is in reports by frame alone: set frames")
            return
        for name, path in spec.beside:
            source.require_fit(f"{path} of beside={name!r}", weights.abstract(path).net.config)
        for sampler in (*beside, *self.samplers, *self.teacher_samplers[:1]):
            samplers.require_blocks(f"frames={spec.frames}", spec.frames, sampler)
        names = ["real", *(sampler.name for sampler in self.teacher_samplers[:1])]
        names += [*(name for name, _ in spec.beside), *self._own_names]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"beside: two rows of the report have the name {twice[0]!r}")

    @property
    def _own_names(self):
        """The names of the trained network's rows by frame; with the steps if it has several."""
        several = len(self.samplers) > 1
        return [sampler.title if several else sampler.name for sampler in self.samplers]

    def preview(self, average: Denoiser) -> tuple[np.ndarray, Score | None]:
        """Samples of a network during training, and their score.

        Args:
            average: the network, placed.

        Returns:
            (uint8 [height, width, C], a picture of some samples;
            their score, None where no feature network is named).
        """
        sampler = self.samplers[0]
        if not self.settings.features:
            pictures = self._show(average, sampler, seed=0)
            return report.grid(pictures, self.source.columns), None
        labels = samplers.balanced(self.settings.samples, self.source.num_classes)
        images = draw_images(average, sampler, labels, seed=0)
        judge = self._judge(self.source.split, BEST_LIMIT)
        pictures = images[: len(self.source.preview_conditions()[0])]
        score = Score(
            judge(images, labels), evaluation.digest(f"{judge.fingerprint} {sampler} {len(images)}")
        )
        return report.grid(pictures, self.source.columns), score

    def report(
        self,
        directory: Path,
        title: str,
        trained: Denoiser,
        *,
        teacher: Denoiser | None = None,
        teacher_path: str | None = None,
        cost: Mapping[str, str] | None = None,
    ) -> str:
        """Judges the trained network and its teacher, and writes the report.

        Args:
            directory: receives report.md, report.png and evaluation.json; where images are judged,
                report.json (the rows) and teacher.rows.json too; by frame, report.json,
                by_frame.png and videos.gif. The first process writes.
            title: of the report.
            trained: the network, placed.
            teacher, teacher_path: the teacher, placed, and its file; None without a teacher.
            cost: further lines of the report, by name: forward passes, FLOPs, time.

        Returns:
            The text of report.md.
        """
        if self.settings.features:
            body = self._judged(directory, title, trained, teacher, teacher_path)
        elif self.settings.frames:
            body = self._by_frame(directory, title, trained, teacher)
        else:
            body = self._shown(directory, title, trained, teacher)
        text = report.page(title, body, cost)
        if jax.process_index() == 0:
            write_text(directory / SETTINGS, _kept(self.settings))
            write_text(directory / REPORT, text)
        return text

    def is_reported(self, directory: Path) -> bool:
        """Whether the report in `directory` is one of these settings."""
        try:
            stored = dict(json.loads((directory / SETTINGS).read_text()))
        except (OSError, ValueError, TypeError):
            return False
        # A report that was written before a field existed is one of its default.
        return json.loads(_kept(Evaluation(every=1))) | stored == json.loads(_kept(self.settings))

    def _judge(self, split, limit):
        source = self.source
        return evaluation.data_judge(
            source.name,
            source.data_dir,
            self.settings.features,
            split=split,
            train=source.split,
            limit=limit,
        )

    def _judged(self, directory, title, trained, teacher, teacher_path):
        """Body of the report of a run on images; writes its rows and its figure."""
        spec, classes = self.settings, self.source.num_classes
        judge = self._judge(spec.split, LIMIT)
        labels = samplers.balanced(2 * classes, classes)
        table, pictures = [evaluation.real_row(judge, spec.num)], {"real": judge.examples(labels)}
        if teacher is not None:
            table += evaluation.teacher_rows(
                teacher_path,
                self.teacher_samplers,
                judge,
                spec.num,
                denoiser=teacher,
                recompute=spec.recompute,
                store=directory / "teacher.rows.json",
            )
            for sampler in (self.teacher_samplers[0], self.teacher_samplers[-1]):
                pictures[sampler.title] = draw_images(teacher, sampler, labels, show=False)
        for sampler in self.samplers:
            row, images = evaluation.judged(trained, sampler, judge, spec.num)
            table.append(row)
            pictures[sampler.title] = images[: len(labels)]
        if jax.process_index() == 0:
            write_text(directory / "report.json", json.dumps(table, indent=1) + "\n")
            report.figure(
                directory / FIGURE, table, pictures, labels, metric=judge.name, title=title
            )
        return report.markdown(table, judge.name, judge.reference)

    def _shown(self, directory, title, trained, teacher):
        """Body of the report of a run without a feature network; writes its figure."""
        networks = [(trained, sampler) for sampler in self.samplers]
        if teacher is not None:
            networks = [(teacher, sampler) for sampler in self.teacher_samplers] + networks
        pictures = {sampler.title: self._show(net, sampler, SEED) for net, sampler in networks}
        if jax.process_index() == 0:
            report.gallery(directory / FIGURE, pictures, self.source.columns, title=title)
        if not self.source.measures:
            return "From the same noise. Not judged: no feature network is named.\n"
        table = [{"name": "real", **self.source.floor(self.settings.num)}]
        table += [self._measure(net, sampler) for net, sampler in networks]
        return report.measured(table, self.source.measures)

    def _by_frame(self, directory, title, trained, teacher):
        """Body of the report of a run on videos, frame by frame; writes rows, figures and a GIF."""
        spec, source = self.settings, self.source
        rows, *conditions = source.measured_conditions(spec.num)
        videos = {"real": source.real(rows, spec.frames)}
        networks = [] if teacher is None else [(teacher, self.teacher_samplers[0])]
        for name, path in spec.beside:
            networks.append((sharding.replicate(weights.denoiser(path)), self._beside(name, path)))
        networks += [
            (trained, dataclasses.replace(sampler, name=name))
            for sampler, name in zip(self.samplers, self._own_names, strict=True)
        ]
        for net, sampler in networks:
            videos[sampler.name] = source.decode(
                self._draw(net, sampler, *conditions, SEED, spec.frames)
            )
        table = [
            {"name": name, "by_frame": drift.by_frame(videos[name], rows, source)}
            for name in videos
        ]
        length = self._length(trained)
        if jax.process_index() == 0:
            write_text(directory / "report.json", json.dumps(table, indent=1) + "\n")
            drift.figure(directory / "by_frame.png", table, length, title=title)
            few = {name: x[:: max(len(x) // SHOWN, 1)][:SHOWN] for name, x in videos.items()}
            strips = drift.strips(few, max(spec.frames // 12, 1))
            report.gallery(directory / FIGURE, strips, 1, title=title)
            drift.save_gif(directory / "videos.gif", few)
        body = drift.markdown(table, length)
        return f"![quality by frame](by_frame.png)\n\n![videos](videos.gif)\n\n{body}"

    def _length(self, denoiser):
        """Frames of the videos that a network learned: a student's may be longer in training."""
        length = self.source.sample_shape[0]
        return min(length, getattr(denoiser.net.config, "reach", length))

    def _beside(self, name, path):
        """The sampler of another checkpoint in the report."""
        return dataclasses.replace(samplers.sampler_for(path), name=name)

    def _show(self, denoiser, sampler, seed):
        return self.source.pictures(
            self._draw(denoiser, sampler, *self.source.preview_conditions(), seed)
        )

    def _measure(self, denoiser, sampler):
        rows, *conditions = self.source.measured_conditions(self.settings.num)
        x0 = self._draw(denoiser, sampler, *conditions, SEED)
        return evaluation.about(sampler) | self.source.measure(x0, rows)

    def _draw(self, denoiser, sampler, cond, uncond, seed, frames=None):
        """Samples float32 [N, ...]; videos of `frames` frames, as far as the sampler goes."""
        shape, num = self.source.sample_shape, len(cond)
        if not isinstance(sampler, samplers.CAUSAL):
            shape = (self._length(denoiser), *shape[1:])
        elif frames is not None:
            shape = (frames, *shape[1:])
        drawn = samplers.draw(
            denoiser, sampler, cond, uncond, shape, seed, batch=min(num, self.batch)
        )
        return np.concatenate(list(drawn))


def _kept(settings):
    """The settings that a report depends on, as JSON."""
    kept = dataclasses.asdict(settings)
    del kept["every"], kept["samples"]
    return json.dumps(kept, indent=1) + "\n"
