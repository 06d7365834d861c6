"""Measure the samplers on exact targets, or on a trained run.

  ldm sampler-report
  ldm sampler-report runs/demo --images 16 --within 4

Without a run: the order of convergence of each sampler, and its distance to a mixture of Gaussians whose
score is exact. With a run: the distance of each sampler to 1,000 steps of DDIM from the same noise (root
mean square over the pixels, in levels of 255), and the cheapest within --within. Samplers that draw
noise end in other images by design, so their sets of images are compared instead (sliced Wasserstein
distance), and the cheapest is not chosen from them. Writes samplers.json and samplers.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.cli.console import Console
from ldm.cli.reading import PARTS, add_parts, parts
from ldm.cli.target import check_target
from ldm.config import GRIDS, SAMPLERS, ConfigError

DISTILLED = "lcm"  # draws with distilled networks alone
FOR_RUNS = {"images": 16, "within": 4.0, "batch_size": 16}  # options that need a run, with their defaults


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Target, samplers, steps, and where to write."""
    parser.add_argument("run", metavar="RUN", nargs="?", help="a finished run of train-ldm (default: exact targets)")
    parser.add_argument(
        "--samplers", nargs="+", metavar="NAME", help=f"some of {', '.join(SAMPLERS)} (default: all but lcm)"
    )
    parser.add_argument(
        "--steps",
        nargs="+",
        type=int,
        metavar="N",
        help="numbers of steps (default 10 20 50 100; with a run 5 10 20 50)",
    )
    images = f"with a run: images of each sampler (default {FOR_RUNS['images']})"
    parser.add_argument("--images", type=int, metavar="N", help=images)
    parser.add_argument(
        "--within",
        type=float,
        metavar="D",
        help=f"with a run: distance that is close enough, in levels of 255 (default {FOR_RUNS['within']:g})",
    )
    batch = f"with a run: images per batch (default {FOR_RUNS['batch_size']})"
    parser.add_argument("--batch-size", type=int, metavar="N", help=batch)
    grids = f"with a run: spacing of the steps, one of {', '.join(GRIDS)} (default: the model's own)"
    parser.add_argument("--grid", metavar="NAME", help=grids)
    add_parts(parser)
    parser.add_argument("--out", metavar="FOLDER", help="folder for the files (default: RUN, or sampler-report)")
    parser.add_argument("--device", metavar="NAME", help="with a run: cpu, cuda, cuda:1 … (default: a GPU if any)")


def run(arguments: argparse.Namespace) -> None:
    """Check, measure, print and write."""
    names = arguments.samplers or [name for name in SAMPLERS if name != DISTILLED]
    for name in names:
        if name not in SAMPLERS:
            raise ConfigError(f"--samplers: {name!r} is none of {', '.join(SAMPLERS)}")
    if arguments.run is None and DISTILLED in names:
        raise ConfigError(f"--samplers: {DISTILLED} is for distilled models, not for exact denoisers: name a run")
    for option in (*FOR_RUNS, *PARTS, "grid", "device"):
        if arguments.run is None and getattr(arguments, option) is not None:
            raise ConfigError(f"--{option.replace('_', '-')} needs a run: name one, or leave it out")
    if arguments.grid not in (None, *GRIDS):
        raise ConfigError(f"--grid: {arguments.grid!r} is none of {', '.join(GRIDS)}")
    steps = sorted(set(arguments.steps or ((10, 20, 50, 100) if arguments.run is None else (5, 10, 20, 50))))
    if steps[0] < 1 or steps[-1] > 1000:
        raise ConfigError(f"--steps must lie between 1 and 1000, got {' '.join(map(str, steps))}")
    given = {name: getattr(arguments, name) for name in FOR_RUNS}
    given = {name: FOR_RUNS[name] if value is None else value for name, value in given.items()}
    for name, value in given.items():
        if value <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be above 0, got {value:g}")
    out = Path(arguments.out or arguments.run or "sampler-report")
    if arguments.run is None:
        _exact(names, steps, _folder(out), Console())
    else:
        given |= {"grid": arguments.grid, "device": arguments.device, "parts": parts(arguments)}
        _trained(Path(arguments.run), names, steps, given, out, Console())


def _exact(names: Sequence[str], steps: Sequence[int], out: Path, console: Console) -> None:
    from ldm.evaluation.samplers.conformance import conformance
    from ldm.evaluation.samplers.orders import CASES
    from ldm.evaluation.samplers.plots import error_curves, exact_panels, exact_table
    from ldm.files.json import write_json

    report = conformance([name for name, case in CASES.items() if case.sampler in names], steps, console.progress)
    for line in exact_table(report):
        console.say(line)
    floor = f"{report['floor']:.3f} between two sets of exact draws ({report['draws']} each)"
    console.say(f"W: sliced Wasserstein distance to exact draws; {floor}")
    write_json(out / "samplers.json", report)
    error_curves(exact_panels(report), out / "samplers.png")
    console.say(f"metrics: {out / 'samplers.json'}   picture: {out / 'samplers.png'}")


def _trained(
    run: Path, names: Sequence[str], steps: Sequence[int], given: dict[str, Any], out: Path, console: Console
) -> None:
    from ldm.evaluation.samplers.on_a_run import captions, compare_samplers
    from ldm.evaluation.samplers.plots import error_curves, run_panels, run_table
    from ldm.files.json import write_json
    from ldm.pipeline import Pipeline

    device, prompts = given["device"], captions(run, given["images"])
    try:
        pipe = Pipeline.from_pretrained(run, device, **given["parts"])
    except (RuntimeError, AssertionError) as error:
        if device is None:
            raise
        raise ConfigError(f"--device {device}: {str(error).splitlines()[0]}") from None
    _folder(out)
    report = compare_samplers(
        pipe, prompts, names, steps, given["within"], given["batch_size"], console.progress, given["grid"]
    )
    for line in run_table(report):
        console.say(line)
    reference = f"ddim, {report['reference']['steps']} steps"
    console.say(f"distances in {report['unit']} (network calls); grid {report['grid']}; reference: {reference}")
    if (floor := report["floor"]) is not None:
        console.say(f"sliced Wasserstein distance between the reference and ddim from other noise: {floor:.2f}")
    best = report["cheapest"]
    if best is None:
        console.say(f"no sampler is within {given['within']:g} of the reference")
    else:
        how = f"{best['sampler']}, {best['steps']} steps, {best['calls']} network calls ({best['rms']:.2f})"
        console.say(f"cheapest within {given['within']:g}: {how}")
    write_json(out / "samplers.json", report)
    error_curves(run_panels(report), out / "samplers.png")
    console.say(f"metrics: {out / 'samplers.json'}   picture: {out / 'samplers.png'}")


def _folder(out: Path) -> Path:
    from ldm.evaluation.figures.plots import is_figure

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be a folder: {error.strerror}") from None
    check_target(out / "samplers.png", is_figure, beside=(".json",))
    return out
