"""The one training loop, on accelerate: accumulation, clipping, EMA, checkpoints, resume, validation, trackers.

A Task owns the networks and computes the loss of one micro-batch; the loop owns the rest. An update depends on its
number alone (data and noise are functions of position), so a resumed run needs only its step.

The order of reading is that of a run: ``prepare``, ``train``, ``_iterate``, ``_update``, ``_follow_up``, ``_finish``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ldm.config import TrainConfig
from ldm.data.dataset import Batch, BatchPlan, batches, plan_batch
from ldm.distributed.launch import launched
from ldm.errors import UserError
from ldm.pipeline.provenance import surroundings
from ldm.runs import provenance as starts
from ldm.runs.checkpoints import files as checkpoint
from ldm.runs.checkpoints import folder as shelf
from ldm.runs.checkpoints import resume
from ldm.runs.checkpoints.writer import BackgroundWriter
from ldm.runs.directory import RunDirectory
from ldm.training.best import BestModel
from ldm.training.diagnostics.nonfinite import NonFiniteRecorder
from ldm.training.ema import EMA
from ldm.training.finite import FiniteGuard, TrainingError, not_finite
from ldm.training.logger import Logger
from ldm.training.optimizers import Optimizers, learning_rate
from ldm.training.placement import place
from ldm.training.precision import accelerator_of, set_backends
from ldm.training.rank_checks import Probe, ProcessesDifferError
from ldm.training.skipped import SkipLog
from ldm.training.state import TrainingState
from ldm.training.step_flags import StepFlags
from ldm.training.stopping import Stop
from ldm.training.task import AVERAGE, Reporter, Task


class Interrupted(UserError):
    """The run was asked to stop; its state is saved and the same command continues."""

    exit_code = 75
    everywhere = True  # every process raises it


class Loop:
    """Training of one task in one run directory, which is locked from ``prepare`` to ``close``.

    ``with Loop(…) as loop: loop.train()`` calls both, and writes to the run's status how it ended.

    Args:
        config: how to train: ``run_config.train`` with whatever the caller changed.
        run_config: the whole configuration, which the run directory keeps.
        start: the checkpoint to continue from, by its update or its folder; None: the newest intact one.
    """

    def __init__(
        self,
        task: Task,
        config: TrainConfig,
        run_config: Any,
        path: str,
        workers: int,
        reporter: Reporter,
        start: str | None = None,
    ) -> None:
        self.task, self.config, self.run_config = task, config, run_config
        self.path, self.workers, self.reporter, self.start = Path(path), workers, reporter, start
        self.processes, _ = launched()
        self.accelerator = accelerator_of(config.mixed_precision)
        self.split: BatchPlan = plan_batch(
            config.batch_size, config.micro_batch, self.processes.count, self.processes.rank
        )
        self.stop = Stop(reporter.say, self.accelerator.is_main_process)
        self.flags = StepFlags(self._sum, self.accelerator.device)
        self.probe = Probe(self.processes)
        self.run: RunDirectory | None = None  # the main process's, like the writer
        self.writer: BackgroundWriter | None = None
        self.step = 0  # updates that are done
        self._whole = True  # between updates: networks, average and task are all after update `step`

    def __enter__(self) -> Loop:
        try:
            self.prepare()
        except BaseException as error:
            if self.run:
                self.run.fail(error)
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self.run and error is not None:
            stopped = isinstance(error, (Interrupted, KeyboardInterrupt))
            self.run.status("interrupted" if stopped else "failed", self.step, self.config.steps, error)
        self.close()

    def close(self) -> None:
        """Unlock the run directory."""
        if self.run:
            self.run.close()

    # ---------------------------------------------------------------- before the first update

    def prepare(self) -> None:
        """Lock the run directory, place the networks, and take over the checkpoint to continue from."""
        set_backends(self.config)
        self._open_run()
        found = self._find_checkpoint()
        self._place(fresh=found is None)
        if found is not None:
            self._resume(found)
        if self.run:
            self.run.cut_back(self.step)
            self.writer = BackgroundWriter(
                self.run.checkpoints,
                self.config.keep_checkpoints,
                self.config.keep_every,
                self.config.save_errors,
                self.step,
                self.reporter.say,
            )
        incidents = NonFiniteRecorder(self.run, self.task, self.split, self.reporter.say)
        patient = self.accelerator.scaler is not None  # float16 finds its scale by updates that are not finite
        self.guard = FiniteGuard(self.state, self.flags, incidents, self.processes, patient)
        self.probe.weights(self.task.networks)
        self.guard.require_finite(self.step)

    def _open_run(self) -> None:
        if self.accelerator.is_main_process:
            self.run = RunDirectory(str(self.path))
            self.run.start(self.run_config)
            for message in [*shelf.remove_stale(self.run.path), *shelf.remove_stale(self.run.checkpoints)]:
                self.reporter.say(message)
        skipped = SkipLog((self.task.stream, self.task.validation), self.run, self.reporter.say, self.processes)
        self.logger = Logger(self.run, self.config.steps, skipped, self.reporter)

    def _find_checkpoint(self) -> Path | None:
        """The checkpoint to continue from, which fits the networks: known before anything is put on the device."""
        found = resume.agreed(self.processes, self.path / "checkpoints", self.start, self.reporter.say)
        if found is not None:
            weights = {f"model_{name}": network.state_dict() for name, network in self.task.networks.items()}
            checkpoint.require_fit(found, weights)
        return found

    def _place(self, fresh: bool) -> None:
        """Put networks on the device, ``fresh`` ones with their initial weights; make optimizers, average and state."""
        task, config, device = self.task, self.config, self.accelerator.device
        for network in task.networks.values():
            place(network, config, device)
        task.to(device)
        if fresh:
            task.initialize()
        self.optimizers = Optimizers(task.networks, config, self.accelerator.scaler)
        self.prepared = {name: self.accelerator.prepare_model(network) for name, network in task.networks.items()}
        self.ema = EMA(task.networks[task.averaged], config.ema_decay)  # of the weights that all processes now share
        self.best = BestModel(self.run_config.figure, config, self.ema, self.processes, self.reporter.say)
        parts = self.optimizers.each, self.ema, self.best, self.accelerator.scaler
        self.state = TrainingState(task, *parts, surroundings(device))

    def _resume(self, found: Path) -> None:
        self.step = self.state.load(found)
        self.reporter.say(f"resuming from update {self.step} ({found})")
        if self.start is not None and self.run and (moved := resume.set_aside(found)):
            self.reporter.say(moved)

    # ---------------------------------------------------------------- training

    def train(self) -> None:
        """Run to the last update, and export.

        Raises Interrupted after a signal, TrainingError where it cannot continue.
        """
        config, say, count = self.config, self.reporter.say, self.accelerator.num_processes
        with self.stop:
            starts.record(self.run, self.step, config.steps, count, self.accelerator.device, say)
            if self._over:  # killed before its export: a run that has one is not opened again
                say(f"already trained to update {self.step} of {config.steps}")
            else:
                say(
                    f"global batch {config.batch_size} = {count} process{'es' if count > 1 else ''}"
                    f" × {self.split.micro_batch} × {self.split.accumulation} accumulation,"
                    f" learning rate {config.lr:g}, {config.steps} updates"
                )
                self._train_and_save()
            self._finish()

    def _train_and_save(self) -> None:
        """Run updates up to the last or a signal, and save the state, also after an error."""
        config, first = self.config, self.step
        with ExitStack() as stack:
            if self.writer:
                stack.enter_context(self.writer)
            stack.enter_context(self.logger.tracking(config.trackers, self.step))
            feed = batches(self.task.stream, self.split, self.step, config.steps, self.workers)
            stack.enter_context(closing(feed))
            try:
                self._iterate(feed)
            except Exception as error:
                if self.writer and self.step > first:
                    self._save_before_the_end(error)
                raise
            self.processes.each(self._save_last)
        if not self._over:
            self.accelerator.wait_for_everyone()
            same = "the same command" if self.start is None else "the same command, without --from,"
            raise Interrupted(f"stopped and saved at update {self.step} of {config.steps}: {same} continues")

    def _iterate(self, feed: Iterator[Batch]) -> None:
        """Run one update after another, each with what is due after it."""
        started, first = time.monotonic(), self.step
        while not self._over and not self._stopping():
            metrics = self._update(feed)
            self.step += 1
            self._whole = True
            if self.flags.at_hand:
                self.guard.look_back(self.step)
            self._follow_up(metrics, (self.step - first) / (time.monotonic() - started))
        self.guard.look_back(self.step)
        self.guard.require_finite(self.step)

    @property
    def _over(self) -> bool:
        """True after the last update, be it that of ``train.steps`` or the one at which ``train.patience`` ends."""
        return self.step >= self.config.steps or self.best.over

    def _stopping(self) -> bool:
        """True if training ends before the next update: agreed by all processes, so one update later with several."""
        return self.flags.stop or (self.accelerator.num_processes == 1 and self.stop.asked)

    def _update(self, feed: Iterator[Batch]) -> dict[str, Tensor]:
        """One optimizer update from ``accumulation`` micro-batches; returns their mean metrics, still on the device."""
        task, n = self.task, self.split.accumulation
        networks = {**self.prepared, AVERAGE: self.ema}
        self.optimizers.begin(self.step, task.lr_scale)
        sums: dict[str, Tensor] = {}
        for i in range(n):
            batch = self._on_device(next(feed))
            self.probe.draws(batch, (*task.stream.draws.normals, *task.stream.draws.uniforms))
            with ExitStack() as stack:
                if i < n - 1:  # gradients are exchanged once, with the last micro-batch
                    for network in self.prepared.values():
                        stack.enter_context(self.accelerator.no_sync(network))
                metrics = task.micro_step(networks, batch, self.step, lambda loss: self.accelerator.backward(loss / n))
            sums = {k: v / n + sums.get(k, 0.0) for k, v in metrics.items()}
        self.probe.gradients(task.networks)
        self.guard.look_back(self.step)
        sums |= {f"grad_norm_{name}": self.optimizers.norm(name) for name in task.networks}
        finite = self.flags.send(self.stop.asked, torch.stack([torch.isfinite(v).all() for v in sums.values()]).all())
        self._whole = False
        self.optimizers.step(finite)
        self.ema.update(self.step, finite)
        task.after_update(self.step, self._mean, finite)
        return sums

    def _on_device(self, batch: Batch) -> Batch:
        device = self.accelerator.device
        return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def _follow_up(self, metrics: dict[str, Tensor], per_second: float) -> None:
        """Log, validate, draw previews and save, where one of them is due after update ``step``."""
        config, logger, last = self.config, self.logger, self.step == self.config.steps
        validating, saving = self.step % config.validate_every == 0 or last, self.step % config.checkpoint_every == 0
        if validating or saving:
            self.guard.look_back(self.step)
            self.guard.require_finite(self.step)
        values: dict[str, Any] = {}
        if self.step % config.log_every == 0 or last:
            values |= self._logged(metrics, per_second)
        try:
            if validating:
                with logger.timed("a validation"):
                    values |= self._validated()
        finally:  # what is known of the update is kept where its validation fails
            if values:
                logger.metrics(self.step, values)
        if values and self.writer:
            self.writer.poll()
        last = self._over  # a validation may be the last
        if last and self.guard.skipped and _validation_failed(values):
            then = "with them the validation is not finite, so nothing is exported"
            raise TrainingError(self.guard.describe(self.step, then))
        if self.step % config.sample_every == 0 or last:
            with logger.timed("drawing samples"):
                logger.pictures(self.step, self._drawn)
        if saving and not last:
            self._checkpoint()

    def _logged(self, metrics: dict[str, Tensor], per_second: float) -> dict[str, Any]:
        values = {k: float(self._mean(v.float())) for k, v in metrics.items()}
        return {**values, "lr": learning_rate(self.config, self.step - 1), "updates_per_second": per_second}

    def _validated(self) -> dict[str, Any]:
        rank, count = self.accelerator.process_index, self.accelerator.num_processes
        with self._averaged():
            metrics = self.task.validate(self.step, self._gather, rank, count)
        self.best.validated(self.step, metrics)
        return {f"validation/{k}": v for k, v in metrics.items()}

    def _drawn(self) -> dict[str, Any]:
        with self._averaged():
            return self.task.previews()

    def _finish(self) -> None:
        """Export, on the main process; the others wait."""
        early = self.best.end if self.step < self.config.steps else None
        if early is not None:
            self.reporter.say(f"update {self.step} of {self.config.steps}: {early['reason']}")
        if self.run:
            self.run.clear_export()
            with self._averaged():
                self.task.export(self.run.model)
            if self.best.weights is not None:
                with self.best.folder(self.run.best) as place, self._averaged(self.best.weights):
                    self.task.export(place)
            self.run.status("done", self.step, self.config.steps, early=early)
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _averaged(self, weights: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Networks as they are validated and exported.

        With the EMA's ``weights`` (None: the present ones), in evaluation mode, without gradients.
        """
        networks = self.task.networks
        with self.ema.swap(networks[self.task.averaged], weights), _evaluating(networks), torch.no_grad():
            yield

    # ---------------------------------------------------------------- saving

    def _checkpoint(self) -> None:
        """Write a checkpoint in the background (main process only); while updates are skipped, older ones stay."""
        if self.writer:
            scalars = self.state.scalars(self.step)
            thin = self.guard.skipped == 0
            self.writer.submit(self.step, self.state.tensors(), scalars, self.run_config, thin=thin)

    def _save_last(self) -> None:
        """Write the checkpoint that a training ends with; it is on the disk when this returns."""
        self._checkpoint()
        if self.writer:
            self.writer.wait()

    def _save_before_the_end(self, error: Exception) -> None:
        """Keep the updates since the last checkpoint, unless ``error`` says they are useless or cannot be kept."""
        if not self._whole or isinstance(error, (TrainingError, ProcessesDifferError, shelf.CheckpointError)):
            return
        known = self.guard.known_finite(self.step)
        if not known and (problem := not_finite(self.state.tensors(), self.state.scalars(self.step))):
            self.reporter.say(f"not saved: {problem} not finite after update {self.step}")
            return
        try:
            self._save_last()
        except Exception as second:  # a lost device, a full disk: the first error is the one to report
            self.reporter.say(f"not saved: {' '.join(str(second).split())}")
        else:
            self.reporter.say(f"saved at update {self.step}, before the end by an error")

    # ---------------------------------------------------------------- between processes

    def _mean(self, tensor: Tensor) -> Tensor:
        """Averaged over processes."""
        return cast(Tensor, self.accelerator.reduce(tensor, "mean"))

    def _sum(self, tensor: Tensor) -> Tensor:
        """Added up over processes."""
        return cast(Tensor, self.accelerator.reduce(tensor, "sum"))

    def _gather(self, tensor: Tensor) -> Tensor:
        """Gathered from all processes, along the first dimension."""
        return cast(Tensor, self.accelerator.gather(tensor))


def _validation_failed(values: dict[str, Any]) -> bool:
    losses = [v for key, v in values.items() if key.startswith("validation/") and isinstance(v, float)]
    return not all(map(math.isfinite, losses))


@contextmanager
def _evaluating(networks: dict[str, nn.Module]) -> Iterator[None]:
    training = {name: network.training for name, network in networks.items()}
    try:
        for network in networks.values():
            network.eval()
        yield
    finally:
        for name, network in networks.items():
            network.train(training[name])
