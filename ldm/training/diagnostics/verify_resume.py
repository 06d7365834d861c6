"""Proof of an exact resume: a run that is killed within an update and resumed, beside two unbroken runs."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ldm.config import AutoencoderTrainingConfig, DiffusionTrainingConfig
from ldm.data import latent_cache as cache
from ldm.data.dataset import Batch
from ldm.distributed.launch import launched
from ldm.errors import UserError
from ldm.files.disk import resolved
from ldm.runs.checkpoints import files as checkpoint
from ldm.runs.records import read_metrics
from ldm.training.diagnostics.deviation import (
    Difference,
    Row,
    between_digests,
    between_figures,
    between_groups,
    between_rates,
    between_reads,
    row_of,
)
from ldm.training.loop import Interrupted, Loop
from ldm.training.task import Networks, Task

LATENTS = "latents"
T = TypeVar("T")


class PowerCut(BaseException):
    """An exception that the loop does not catch, so that nothing is saved: like a kill."""


class NotExactError(UserError):
    """The resumed run ends differently from the unbroken one; the message names the first difference."""

    exit_code = 4
    everywhere = True


@dataclass(frozen=True)
class Plan:
    """The updates of a check, counted from 0.

    ``updates`` in all (≥ 4), a checkpoint before ``saved``, the kill within ``cut``.
    """

    updates: int

    @property
    def saved(self) -> int:
        """The first update of the resumed run."""
        return self.updates // 2

    @property
    def cut(self) -> int:
        """The killed update: at least one later, and before the next checkpoint."""
        return self.saved + (self.updates - self.saved) // 2


@dataclass
class Life:
    """One process's record of a run, from its start or resume to its end."""

    first: int  # the update that it began with
    reads: dict[int, dict[int, list[str]]] = field(
        default_factory=dict
    )  # update → position → digests of what was read there
    rates: dict[int, dict[str, float]] = field(default_factory=dict)  # update → network → learning rate
    digests: dict[str, dict[str, str]] = field(
        default_factory=dict
    )  # group → tensor → digest, at the beginning of update ``saved``


class Quiet:
    """Reporter that prints nothing."""

    def say(self, text: str) -> None: ...

    def progress(self, step: int, steps: int, values: Mapping[str, float]) -> None: ...


def settings_of_check(settings: Any, plan: Plan) -> tuple[Any, list[str]]:
    """Settings of the check's runs (except ``run``), and the changes as ``key old → new``."""
    train = settings.train
    changes: dict[str, dict[str, Any]] = {
        "train": {
            "steps": plan.updates, "log_every": 1, "validate_every": plan.saved, "checkpoint_every": plan.saved,
            "validation_size": min(train.validation_size, train.batch_size), "keep_checkpoints": 2, "keep_every": None,
            "save_errors": "stop", "trackers": (),
        }
    }  # fmt: skip
    if (
        isinstance(settings, AutoencoderTrainingConfig) and settings.loss.gan > 0
    ):  # the adversary joins before the checkpoint
        changes["loss"] = {"gan_start": min(settings.loss.gan_start, plan.saved - 1)}
    if isinstance(settings, DiffusionTrainingConfig) and not (Path(settings.run) / LATENTS / cache.MANIFEST).is_file():
        changes[""] = {"cache_latents": False}  # encoding the whole set would take longer than the check
    said = []
    for part, values in changes.items():
        held = getattr(settings, part) if part else settings
        differing = {key: value for key, value in values.items() if getattr(held, key) != value}
        said += [
            f"{part}.{key}".strip(".") + f" {_text(getattr(held, key))} → {_text(value)}"
            for key, value in differing.items()
        ]
        held = dataclasses.replace(held, **differing)
        settings = dataclasses.replace(settings, **{part: held}) if part else held
    return settings, said


def _text(value: Any) -> str:
    return json.dumps(value)


def verify(
    settings: Any, make_task: Callable[[Any], Task], folder: Path, plan: Plan, say: Callable[[str], None]
) -> list[Row]:
    """Train three times in ``folder`` and compare: unbroken, unbroken again, and killed within an update and resumed.

    ``settings`` are those of ``settings_of_check``. Every process returns the same rows. Raises the errors of
    training, and KeyboardInterrupt after a signal.
    """
    check = _Check(settings, make_task, folder, plan)
    say(f"1 of 3: {plan.updates} updates, unbroken")
    straight, _ = check.train("straight")
    say("2 of 3: the same again")
    twin, twin_apart = check.train("twin", compared=True)
    say(f"3 of 3: killed within update {plan.cut + 1}, then resumed from the checkpoint of update {plan.saved}")
    cut, _ = check.train("interrupted", cut=True)
    resumed, apart = check.train("interrupted", compared=True)
    counted = Life(
        resumed.first,
        _joined(cut.reads, resumed.reads, resumed.first),
        _joined(cut.rates, resumed.rates, resumed.first),
    )
    restored = between_digests(cut.digests, resumed.digests)
    rows = check.rows_of_all((straight, counted, twin))
    rows += [Row(name, restored.get(name), apart[name], twin_apart[name]) for name in apart]
    return check.processes.gather(rows)[0]  # those of the main process, which alone has written files


def _joined(cut: dict[int, T], resumed: dict[int, T], first: int) -> dict[int, T]:
    """Join a run in two parts: everything before update ``first`` from one record, the rest from the other."""
    return {**{update: noted for update, noted in cut.items() if update < first}, **resumed}


class _Check:
    """The runs of one check."""

    def __init__(self, settings: Any, make_task: Callable[[Any], Task], folder: Path, plan: Plan) -> None:
        self.settings, self.make_task, self.folder, self.plan = settings, make_task, folder, plan
        self.processes, _ = launched()

    def rows_of_all(self, lives: tuple[Life, Life, Life]) -> list[Row]:
        """Rows that must be equal whatever the rounding, over all processes."""
        straight, counted, twin = lives
        everyone = self.processes.gather([life.reads for life in lives])
        reads = [[mine[i] for mine in everyone] for i in range(3)]
        total = self.plan.updates * self.settings.train.batch_size
        apart, twin_apart = between_reads(reads[0], reads[1], total), between_reads(reads[0], reads[2], total)
        begun = Difference(
            float(abs(counted.first - self.plan.saved)),
            f"it continued from update {counted.first} instead of {self.plan.saved}",
        )
        return [
            Row("update resumed from", None, begun, Difference(0.0), exact=True),
            Row("positions read", None, apart[0], twin_apart[0], exact=True),
            Row("samples, draws included", None, apart[1], twin_apart[1], exact=True),
            Row(
                "learning rates",
                None,
                between_rates(straight.rates, counted.rates),
                between_rates(straight.rates, twin.rates),
                exact=True,
            ),
        ]

    def train(self, name: str, cut: bool = False, compared: bool = False) -> tuple[Life, dict[str, Difference]]:
        """Train run ``name`` from its current state; returns its record and its distance from the unbroken run."""
        run = self.folder / name
        self.processes.each(lambda: self._lend_latents(run) if self.processes.main else None)
        _fresh()
        settings = dataclasses.replace(self.settings, run=str(run))
        task = self.make_task(settings)
        task.previews, task.export = dict, lambda folder: None
        loop = Loop(task, settings.train, settings, settings.run, settings.data.workers, Quiet())
        life = Life(0)
        try:
            with loop:
                life = watch(loop, self.plan, cut)
                loop.train()
        except PowerCut:
            pass
        except Interrupted:
            raise KeyboardInterrupt from None
        compare = compared and self.processes.main  # after the barrier that ``each`` is: the checkpoint is written
        return life, self.processes.each(lambda: self._apart(loop, run) if compare else {})[0]

    def _lend_latents(self, run: Path) -> None:
        """Link the latent cache of the user's run, or of the check's first run, into ``run``."""
        run.mkdir(exist_ok=True)
        for place in (Path(self.settings.run), self.folder / "straight"):
            latents = place / LATENTS
            if place != run and (latents / cache.MANIFEST).is_file() and not (run / LATENTS).exists():
                (run / LATENTS).symlink_to(resolved(latents))

    def _apart(self, loop: Loop, run: Path) -> dict[str, Difference]:
        """Compare the live state at the end with the unbroken run's last checkpoint, one group of tensors at a time."""
        straight = self.folder / "straight"
        end = straight / f"checkpoints/step-{self.plan.updates:08d}"
        found = {"logged figures": between_figures(read_metrics(straight), read_metrics(run))}
        _, kept = checkpoint.load(end, groups=())
        found["state of the task"] = between_figures([kept["task"]], [json.loads(json.dumps(loop.task.state()))])
        found["best validation"] = between_figures([kept["best"]], [loop.best.state()])
        for group, live in loop.state.tensors().items():
            held = checkpoint.load(end, groups=[group])[0][group] if (end / f"{group}.safetensors").is_file() else {}
            found |= between_groups(group, held, live)
        return found


def watch(loop: Loop, plan: Plan, cut: bool) -> Life:
    """Record what the loop reads and its learning rates; ``cut``: kill it within update ``plan.cut``."""
    life, task, main = Life(loop.step), loop.task, loop.accelerator.is_main_process
    micro_step, after_update = task.micro_step, task.after_update
    done: dict[int, int] = {}  # micro-batches of each update

    def step(networks: Networks, batch: Batch, update: int, backward: Callable[[Tensor], None]) -> dict[str, Tensor]:
        if update == plan.saved and not done.get(update) and main:
            life.digests = _digests(loop)
        done[update] = done.get(update, 0) + 1
        reads = life.reads.setdefault(update, {})
        for i, position in enumerate(batch["position"].tolist()):
            reads.setdefault(position, []).append(_digest({k: v[i] for k, v in batch.items()}))
        metrics = micro_step(networks, batch, update, backward)
        if cut and update == plan.cut and done[update] == max(1, loop.split.accumulation // 2):
            if loop.writer:  # the run is cut after its checkpoint, however slow the disk
                loop.writer.wait()
            raise PowerCut
        return metrics

    def settle(update: int, reduce: Callable[[Tensor], Tensor], finite: Tensor) -> None:
        life.rates[update] = {
            name: float(optimizer.param_groups[0]["lr"]) for name, optimizer in loop.optimizers.each.items()
        }
        after_update(update, reduce, finite)

    task.micro_step, task.after_update = step, settle
    return life


def _digests(loop: Loop) -> dict[str, dict[str, str]]:
    """Digests of all tensors and values that a checkpoint should keep, by row of the table."""
    states = {"state of the task": loop.task.state(), "best validation": loop.best.state()}
    found = {row: {"state": json.dumps(state, sort_keys=True)} for row, state in states.items()}
    for group, tensors in loop.state.tensors().items():
        for name, tensor in tensors.items():
            found.setdefault(row_of(group, name), {})[name] = _digest({"": tensor})
    return found


def _digest(values: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(values.items()):
        digest.update(name.encode())
        if isinstance(value, Tensor):
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(str(value).encode())
    return digest.hexdigest()


def _fresh() -> None:
    """Reset the global generators and free memory, as in a new process."""
    gc.collect()  # a task and its loop hold each other
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
