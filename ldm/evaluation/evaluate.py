"""Evaluation of a run, written to its report.json.

Samples are judged against their captions. Reconstructions of real images, judged alike, are the ceiling.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch

from ldm import config as configuration
from ldm.config import ConfigError, DataConfig, DiffusionTrainingConfig, SampleConfig
from ldm.data.sample import Source
from ldm.data.sources import open_source
from ldm.data.transforms import to_uint8
from ldm.diffusion.conditioner import Conditioner
from ldm.distributed.processes import ALONE, Processes
from ldm.evaluation.figures import plots
from ldm.evaluation.judges import strict
from ldm.evaluation.metrics import proportion
from ldm.evaluation.reconstructions import reconstructed
from ldm.files.json import read_json, write_json
from ldm.pipeline import Pipeline
from ldm.pipeline.prompts import Prompt, texts_of
from ldm.runs.records import read_metrics, read_status, scalar_series

EVALUATION_SEED = 1000  # of the samples in a report; tuning uses the next one
SCALE = "sample.guidance_scale"
GUIDANCE_SCALES = (1.0, 1.5, 2.0, 3.0, 4.0)
SHOWN = 32  # images in samples.png
DECIBEL_DIGITS = 2  # in the report: the last bits of a PSNR depend on the batch
CURVES = ("loss", "validation/loss", "lr", "grad_norm_unet")  # in curves.png

Progress = Callable[[int, int, Mapping[str, float]], None]
Say = Callable[[str], None]
Scores = dict[str, dict[str, float]]
Row = dict[str, bool]  # the attributes of an image: true if it shows what its caption says


class Examined(NamedTuple):
    """An image compared with its caption."""

    row: Row
    seen: list[strict.Seen]  # the shape asked for and the shape read, for each object
    refused: dict[str, str]  # reasons, by attribute


@runtime_checkable
class Judge(Protocol):
    """Reads images and compares them with their captions."""

    name: str  # the key of its scores in the report
    splits: tuple[tuple[str, str], ...]  # (name in the report, split of the source), that seen in training first

    def right(self, images: np.ndarray, captions: list[str]) -> list[Row]:
        """True for each attribute that an image shows as its caption says, and `all` for the whole."""
        ...

    def examine(self, images: np.ndarray, captions: list[str]) -> list[Examined]:
        """The same, with what each image was read as and why it was refused."""
        ...


class _Shapes:
    splits = (("seen", "validation"), ("held_out", "held_out"))

    def __init__(self, side: int, objects: int, striped: bool = False) -> None:
        self.name, self._judge = {1: "single", 2: "two"}[objects], strict.StrictJudge(side, objects, striped)
        self._striped = striped

    def right(self, images: np.ndarray, captions: list[str]) -> list[Row]:
        return [each.row for each in self.examine(images, captions)]

    def examine(self, images: np.ndarray, captions: list[str]) -> list[Examined]:
        from ldm.data.shapes import parse

        return [
            Examined(*strict.examined(verdict, parse(text), self._striped), verdict.refused)
            for verdict, text in zip(self._judge.read(images), captions, strict=True)
        ]


class _Digits:
    name, splits = "digits", (("seen", "validation"),)

    def __init__(self, side: int) -> None:
        from ldm.evaluation.judges.digits import DigitJudge

        self._judge = DigitJudge(side)
        self.about = {"classifier_on_held_out_real_digits": self._judge.held_out_accuracy}

    def right(self, images: np.ndarray, captions: list[str]) -> list[Row]:
        return [each.row for each in self.examine(images, captions)]

    def examine(self, images: np.ndarray, captions: list[str]) -> list[Examined]:
        from ldm.data.digits import caption

        read = [caption(digit) for digit in self._judge.read(images)]
        return [Examined({"all": r == c}, [(c, r)], {}) for r, c in zip(read, captions, strict=True)]


JUDGES: dict[str, Callable[[int], Judge]] = {
    "shapes": lambda side: _Shapes(side, 1),
    "shapes-two": lambda side: _Shapes(side, 2),
    "shapes-striped": lambda side: _Shapes(side, 1, striped=True),
    "digits": _Digits,
}


def check_judged(data: DataConfig, run: Path) -> None:
    """Raise ConfigError unless there is a judge for the data of this run."""
    if data.source not in JUDGES:
        raise ConfigError(f"{run}: there is a judge for {', '.join(JUDGES)}, not for {data.source}")


def evaluate(
    run: Path, images: int, tune: int, batch_size: int, progress: Progress, say: Say,
    processes: Processes = ALONE, device: torch.device | None = None, parts: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (), out: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Judge a run and write report.json, samples.png and curves.png into it, or into ``out``; returns the report.

    The report is the same for any number of processes, apart from its seconds.

    Args:
        images: samples per set of captions.
        tune: samples for each guidance scale tried; 0 keeps the run's own. A model that was trained without caption
            dropout keeps it in any case, and so does an override of the scale.
        overrides: ``sample.key=value``, settings of the sampler that replace the run's.
        parts: replacements for parts of the model (``vae``, ``text``), see ``Pipeline.from_pretrained``.

    Raises:
        ConfigError: there is no judge for the data, or an override is wrong.
        FolderError: the run has no model.
    """
    started = time.monotonic()
    file = configuration.model_config_file(run)
    config, logs = configuration.load(DiffusionTrainingConfig, file, list(overrides)), file.parent
    out = _folder(out or run)
    data = config.data
    check_judged(data, run)
    judge = JUDGES[data.source](data.image_size)
    pipe = Pipeline.from_pretrained(run, device, **(parts or {}))
    if config.train.channels_last:  # as in training
        pipe.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    settings = config.sample
    pipe.check(settings)
    tried = None
    given = any(override.startswith(f"{SCALE}=") for override in overrides)
    if tune and not given and pipe.null_share != 0.0:
        seen = open_source(data, judge.splits[0][1])
        settings, tried = tuned(pipe, config.sample, judge, seen, tune, batch_size, say, processes)
    report: dict[str, Any] = {"judge": {judge.name: {}}, "settings": dataclasses.asdict(settings), "images": images}
    if tried is not None:
        report["tuned_on_seen"] = tried
    for i, (name, split) in enumerate(judge.splits):
        prompts = first_prompts(open_source(data, split), images, pipe.conditioner)
        chosen = dataclasses.replace(settings, seed=EVALUATION_SEED)
        found, shown = judged(pipe, prompts, chosen, judge, batch_size, progress, processes, first=i * images)
        rows = [each.row for each in found]
        report["judge"][judge.name][name] = _proportions(rows)
        report.setdefault("confusion", {})[name] = strict.confusion([pair for each in found for pair in each.seen])
        report.setdefault("refusals", {})[name] = strict.reasons([each.refused for each in found])
        if i == len(judge.splits) - 1 and processes.main:
            _picture(out, shown, texts_of(prompts), rows, name, chosen)
    report |= getattr(judge, "about", {})
    if pipe.codec is not None:
        report["autoencoder"] = _reconstructions(pipe, judge, data, images, batch_size, processes)
    report["seconds"] = _seconds(logs, config) | {"evaluation": round(time.monotonic() - started, 1)}
    report["seconds"]["total"] = round(sum(report["seconds"].values()), 1)
    if processes.main:
        write_json(out / "report.json", report | _kept(out / "report.json", pipe.hash))
        logged = scalar_series(read_metrics(logs))
        plots.curves({name: logged[name] for name in CURVES if name in logged}, out / "curves.png")
    return report


def _folder(out: Path) -> Path:
    """The folder, which is made if it is missing. Raises ConfigError where it cannot be one."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be a folder: {error.strerror}") from None
    return out


def first_prompts(source: Source, n: int, conditioner: Conditioner | None) -> list[Prompt]:
    """Captions and values of the first ``n`` samples, repeated if there are fewer."""
    places = [i % (source.length or n) for i in range(n)]
    return [Prompt(source.text(i), conditioner.values(source.columns(i)) if conditioner else {}) for i in places]


def judged(
    pipe: Pipeline, prompts: list[Prompt], settings: SampleConfig, judge: Judge, batch: int, progress: Progress | None,
    processes: Processes, first: int = 0,
) -> tuple[list[Examined], list[np.ndarray]]:  # fmt: skip
    """Draw and judge one image of each prompt; returns all judgements and the first SHOWN images.

    ``first``: index of the first image among those of the seed.
    """

    def work(share: range) -> list[tuple[Examined, np.ndarray | None]]:
        texts, drawn = texts_of([prompts[i] for i in share]), []
        values = [prompts[i].values for i in share] if pipe.conditioner else None
        numbers = [first + i for i in share]
        for images in pipe.sample(texts, settings, batch_size=batch, indices=numbers, values=values):
            drawn += list(to_uint8(images))
            if progress:
                progress(len(drawn), len(share), {})
        found = judge.examine(np.stack(drawn), texts)
        return [(each, image if i < SHOWN else None) for i, each, image in zip(share, found, drawn, strict=True)]

    pairs = processes.over(len(prompts), work)
    return [found for found, _ in pairs], [image for _, image in pairs if image is not None]


def tuned(
    pipe: Pipeline, start: SampleConfig, judge: Judge, seen: Source, n: int, batch: int, say: Say, processes: Processes
) -> tuple[SampleConfig, list[dict[str, float]]]:
    """The settings with the best of GUIDANCE_SCALES, and the share of ``n`` seen captions that is right with each.

    The seed is one that the report does not use.
    """
    prompts, tried = first_prompts(seen, n, pipe.conditioner), []
    for scale in GUIDANCE_SCALES if pipe.guidable else (1.0,):
        settings = dataclasses.replace(start, guidance_scale=scale, seed=EVALUATION_SEED + 1)
        found, _ = judged(pipe, prompts, settings, judge, batch, None, processes)
        tried.append({"guidance_scale": scale, "all": sum(each.row["all"] for each in found) / n})
        say(f"guidance {scale:g}: {tried[-1]['all']:.3f} of {n} seen captions right")
    best = max(tried, key=lambda row: row["all"])  # of equals the first, so the weakest guidance
    return dataclasses.replace(start, guidance_scale=best["guidance_scale"]), tried


def _proportions(rows: list[Row]) -> Scores:
    return {name: proportion(sum(row[name] for row in rows), len(rows)) for name in rows[0]}


def _reconstructions(
    pipe: Pipeline, judge: Judge, data: DataConfig, n: int, batch: int, processes: Processes
) -> dict[str, Any]:
    """Mean PSNR of reconstructed validation images, and the share still judged right: the ceiling of samples."""
    assert pipe.codec is not None
    autoencoder, source = pipe.codec.autoencoder, open_source(data, judge.splits[0][1])

    def work(share: range) -> list[tuple[float, Row]]:
        pairs: list[tuple[float, Row]] = []
        for part in reconstructed(autoencoder, source, data.image_size, share, batch):
            pairs += zip(part.psnr, judge.right(to_uint8(part.decoded), part.captions), strict=True)
        return pairs

    pairs = processes.over(min(n, source.length or n), work)
    decibels = round(float(np.mean([decibel for decibel, _ in pairs])), DECIBEL_DIGITS)
    return {"psnr": decibels, "judge": _proportions([row for _, row in pairs])}


def _picture(
    out: Path, shown: list[np.ndarray], captions: list[str], rows: Iterable[Row], name: str, settings: SampleConfig
) -> None:
    n, wrong = len(shown), [not row["all"] for row in rows]
    sampled = f"{settings.sampler}, {settings.steps} steps, guidance {settings.guidance_scale:g}"
    title = f"{name.replace('_', ' ')}: {sampled}"
    plots.captioned(np.stack(shown), captions[:n], out / "samples.png", wrong=wrong[:n], title=title)


def _kept(file: Path, model: str) -> dict[str, Any]:
    """The likelihood that an earlier call computed for the same weights."""
    known = read_json(file).get("likelihood") if file.is_file() else None
    return {"likelihood": known} if isinstance(known, dict) and known.get("model") == model else {}


def _seconds(run: Path, config: DiffusionTrainingConfig) -> dict[str, float]:
    """Wall time of each stage, all resumes included, as recorded by the runs."""
    stages = {"autoencoder": Path(config.autoencoder), "text": Path(config.text), "diffusion": run}
    recorded = {name: (read_status(path) or {}).get("seconds") for name, path in stages.items()}
    return {name: round(seconds, 1) for name, seconds in recorded.items() if seconds is not None}
