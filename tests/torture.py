"""Kill training at random moments, continue by the same command, and compare with an uninterrupted run.

  python tests/torture.py --trials 25        (`make torture`)

Stage 1 (an autoencoder with its discriminator) and stage 2 (a latent diffusion model) run side by side, each as its own
command that saves every update. A kill is SIGKILL to the whole process group, at a moment drawn uniformly between the
first update of the uninterrupted run and the end of its export. The moment is placed by the update logged before it, so
that it does not depend on the speed of the machine. The same command is then started until it ends with 0.

These must be equal bit for bit: weights, average and optimizers of the last checkpoint, its state, all of model/ and of
best/ (stage 2 keeps its best model), and metrics.jsonl except for the speed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
STEPS = 30
BEGUN = b"global batch"  # what is said just before the first update
PATIENCE = 300  # seconds for one start of a command
MORE_KILLS = (0.4, 0.3)  # chances of a second kill and, after it, of a third
STARTS = 8  # of one command at most, kills included
TRAIN = {
    "steps": STEPS, "batch_size": 4, "micro_batch": 2, "lr": 1e-3, "lr_schedule": "cosine", "ema_decay": 0.9,
    "log_every": 1, "validate_every": 10, "validation_size": 4, "sample_every": 20, "checkpoint_every": 1,
    "trackers": [],
}  # fmt: skip
AUTOENCODER = {
    "data": {"source": "shapes", "image_size": 32, "size": 64},
    "model": {"channels": [16, 16, 16], "layers_per_level": 1, "groups": 4, "mid_attention": False},
    "loss": {"kl": 1e-3, "gan": 0.5, "gan_start": 5, "gan_ramp": 10, "disc_channels": 8, "disc_layers": 2},
    "train": TRAIN,
}
CLIP = {
    "data": {"source": "shapes", "image_size": 32, "size": 64},
    "model": {"width": 16, "layers": 1, "heads": 2, "max_length": 32, "merges": 32, "patch_size": 8, "projection": 8},
    "train": {**TRAIN, "steps": 2, "micro_batch": None, "checkpoint_every": 2, "sample_every": 2},
}
DIFFUSION = {
    "data": {"source": "shapes", "image_size": 32, "size": 64, "flip": True},
    "caption_dropout": 0.3,
    "unet": {"channels": [16, 32], "layers_per_level": 1, "attention_levels": [1], "heads": [2], "groups": 4},
    "train": {**TRAIN, "keep_best": True},
    "sample": {"steps": 2, "guidance_scale": 2.0},
}


@dataclass(frozen=True)
class Stage:
    """A command whose run is killed, and its run that was not."""

    name: str  # autoencoder or ldm
    config: Path
    straight: Path
    logged: list[float]  # seconds after which 0, 1, 2 … updates were logged; the last: the end of the command

    def command(self, run: Path) -> list[str]:
        return command(self.name, self.config, run)


def command(name: str, config: Path, run: Path) -> list[str]:
    return [sys.executable, "-m", "ldm.cli.main", f"train-{name}", str(config), f"run={run}"]


class Started:
    """A command under way in a process group of its own, its words in a file."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.log = log
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                arguments, stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT, env=ENVIRONMENT, start_new_session=True
            )

    def first_update(self) -> None:
        """Wait for it, or for the end where it comes before."""
        limit = time.monotonic() + PATIENCE
        while self.process.poll() is None and BEGUN not in self.log.read_bytes():
            if time.monotonic() > limit:
                self.kill()
                raise RuntimeError(f"no first update within {PATIENCE} s: {self.words()}")
            time.sleep(0.002)

    def end(self) -> int:
        """Wait for its end; the exit code."""
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
            raise RuntimeError(f"no end within {PATIENCE} s: {self.words()}") from None

    def kill(self) -> None:
        """SIGKILL to the whole group."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def killed_after(self, run: Path, updates: int, seconds: float) -> bool:
        """Kill it so long after ``updates`` were logged, and its own start is over; False where it ended before."""
        self.first_update()
        while self.process.poll() is None and logged(run) < updates:
            time.sleep(0.002)
        moment = time.monotonic() + seconds
        while self.process.poll() is None and (left := moment - time.monotonic()) > 0:
            time.sleep(min(left, 0.005))
        if self.process.poll() is not None:
            return False
        self.kill()
        return True

    def words(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]


def logged(run: Path) -> int:
    """Updates that a run has logged."""
    try:
        return (run / "metrics.jsonl").read_text().count("\n")
    except FileNotFoundError:
        return 0


def straight(name: str, config: Path, run: Path) -> Stage:
    """Train without interruption, and note when each update was logged."""
    started = Started(command(name, config, run), run.with_name(f"{run.name}.log"))
    started.first_update()
    begun, times = time.monotonic(), [0.0]
    while started.process.poll() is None:
        times += [time.monotonic() - begun] * (logged(run) + 1 - len(times))
        time.sleep(0.002)
    if started.end():
        raise RuntimeError(f"the unbroken run failed: {started.words()}")
    return Stage(name, config, run, [*times, time.monotonic() - begun])


def moment(stage: Stage, reached: int, draw: random.Random) -> tuple[int, float]:
    """A uniform draw from update ``reached`` to the end: updates logged by then, and seconds since the last."""
    at = draw.uniform(stage.logged[reached], stage.logged[-1])
    updates = max(n for n, time_ in enumerate(stage.logged[:-1]) if time_ <= at)
    return updates, at - stage.logged[updates]


def state_at_death(run: Path) -> str:
    """The update that was reached, and what a kill left half-written."""
    done = logged(run)
    folders = [f.name for f in (run / "checkpoints").glob("*")] if (run / "checkpoints").is_dir() else []
    half = [re.sub(r"-\d+$", "", name) for name in folders if name.startswith(".tmp-")]
    where = f"within update {done + 1}" if done < STEPS else "after the last update"
    exported = ", model/ begun" if (run / "model").exists() else ""
    return f"{where}, saved {saved(run)}" + (f", under way: {' '.join(half)}" if half else "") + exported


def saved(run: Path) -> int:
    """The newest checkpoint of a run; 0 without."""
    return max((int(f.name[5:]) for f in (run / "checkpoints").glob("step-*")), default=0)


def content(run: Path) -> dict[str, Any]:
    """All that must be equal at the end: digests of files by name, and the logged figures."""
    last = run / f"checkpoints/step-{STEPS:08d}"
    models = (f for name in ("model", "best") for f in (run / name).rglob("*") if f.is_file())
    files = [*last.glob("*.safetensors"), last / "state.json", *models]
    found: dict[str, Any] = {str(f.relative_to(run)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        figures = json.loads(line)
        figures.pop("updates_per_second", None)
        found.setdefault(f"metrics.jsonl, update {figures['step']}", []).append(figures)
    return found


def differing(run: Path, other: Path) -> list[str]:
    """What is not equal in two finished runs."""
    try:
        a, b = content(run), content(other)
    except OSError as error:
        return [f"{error.filename}: {error.strerror}"]
    if len(a) < STEPS + 8:
        return [f"only {len(a)} things to compare"]
    return [name for name in {**a, **b} if a.get(name) != b.get(name)]


def trial(stage: Stage, run: Path, draw: random.Random) -> tuple[bool, str]:
    """Kill, continue, compare. Whether all is equal, and what happened."""
    kills, deaths, code = 1 + (draw.random() < MORE_KILLS[0]), [], None
    kills += kills == 2 and draw.random() < MORE_KILLS[1]
    starts = 0
    while code is None and starts < STARTS:
        starts += 1
        updates, seconds = moment(stage, saved(run), draw)
        started = Started(stage.command(run), run.with_name(f"{run.name}-{starts}.log"))
        if len(deaths) < kills and started.killed_after(run, updates, seconds):
            deaths.append(state_at_death(run))
            continue
        code = started.end()
        if not deaths:  # drawn so late that it was quicker: nothing was killed, so once more
            shutil.rmtree(run)
            code = None
    found = [f"exit code {code}"] if code or not deaths else differing(run, stage.straight)
    text = "identical" if not found else f"DIFFERENT: {', '.join(found[:4])} ({len(found)} in all)"
    return not found, f"killed {'; again '.join(deaths)}: {text}"


def torture(stage: Stage, folder: Path, trials: int, seed: int) -> int:
    """All trials of a stage; how many ended identical."""
    good = 0
    for number in range(1, trials + 1):
        run = folder / f"{stage.name}-{number:02d}"
        equal, text = trial(stage, run, random.Random(f"{seed} {stage.name} {number}"))
        good += equal
        print(f"{stage.name:<12}{number:3d}/{trials}  {text}", flush=True)
        if equal:
            shutil.rmtree(run)
    print(f"{stage.name}: {good} of {trials} identical", flush=True)
    return good


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=25, help="of each stage (default 25)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument(
        "--out", metavar="FOLDER", help="where the runs go, and those that differ stay (default: a temporary folder)"
    )
    arguments = parser.parse_args(argv)
    folder = Path(arguments.out or tempfile.mkdtemp(prefix="torture-")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    trees = {
        "autoencoder": AUTOENCODER,
        "clip": CLIP,
        "ldm": {**DIFFUSION, "autoencoder": f"{folder}/autoencoder", "text": f"{folder}/clip"},
    }
    for name, tree in trees.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"run": f"{folder}/{name}", **tree}))
    begun = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        first, _ = pool.map(
            lambda name: straight(name, folder / f"{name}.yaml", folder / name), ("autoencoder", "clip")
        )
    stages = [first, straight("ldm", folder / "ldm.yaml", folder / "ldm")]
    for stage in stages:
        print(f"{stage.name}: {STEPS} updates, each saved, in {stage.logged[-1]:.1f} s without a kill", flush=True)
    with ThreadPoolExecutor(2) as pool:
        good = list(pool.map(lambda stage: torture(stage, folder, arguments.trials, arguments.seed), stages))
    print(f"{time.monotonic() - begun:.0f} s in all")
    bad = sum(good) < len(stages) * arguments.trials
    if not bad and arguments.out is None:
        shutil.rmtree(folder)
    elif bad:
        print(f"what differs lies in {folder}")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
