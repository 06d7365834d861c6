"""Signals × launchers × phases of training: what is saved, exit codes, processes left. `make signals`.

signals.py [LAUNCHER…]            the table
signals.py --train PHASE CONFIG…  what it starts: `ldm train-ldm`, slow and announced in one phase
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PHASES = ("update", "validation", "sampling", "saving")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ACCELERATE = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--mixed_precision=no",
    "--dynamo_backend=no",
    "--num_machines=1",
]
LAUNCHERS: dict[str, list[str]] = {
    "python": [sys.executable],
    "accelerate, 1 process": [*ACCELERATE, "--num_processes=1"],
    "accelerate, 2 processes": [*ACCELERATE, "--multi_gpu", "--num_processes=2"],
    "torchrun, 2 processes": TORCHRUN,
    "torchrun handling SIGUSR1": [*TORCHRUN, "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"],
}
LINGER = 1.5  # seconds that the phase is made to last
PATIENCE = 120  # seconds, after which a launch counts as hanging
STEPS = 100_000


def tree(run: Path) -> dict[str, Any]:
    """A small model of pixels that is validated, drawn and saved at update 4."""
    train = {"steps": STEPS, "batch_size": 4, "log_every": 1, "validation_size": 4, "trackers": [], "ema_decay": 0.9}
    every = dict.fromkeys(("validate_every", "sample_every", "checkpoint_every"), 4)
    return {
        "run": str(run),
        "data": {"source": "shapes", "image_size": 24, "size": 64},
        "autoencoder": "none",
        "text": "none",
        "unet": {"channels": [8, 8], "layers_per_level": 1, "attention_levels": [], "groups": 4},
        "sample": {"steps": 2},
        "train": {**train, **every},
    }


@dataclass(frozen=True)
class Outcome:
    """What a signal led to."""

    code: int  # the caller's, of the launcher
    seconds: float  # from the signal to the end of the last process
    state: str  # of status.json
    step: int  # that it says
    saved: int | None  # the newest intact checkpoint
    left: tuple[int, ...]  # processes that outlived their launcher by PATIENCE
    said: str

    @property
    def clean(self) -> bool:
        """Saved at the update where it stopped, and nobody is left."""
        return self.state == "interrupted" and self.saved == self.step and not self.left


def processes(run: Path) -> tuple[int, ...]:
    """The processes that have this run on their command line."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = place.read_bytes().split(b"\0")
        except OSError:
            continue
        if f"run={run}".encode() in line and int(place.parent.name) != os.getpid():
            found.append(int(place.parent.name))
    return tuple(found)


def _heed_interrupts() -> None:
    """A shell lets what it starts in the background ignore SIGINT, and that is inherited."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def stop(launcher: Sequence[str], number: signal.Signals, phase: str, folder: Path) -> Outcome:
    """Start a training, send the launcher a signal in ``phase``, and watch."""
    import yaml

    from ldm.runs.checkpoints import folder as shelf
    from ldm.runs.records import read_status

    run, config = folder / "run", folder / "ldm.yaml"
    config.write_text(yaml.safe_dump(tree(run)))
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{HERE.parent}:{HERE}",
    }
    command = [*launcher, str(HERE / "signals.py"), "--train", phase, str(config), f"run={run}"]
    with (folder / "said").open("w") as said:
        process = subprocess.Popen(
            command, env=environment, stdout=said, stderr=said, start_new_session=True, preexec_fn=_heed_interrupts
        )  # fmt: skip
        began = time.monotonic()
        while not (run / f".{phase}").exists() and process.poll() is None and time.monotonic() - began < PATIENCE:
            time.sleep(0.02)
        sent = time.monotonic()
        process.send_signal(number)
        with suppress(subprocess.TimeoutExpired):  # then it is among those that are left
            process.wait(timeout=PATIENCE)
        while (left := processes(run)) and time.monotonic() - sent < PATIENCE:
            time.sleep(0.05)
        seconds = time.monotonic() - sent
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    code = process.wait()
    status = read_status(run) or {"state": "none", "step": -1}
    newest = shelf.newest_valid(run / "checkpoints")[0]
    saved = None if newest is None else shelf.step_of(newest)
    return Outcome(code, seconds, status["state"], status["step"], saved, left, (folder / "said").read_text())


def train(phase: str, arguments: list[str]) -> int:
    """`ldm train-ldm`, whose ``phase`` says in `RUN/.PHASE` that it has begun, and then lasts LINGER seconds."""
    from ldm.cli.main import main
    from ldm.runs.checkpoints import files as checkpoint
    from ldm.training.loop import Loop

    where, name = {
        "update": (Loop, "_update"),
        "validation": (Loop, "_validated"),
        "sampling": (Loop, "_drawn"),
        "saving": (checkpoint, "_fill"),
    }[phase]
    run, original = Path(arguments[-1].removeprefix("run=")), getattr(where, name)

    def announced(*given: Any) -> Any:
        if phase != "update" or given[0].step >= 4:
            (run / f".{phase}").touch()
            time.sleep(LINGER)
        return original(*given)

    setattr(where, name, announced)
    return main(["train-ldm", *arguments])


def table(launchers: Sequence[str]) -> int:
    """Print the table; returns how many cells were not clean."""
    print("| launcher | signal | phase | saved at | seconds | launcher's code | status.json | left over |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    unclean = 0
    for name in launchers:
        for number in SIGNALS:
            for phase in PHASES:
                with tempfile.TemporaryDirectory() as folder:
                    found = stop(LAUNCHERS[name], number, phase, Path(folder))
                unclean += not found.clean
                row = [
                    found.saved,
                    f"{found.seconds:.1f}",
                    found.code,
                    f"{found.state} at {found.step}",
                    len(found.left) or "none",
                ]
                print(f"| {name} | {number.name} | {phase} | {' | '.join(map(str, row))} |", flush=True)
                if not found.clean:
                    print(json.dumps(found.said[-2000:]), file=sys.stderr)
    print(f"\n{unclean} not clean")
    return unclean


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        sys.exit(train(sys.argv[2], sys.argv[3:]))
    sys.path.insert(0, str(HERE.parent))
    sys.exit(table(sys.argv[1:] or list(LAUNCHERS)) > 0)
