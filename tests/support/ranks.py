"""Commands of tests/training/test_ranks.py, alone or under torchrun: train on and record gradients and draws.

ranks.py train JOBS                                   continue from copies of runs: JSON, the fields of Job
ranks.py sabotage OUT COMMAND CONFIG                  wrong set-ups, each of which must be refused
"""

import hashlib
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import nn

from ldm import config as configuration
from ldm.cli.console import Console
from ldm.cli.main import exit_process
from ldm.config import AutoencoderTrainingConfig, ClassifierTrainingConfig, ClipTrainingConfig, DiffusionTrainingConfig
from ldm.distributed.launch import launched
from ldm.runs.checkpoints import folder as shelf
from ldm.training.loop import Loop
from ldm.training.start import make_task

KINDS = {
    "autoencoder": AutoencoderTrainingConfig,
    "clip": ClipTrainingConfig,
    "ldm": DiffusionTrainingConfig,
    "lora": DiffusionTrainingConfig,
    "student": DiffusionTrainingConfig,
    "classifier": ClassifierTrainingConfig,
}


@dataclass(frozen=True)
class Job:
    """Continue a copy of the run ``base`` from update ``at``; write what ``watch`` records of ``gradients``."""

    out: str
    command: str
    config: str
    base: str
    at: int
    micro_batch: int | None
    gradients: tuple[int, ...]


def made(command: str, config: str, run: Path, *overrides: str) -> Loop:
    """The loop of a training command, before its first update."""
    settings = configuration.load(KINDS[command], config, [f"run={run}", *overrides])
    return Loop(make_task(settings, Console()), settings.train, settings, settings.run, 0, Console())


def watch(loop: Loop, updates: tuple[int, ...]) -> tuple[dict[str, torch.Tensor], dict[int, str]]:
    """Gradients of ``updates`` by update, network and parameter, and a digest of each position's sample.

    Both are filled as the loop trains.
    """
    gradients: dict[str, torch.Tensor] = {}
    draws: dict[int, str] = {}
    norm, micro_step = loop.optimizers.norm, loop.task.micro_step

    def record(networks: Any, batch: Any, update: int, backward: Any) -> Any:
        for i, position in enumerate(batch["position"].tolist()):
            row = [
                v[i].numpy().tobytes().hex() if isinstance(v, torch.Tensor) else v[i] for _, v in sorted(batch.items())
            ]
            draws[position] = hashlib.sha256(json.dumps(row).encode()).hexdigest()
        return micro_step(networks, batch, update, backward)

    def keep(name: str) -> Any:
        if loop.step in updates:
            parameters = loop.task.networks[name].named_parameters()
            gradients.update(
                {f"{loop.step}.{name}.{key}": p.grad.clone() for key, p in parameters if p.grad is not None}
            )
        return norm(name)

    loop.optimizers.norm, loop.task.micro_step = keep, record  # type: ignore[method-assign]
    return gradients, draws


def train(jobs: Path) -> None:
    """Train each job to its end; OUT/gradients.safetensors, OUT/draws.json."""
    for job in [Job(**{**fields, "gradients": tuple(fields["gradients"])}) for fields in json.loads(jobs.read_text())]:
        out = Path(job.out)
        launched()[0].each(lambda job=job: None if int(os.environ.get("RANK", 0)) else copied(job))
        micro_batch = "null" if job.micro_batch is None else job.micro_batch
        with made(job.command, job.config, out / "run", f"train.micro_batch={micro_batch}") as loop:
            assert loop.step == job.at
            gradients, draws = watch(loop, job.gradients)
            loop.train()
        everyone = gather_object([draws])
        if loop.accelerator.is_main_process:
            save_file(gradients, out / "gradients.safetensors")
            assert sum(map(len, everyone)) == len({p for part in everyone for p in part})  # no position is read twice
            (out / "draws.json").write_text(json.dumps({str(p): d for part in everyone for p, d in part.items()}))


def copied(job: Job) -> None:
    """The run as it was after update ``at``."""
    shutil.copytree(job.base, Path(job.out) / "run")
    for path in shelf.steps(Path(job.out) / "run/checkpoints"):
        if shelf.step_of(path) > job.at:
            shutil.rmtree(path)


def write(jobs: list[Job], file: Path) -> Path:
    """For ``train``."""
    file.write_text(json.dumps([asdict(job) for job in jobs]))
    return file


def sabotage(out: Path, command: str, config: str) -> None:
    """Break one thing after the other; print what is said about it."""
    from accelerate import Accelerator

    from ldm.data import rng as streams
    from ldm.data.dataset import BatchPlan

    rank = int(os.environ["RANK"])
    whole = {"prepare_model": Accelerator.prepare_model, "positions": BatchPlan.positions, "normal": streams.normal}

    def unwrapped(self: Any, network: nn.Module) -> nn.Module:
        return network

    def all_as_first(self: BatchPlan, update: int) -> Any:
        return whole["positions"](BatchPlan(self.batch_size, self.micro_batch, self.processes, 0), update)

    def same_noise(seed: int, stream: str, position: int, shape: Any) -> Any:
        return whole["normal"](seed, stream, position - position % 4, shape)

    def own_weights(self: Any, network: nn.Module) -> nn.Module:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.01 * rank
        return network

    plans = {
        "gradients": (Accelerator, "prepare_model", unwrapped),
        "weights": (Accelerator, "prepare_model", own_weights),
        "positions": (BatchPlan, "positions", all_as_first),
        "noise": (streams, "normal", same_noise),
    }
    for name, (where, attribute, broken) in plans.items():
        intact = getattr(where, attribute)
        setattr(where, attribute, broken)
        try:
            with made(command, config, out / name) as loop:
                loop.train()
            said = "nothing"
        except configuration.ConfigError as error:
            said = str(error)
        setattr(where, attribute, intact)
        everyone = gather_object([said])
        if rank == 0:
            print(json.dumps({name: everyone}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, place, *rest = sys.argv[1:]
    if what == "train":
        train(Path(place))
    else:
        sabotage(Path(place), *rest)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    exit_process(0)
