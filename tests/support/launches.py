"""Commands started in processes of their own."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.cli.main import main
from ldm.distributed.processes import Processes

HERE = Path(__file__).resolve().parent


ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "ACCELERATE_USE_CPU": "1",
    "PYTHONPATH": f"{HERE.parents[1]}{os.pathsep}{HERE.parent}",
}


def torchrun(processes: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]


def started(launcher: list[str], *arguments: str) -> str:
    done = subprocess.run(
        [*launcher, str(HERE / "ranks.py"), *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr
    assert "FutureWarning" not in done.stderr
    return done.stdout


PATIENCE = 150  # seconds, after which a launch counts as hanging


def side_by_side(count: int, work: Callable[[Processes], Any]) -> list[Any]:
    """What ``work`` returns, or raises, on each of ``count`` threads that exchange results as processes do."""
    barrier, slots = threading.Barrier(count, timeout=PATIENCE), [None] * count

    def run(rank: int) -> Any:
        def gather(value: Any) -> list[Any]:
            slots[rank] = value
            barrier.wait()
            values = list(slots)
            barrier.wait()
            return values

        try:
            return work(Processes(rank, count, gather))
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Run a command on ``count`` processes that are threads: the exit code of each."""
    here = threading.local()

    def call(count: int, *arguments: str) -> list[Any]:
        def run(processes: Processes) -> int:
            here.processes = processes
            return main(list(arguments))

        monkeypatch.setattr("ldm.distributed.launch.launched", lambda cpu=False: (here.processes, torch.device("cpu")))
        monkeypatch.setattr(
            "ldm.training.stages.diffusion.launched", lambda cpu=False: (here.processes, torch.device("cpu"))
        )
        return side_by_side(count, run)

    return call


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}
