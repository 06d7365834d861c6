"""Our training of stage 2 beside diffusers' recipe for text to image, at equal wall time, judged strictly.

    make demo
    python benchmarks/equal_time.py [key=value …] [--seconds 240] [--seeds 0 1 2] [--jobs 2] [--out runs/equal-time]

Both train a U-Net of the same sizes from scratch on the same latents and text states, and are drawn and judged alike.
`key=value` changes settings of ours; `data`, `unet` and `sample` hold for both. A finished run is in OUT/results.jsonl
and is not repeated, so the same command continues an interrupted benchmark. It prints tables in markdown and draws
OUT/curves.png.

Theirs is the training step and the defaults of examples/text_to_image/train_text_to_image.py of diffusers (at commit
58eb52c080, 2026-08-23; the installed 0.42.1 has the classes), written anew: DDPM ε on the scaled linear schedule,
AdamW, clipping, EMAModel. First with its defaults, then with the learning rate, batch size and EMA decay of the search
that are best on seen captions, then with these and caption dropout, which their script lacks and guidance needs.

Seconds are those of the update loop: encoding, validation, drawing and judging are not counted. What costs their
script time and changes no result is left out: it is given latents and text states that were encoded beforehand, fused
AdamW and EMAModel's foreach. channels_last is ours alone: their U-Net is no faster with it on a CPU. Their run of a
seed gets the seconds that ours of that seed really took, if those are more than --seconds.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.nn.functional import mse_loss

import ldm
from autoencoder.posterior import DiagonalGaussian
from ldm import config as configuration
from ldm.config import NONE, NULL_CAPTION, ConfigError, DiffusionTrainingConfig, ScheduleConfig
from ldm.data.latent_cache import LatentCache
from ldm.data.sources import open_source
from ldm.distributed.processes import ALONE
from ldm.errors import NonFiniteError, UserError
from ldm.evaluation import evaluate
from ldm.evaluation.figures.plots import save_figure
from ldm.files.json import read_json, write_json
from ldm.interop.diffusers.unet import unet_to_diffusers
from ldm.interop.text import read_text
from ldm.models.text import CaptionTable, TextEncoder
from ldm.models.unet import NetworkSpec
from ldm.pipeline import Pipeline
from ldm.pipeline.codec import LatentCodec, autoencoder_hash, load_codec
from ldm.runs.records import read_metrics, scalar_series
from ldm.training.precision import set_backends
from ldm.training.stages.latents import ensure_cache

QUARTERS = (0.25, 0.5, 0.75, 1.0)  # of the seconds, at which the average of a run of theirs is judged
PLANNED = (1.0, 0.5, 0.25)  # of the seconds, each a run of ours with a cosine of its own
TRIAL = 40  # updates that find our updates per second
EMA_DECAYS = (0.9999, 0.99)  # of the search; EMAModel's ramp makes all decays from 0.999 on one below 9,000 updates
WARMUP = 50  # updates, where the defaults are left
SEARCH_SEED = 1_000_000  # of the runs that choose a recipe
BATCH = 100  # images drawn together
SD_SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
OURS, DEFAULTS, TUNED = "ours", "diffusers, defaults", "diffusers, tuned"
TUNED_DROPOUT = "diffusers, tuned, caption dropout 0.1"

Record = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """Options of diffusers' script with its defaults; `constant` is without warm-up there, whatever its length."""

    learning_rate: float = 1e-4
    train_batch_size: int = 16
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 500
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_weight_decay: float = 1e-2
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    ema_decays: tuple[float, ...] = (0.9999,)  # an average each
    caption_dropout: float = 0.0  # not in the script

    def __str__(self) -> str:
        decay = f", EMA {self.ema_decays[0]:g}" if len(self.ema_decays) == 1 else ""
        return f"lr {self.learning_rate:g}, batch {self.train_batch_size}{decay}"


@dataclass(frozen=True)
class Job:
    """A training: theirs with a recipe, or ours (None), judged at ``shares`` of its seconds."""

    row: str
    seed: int
    seconds: float
    shares: tuple[float, ...]
    recipe: Recipe | None = None

    @property
    def name(self) -> str:
        """The name of its records and, with other characters, of its folder."""
        return f"{self.row}, {self.recipe or f'{self.shares[0]:g} of the time'}, seed {self.seed}"

    @property
    def folder(self) -> str:
        return re.sub(r"[^\w.]+", "-", self.name)


@dataclass(frozen=True)
class Bench:
    """Settings that all trainings share; ``config``: ours."""

    config: DiffusionTrainingConfig
    out: Path
    images: int
    tune: int
    threads: int

    def spec(self, latent_channels: int, context_dim: int) -> NetworkSpec:
        """The U-Net of both sides."""
        return NetworkSpec(self.config.unet, latent_channels, latent_channels, context_dim)


class Inputs(NamedTuple):
    """Posterior moments [n, 2c, h, w] and captions of the training set, and what encoded them."""

    codec: LatentCodec
    text: TextEncoder
    states: CaptionTable
    moments: Tensor
    captions: list[str]

    @classmethod
    def read(cls, bench: Bench) -> Inputs:
        """Open autoencoder, text encoder and latents; the latents are encoded once, into OUT/latents."""
        config = bench.config
        codec, text, source = load_codec(config.autoencoder), read_text(config.text), open_source(config.data, "train")
        cached: LatentCache = ensure_cache(
            replace(config, run=str(bench.out)), codec.autoencoder, source, say, ALONE, torch.device("cpu")
        )
        captions = [cached.text(i) for i in range(cached.length)]
        moments = torch.stack([cached.moments(i) for i in range(cached.length)])
        return cls(codec, text, CaptionTable(text, captions, 256), moments, captions)

    def their_unet(self, bench: Bench) -> UNet2DConditionModel:
        """diffusers' U-Net of the sizes of ours. Raises ConfigError if it has other parameters."""
        spec = bench.spec(self.moments.shape[1] // 2, self.text.width)
        layout = unet_to_diffusers(spec, self.moments.shape[-1])
        unet = UNet2DConditionModel(**{key: value for key, value in layout.items() if not key.startswith("_")})
        shapes = [{name: p.shape for name, p in network.named_parameters()} for network in (unet, spec.make())]
        if shapes[0] != shapes[1]:
            raise ConfigError("unet: diffusers' UNet2DConditionModel has other parameters with these settings")
        return unet

    def their_pipeline(self, bench: Bench, weights: dict[str, Tensor], recipe: Recipe) -> Pipeline:
        """Our pipeline with weights of their U-Net, which are named alike."""
        config = bench.config
        unet = bench.spec(self.moments.shape[1] // 2, self.text.width).make()
        unet.load_state_dict(weights)
        schedule, dropout = ScheduleConfig("scaled_linear"), recipe.caption_dropout or None
        size, drawn = config.data.image_size, config.sample
        return Pipeline(unet, schedule, "eps", self.codec, self.text, size, drawn, caption_dropout=dropout)


class Mark(NamedTuple):
    """A training of theirs after some time; the averaged weights are by EMA decay."""

    updates: int
    seconds: float
    averages: dict[float, dict[str, Tensor]]


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


# ---------------------------------------------------------------- theirs


def epochs(n: int, batch: int) -> Iterator[list[int]]:
    """Numbers of samples, shuffled anew in each epoch; the last batch of an epoch may be smaller."""
    while True:
        yield from (rows.tolist() for rows in torch.randperm(n).split(batch))


def train_theirs(unet: UNet2DConditionModel, recipe: Recipe, inputs: Inputs, marks: Sequence[float]) -> Iterator[Mark]:
    """Train with diffusers' recipe; yield after each of ``marks``, in seconds of updates alone."""
    process = DDPMScheduler(**SD_SCHEDULE)
    parameters = list(unet.train().parameters())
    optimizer = torch.optim.AdamW(
        parameters,
        lr=recipe.learning_rate,
        betas=recipe.adam_betas,
        weight_decay=recipe.adam_weight_decay,
        eps=recipe.adam_epsilon,
        fused=True,
    )
    rate = get_scheduler(recipe.lr_scheduler, optimizer, num_warmup_steps=recipe.lr_warmup_steps)
    averages = {decay: EMAModel(parameters, decay=decay, foreach=True) for decay in recipe.ema_decays}
    feed = epochs(len(inputs.captions), recipe.train_batch_size)

    def update() -> None:
        rows = next(feed)
        captions = [inputs.captions[i] for i in rows]
        if recipe.caption_dropout:
            dropped = torch.rand(len(rows)) < recipe.caption_dropout
            captions = [NULL_CAPTION if drop else text for drop, text in zip(dropped, captions, strict=True)]
        moments = inputs.moments[rows]
        noise = torch.randn_like(moments[:, : moments.shape[1] // 2])
        x0 = inputs.codec.latent(DiagonalGaussian.from_moments(moments), torch.randn_like(noise))
        t = torch.randint(0, process.config.num_train_timesteps, (len(rows),))
        pred = unet(process.add_noise(x0, noise, t), t, inputs.states[captions], return_dict=False)[0]
        mse_loss(pred, noise).backward()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        for average in averages.values():
            average.step(parameters)

    updates, spent = 0, 0.0
    for mark in marks:
        started = time.monotonic()
        while (passed := spent + time.monotonic() - started) < mark:
            update()
            updates += 1
        spent = passed
        yield Mark(updates, spent, {decay: averaged(unet, ema) for decay, ema in averages.items()})


def averaged(unet: UNet2DConditionModel, average: EMAModel) -> dict[str, Tensor]:
    """The averaged weights by name."""
    shown = copy.deepcopy(unet)
    average.copy_to(shown.parameters())
    return shown.state_dict()


def theirs(bench: Bench, job: Job) -> list[Record]:
    """Train with their recipe and judge at each share of the time."""
    assert job.recipe is not None
    set_backends(bench.config.train)
    torch.manual_seed(job.seed)
    inputs, found = Inputs.read(bench), []
    training = train_theirs(inputs.their_unet(bench), job.recipe, inputs, [share * job.seconds for share in job.shares])
    for share, mark in zip(job.shares, training, strict=True):
        for decay, weights in mark.averages.items():
            pipe = inputs.their_pipeline(bench, weights, job.recipe)
            found.append(
                record(job, share, mark.seconds, mark.updates)
                | {"recipe": dataclasses.asdict(replace(job.recipe, ema_decays=(decay,)))}
                | judged(bench, pipe, job.seed != SEARCH_SEED)
            )
    if job.seed != SEARCH_SEED:
        pipe.save_pretrained(bench.out / job.folder / "model")
    return found


# ---------------------------------------------------------------- ours


class Quiet:
    """A reporter that prints nothing."""

    silent = True

    def say(self, text: str) -> None:
        pass

    def progress(self, step: int, steps: int, values: Any) -> None:
        pass


def train_ours(bench: Bench, job: Job, folder: Path, updates: int, log_every: int) -> list[tuple[int, float]]:
    """Train as `ldm train-ldm` does, anew; returns (updates, seconds of the update loop) as it was logged."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(bench.out / "latents", folder / "latents")
    once = {"validate_every": updates, "sample_every": updates, "checkpoint_every": updates, "keep_every": None}
    train = replace(bench.config.train, steps=updates, seed=job.seed, log_every=log_every, **once)
    ldm.train(replace(bench.config, run=str(folder), train=train), reporter=Quiet())
    for name in ("checkpoints", "latents"):
        shutil.rmtree(folder / name)
    per_second = scalar_series(read_metrics(folder))["updates_per_second"]
    return [(step, step / rate) for step, rate in per_second]


def ours(bench: Bench, job: Job) -> list[Record]:
    """Find the updates that fit into the time by a trial, train, and judge."""
    folder, (share,) = bench.out / job.folder, job.shares
    trial = folder.with_name(f"{folder.name}-trial")
    (n, early), (m, late) = train_ours(bench, job, trial, TRIAL, TRIAL // 2)
    shutil.rmtree(trial)
    steps = max(1, round(share * job.seconds * (m - n) / (late - early)))
    updates, seconds = train_ours(bench, job, folder, steps, bench.config.train.log_every)[-1]
    return [record(job, share, seconds, updates) | judged(bench, Pipeline.from_pretrained(folder, "cpu"), True)]


# ---------------------------------------------------------------- both


def judged(bench: Bench, pipe: Pipeline, held_out: bool) -> Record:
    """Choose the guidance scale on seen captions; then the share of held-out captions that is drawn right."""
    data = bench.config.data
    judge = judge_of(data.source, data.image_size)
    seen, other = (open_source(data, judge.splits[i][1]) for i in (0, -1))
    pipe.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        settings, tried = evaluate.tuned(
            pipe, bench.config.sample, judge, seen, bench.tune, BATCH, lambda line: None, ALONE
        )
        found: Record = {"guidance_scale": settings.guidance_scale, "seen": max(row["all"] for row in tried)}
        if held_out:
            prompts = evaluate.first_prompts(other, bench.images, None)
            settings = replace(settings, seed=evaluate.EVALUATION_SEED)
            rows = [each.row for each in evaluate.judged(pipe, prompts, settings, judge, BATCH, None, ALONE)[0]]
            found["held_out"] = {name: mean(row[name] for row in rows) for name in rows[0]}
    except NonFiniteError as error:  # the training diverged: nothing is drawn right
        found = {"guidance_scale": 1.0, "seen": 0.0, "diverged": str(error)}
        if held_out:
            found["held_out"] = {"all": 0.0}
    return found


@cache
def judge_of(source: str, side: int) -> evaluate.Judge:
    """The judge of a data set."""
    return evaluate.JUDGES[source](side)


def record(job: Job, share: float, seconds: float, updates: int) -> Record:
    """What is known of a training before it is judged."""
    named = {"job": job.name, "row": job.row, "seed": job.seed, "share": share}
    return named | {"seconds": round(seconds, 2), "updates": updates}


def work(bench: Bench, job: Job) -> list[Record]:
    """Train and judge."""
    torch.set_num_threads(bench.threads)
    return theirs(bench, job) if job.recipe else ours(bench, job)


def worked(bench: Bench, jobs: list[Job], count: int) -> Iterator[list[Record]]:
    """Records of each job as it ends; ``count`` jobs at once, each in a process of its own."""
    if count == 1:
        yield from (work(bench, job) for job in jobs)
        return
    with ProcessPoolExecutor(count, get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = [pool.submit(work, bench, job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def done(bench: Bench, jobs: list[Job], count: int) -> list[Record]:
    """Do the jobs that OUT/results.jsonl lacks; returns the records of all of them."""
    file, names = bench.out / "results.jsonl", [job.name for job in jobs]
    known = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []
    finished = {each["job"] for each in known}
    for records in worked(bench, [job for job in jobs if job.name not in finished], count):
        with file.open("a", encoding="utf-8") as results:
            results.write("".join(json.dumps(each) + "\n" for each in records))
        for each in records:
            say(line(each))
        known += records
    return [each for each in known if each["job"] in names]


def line(each: Record) -> str:
    """A judged training in one line."""
    average = f", EMA {each['recipe']['ema_decays'][0]:g}" if "held_out" not in each else ""
    about = f"{each['job']}{average}: {each['updates']} updates in {each['seconds']:.1f} s"
    held_out = f", held out {each['held_out']['all']:.3f}" if "held_out" in each else ""
    return f"{about}, guidance {each['guidance_scale']:g}, seen {each['seen']:.3f}{held_out}"


# ---------------------------------------------------------------- the benchmark


def benchmark(bench: Bench, arguments: argparse.Namespace) -> list[Record]:
    """Run everything that is not done yet; returns the records of the report, and prints its tables."""
    seeds, seconds, count = arguments.seeds, arguments.seconds, arguments.jobs
    our_jobs = [Job(OURS, seed, seconds, (share,)) for share in PLANNED for seed in seeds]
    found = done(bench, our_jobs, count)
    taken = {each["seed"]: max(seconds, each["seconds"]) for each in found if each["share"] == 1.0}
    searched = done(bench, [Job("search", SEARCH_SEED, seconds, (1.0,), each) for each in recipes(arguments)], count)
    best = chosen(searched)
    rows = {DEFAULTS: Recipe(), TUNED: best, TUNED_DROPOUT: replace(best, caption_dropout=0.1)}
    their_jobs = [Job(row, seed, taken[seed], QUARTERS, recipe) for row, recipe in rows.items() for seed in seeds]
    found += done(bench, their_jobs, count)
    say("\n" + search_table(searched) + f"\n\nchosen: {best}\n\n" + table(found, seeds))
    curves(found, bench.out / "curves.png")
    say(f"\ncurves: {bench.out / 'curves.png'}")
    return found


def recipes(arguments: argparse.Namespace) -> list[Recipe]:
    """Recipes of the search."""
    warm = Recipe(lr_scheduler="constant_with_warmup", lr_warmup_steps=WARMUP, ema_decays=EMA_DECAYS)
    return [
        replace(warm, learning_rate=rate, train_batch_size=batch)
        for rate in arguments.rates
        for batch in arguments.batches
    ]


def chosen(searched: list[Record]) -> Recipe:
    """The recipe that draws the most seen captions right; of equals the first."""
    best = max(searched, key=lambda each: each["seen"])["recipe"]
    settings: Record = {name: tuple(value) if isinstance(value, list) else value for name, value in best.items()}
    return Recipe(**settings)


def search_table(searched: list[Record]) -> str:
    """Share of seen captions drawn right, by learning rate, batch size and EMA decay."""
    lines = ["| learning rate | batch | updates | EMA | seen | guidance |", "| --- | --- | --- | --- | --- | --- |"]
    for each in searched:
        recipe = each["recipe"]
        settings = f"{recipe['learning_rate']:g} | {recipe['train_batch_size']} | {each['updates']}"
        judged = f"{recipe['ema_decays'][0]:g} | {each['seen']:.3f} | {each['guidance_scale']:g}"
        lines.append(f"| {settings} | {judged} |")
    return "\n".join(lines)


def table(found: list[Record], seeds: list[int]) -> str:
    """Held-out captions drawn right, by training, share of the time and seed."""
    titles = ["training", "seconds", "updates", "a second", "guidance", *(f"seed {seed}" for seed in seeds), "mean"]
    lines = [f"| {' | '.join(titles)} |", f"| {' | '.join(['---'] * len(titles))} |"]
    for (row, share), several in grouped(found).items():
        runs = sorted((each for each in several if each["seed"] in seeds), key=lambda each: seeds.index(each["seed"]))
        seconds, updates = (mean(each[name] for each in runs) for name in ("seconds", "updates"))
        scales = ", ".join(f"{scale:g}" for scale in sorted({each["guidance_scale"] for each in runs}))
        right = [each["held_out"]["all"] for each in runs]
        timed = [f"{row}{labelled(row, share)}", f"{seconds:.1f}", f"{updates:.0f}", f"{updates / seconds:.2f}"]
        lines.append(f"| {' | '.join([*timed, scales, *(f'{each:.3f}' for each in right), f'{mean(right):.3f}'])} |")
    return "\n".join(lines)


def labelled(row: str, share: float) -> str:
    """How much of the time it is, and for ours that a run was planned for it."""
    if share == 1.0:
        return ""
    return f", planned for {share:g} of the time" if row == OURS else f", after {share:g} of the time"


def grouped(found: list[Record]) -> dict[tuple[str, float], list[Record]]:
    """Records by training and share of the time, whole times first."""
    groups: dict[tuple[str, float], list[Record]] = {}
    for each in sorted(found, key=lambda each: -each["share"]):
        groups.setdefault((each["row"], each["share"]), []).append(each)
    return groups


def curves(found: list[Record], file: Path) -> None:
    """Plot the held-out share over seconds: each seed a dot, the mean a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), dpi=110)
    axes = figure.add_subplot()
    points: dict[str, list[tuple[float, float]]] = {}
    for i, row in enumerate(dict.fromkeys(each["row"] for each in found)):
        for (name, _), runs in grouped(found).items():
            if name == row:
                right = [each["held_out"]["all"] for each in runs]
                axes.scatter([each["seconds"] for each in runs], right, color=f"C{i}", s=12, alpha=0.5)
                points.setdefault(row, []).append((mean(each["seconds"] for each in runs), mean(right)))
        label = f"{row} (each point a run planned for that time)" if row == OURS else row
        axes.plot(*zip(*sorted(points[row]), strict=True), color=f"C{i}", marker="o", markersize=4, label=label)
    axes.set(xlabel="seconds of training", ylabel="held-out captions drawn right", xlim=(0, None), ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    save_figure(figure, file)


def check(config: DiffusionTrainingConfig) -> None:
    """Raise ConfigError for settings of ours under which both sides cannot train on the same."""
    evaluate.check_judged(config.data, Path(config.run))
    wrong = {
        "autoencoder": config.autoencoder == NONE,
        "text": config.text == NONE,
        "init": config.init is not None,
        "cache_latents": not config.cache_latents,
        "data.flip": config.data.flip,
        "objective.learned_variance": config.objective.learned_variance,
    }
    if names := [name for name, bad in wrong.items() if bad]:
        raise ConfigError(
            f"{names[0]}: both sides train from scratch, on the same cached latents and captions, a U-Net that"
            " diffusers has: leave it as in configs/demo/ldm.yaml"
        )


def claim(out: Path, settings: Record) -> None:
    """Let OUT hold results of these settings alone. Raises ConfigError if it has others."""
    file = out / "settings.json"
    settings = json.loads(json.dumps(settings))
    if file.exists() and (known := read_json(file)) != settings:
        name = next(name for name in [*settings, *known] if known.get(name) != settings.get(name))
        raise ConfigError(f"{out} has results with another {name}: choose another --out, or delete it")
    out.mkdir(parents=True, exist_ok=True)
    write_json(file, settings)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of ours that replace CONFIG's")
    parser.add_argument("--config", default="configs/demo/ldm.yaml", help="our training (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=240, help="training time of each run (default 240)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the report (default 0 1 2)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run (default 1)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, at most one per core (default 1)")
    parser.add_argument("--images", type=int, default=1000, help="held-out captions judged (default 1000)")
    parser.add_argument("--tune", type=int, default=200, help="seen captions for each guidance scale (default 200)")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3], help="learning rates searched")
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 32, 64], help="batch sizes searched")
    parser.add_argument("--out", type=Path, default=Path("runs/equal-time"), help="(default runs/equal-time)")
    found = parser.parse_args(arguments)
    for name in ("seconds", "threads", "jobs", "images", "tune", "rates", "batches"):
        value = getattr(found, name)
        if min(value if isinstance(value, list) else [value]) <= 0:
            parser.error(f"--{name} must be positive")
    if found.jobs * found.threads > (cores := os.cpu_count() or 1):
        parser.error(f"--jobs {found.jobs} × --threads {found.threads} is more than the {cores} cores")
    if SEARCH_SEED in found.seeds or min(found.seeds) < 0:
        parser.error(f"--seeds must not be negative, nor {SEARCH_SEED}, the search's")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    asked = parsed(arguments)
    os.environ |= {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": str(asked.threads)}  # of the processes it starts too
    try:
        config = configuration.load(DiffusionTrainingConfig, asked.config, asked.overrides)
        check(config)
        bench = Bench(config, asked.out, asked.images, asked.tune, asked.threads)
        inputs = {"autoencoder": autoencoder_hash(config.autoencoder), "text": read_text(config.text).hash}
        versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "ldm": ldm.__version__}
        timed = {name: getattr(asked, name) for name in ("seconds", "threads", "jobs", "images", "tune")}
        ours_alone = configuration.to_dict(config) | {"run": "", **inputs}
        claim(asked.out, timed | {"configuration": ours_alone, "versions": versions})
        unet = Inputs.read(bench).their_unet(bench)
        say(f"U-Nets of {sum(p.numel() for p in unet.parameters()):,} parameters on both sides")
        benchmark(bench, asked)
    except (ConfigError, UserError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
