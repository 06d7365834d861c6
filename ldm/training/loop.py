"""The one training loop, on accelerate: accumulation, clipping, EMA, checkpoints, resume, validation, trackers.

What is trained is a Task: it owns networks and says what one micro-batch contributes. The loop owns the rest. An
update depends on its number alone (data and noise are functions of position), so a resumed run needs only its step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
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
from ldm.training.diagnostics.nonfinite import NonFiniteRecorder
from ldm.training.ema import EMA
from ldm.training.finite import not_finite
from ldm.training.logger import Recorder
from ldm.training.optimizers import Optimizers, learning_rate
from ldm.training.precision import accelerator_of, set_backends
from ldm.training.rank_checks import Probe, ProcessesDifferError
from ldm.training.skipped import SkipLog
from ldm.training.state import TrainingState
from ldm.training.step_flags import StepFlags
from ldm.training.stopping import Stop
from ldm.training.task import Reporter, Task

MAX_NONFINITE = 10  # updates in a row with a non-finite gradient, after which training is given up
ADVICE = "lower train.lr, or check the data"


class TrainingError(UserError):
    """Training cannot continue; the message says why and what was saved."""

    exit_code = 5
    everywhere = True


class Interrupted(UserError):
    """The run was asked to stop; its state is saved and the same command continues."""

    exit_code = 75
    everywhere = True  # agreed: every process raises it


class Loop:
    """Training of one task in one run directory."""

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
        """``start``: the checkpoint to continue from, by its update or its folder; None: the newest intact one."""
        self.task, self.config, self.run_config, self.reporter, self.workers = (
            task,
            config,
            run_config,
            reporter,
            workers,
        )
        self.processes, _ = launched()
        self.accelerator = accelerator_of(config.mixed_precision)
        self.split: BatchPlan = plan_batch(
            config.batch_size, config.micro_batch, self.processes.count, self.processes.rank
        )
        set_backends(config)
        self.step = 0
        self.run = RunDirectory(path) if self.accelerator.is_main_process else None
        self.probe = Probe(self.processes)
        skipped = SkipLog((task.stream, task.validation), self.run, reporter.say, self.processes)
        self.recorder = Recorder(self.run, config.steps, skipped, reporter)
        self.stop = Stop(reporter.say, self.accelerator.is_main_process)
        self.flags = StepFlags(self._sum, self.accelerator.device)
        self._whole = True  # between updates: networks, average and task are all after update `step`
        self._broken = 0  # updates in a row that were not finite
        self._finite: int | None = None  # the last update after which the whole state was found finite
        self._without = "" if start is None else ", without --from,"
        try:
            self._prepare(path, start)
        except BaseException as error:
            if self.run:
                self.run.fail(error)
                self.run.close()
            raise

    def _prepare(self, path: str, start: str | None) -> None:
        config, task, device = self.config, self.task, self.accelerator.device
        if self.run:
            self.run.start(self.run_config)
            for message in [*shelf.remove_stale(self.run.path), *shelf.remove_stale(self.run.checkpoints)]:
                self.reporter.say(message)
        found = resume.agreed(self.processes, Path(path) / "checkpoints", start, self.reporter.say)
        if found is not None:  # before anything is put on the device
            checkpoint.require_fit(
                found, {f"model_{name}": network.state_dict() for name, network in task.networks.items()}
            )
        for network in task.networks.values():
            network.to(device)
            if config.channels_last:
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            if hasattr(network, "gradient_checkpointing"):
                network.gradient_checkpointing = config.gradient_checkpointing  # type: ignore[assignment]
        task.to(device)
        if found is None:
            task.initialize()
        self.optimizers = Optimizers(task.networks, config, self.accelerator.scaler)
        if config.compile:
            for network in task.networks.values():
                network.compile()
        task.wrapped = {name: self.accelerator.prepare_model(network) for name, network in task.networks.items()}
        self.ema = EMA(task.networks[task.averaged], config.ema_decay)  # of the weights that all processes now share
        self.state = TrainingState(task, self.optimizers.each, self.ema, self.accelerator.scaler, surroundings(device))
        if found is not None:
            self.step = self.state.load(found)
            self.reporter.say(f"resuming from update {self.step} ({found})")
            if start is not None and self.run and (moved := resume.set_aside(found)):
                self.reporter.say(moved)
        self.writer: BackgroundWriter | None = None  # the main process's
        if self.run:
            self.run.cut_back(self.step)
            self.writer = BackgroundWriter(
                self.run.checkpoints, config.keep_checkpoints, config.keep_every, config.save_errors, self.step, self.reporter.say
            )  # fmt: skip
        self.incidents = NonFiniteRecorder(self.run, task, self.split, self.reporter.say)
        self.probe.weights(task.networks)
        self._require_finite()

    def _require_finite(self) -> None:
        """Raise TrainingError, on all processes, where anything that a checkpoint would keep is not finite on any of them."""
        if self._finite == self.step:
            return
        problem = not_finite(self.state.tensors(), self.state.scalars(self.step))
        broken = next((one for one in self.processes.gather(problem) if one is not None), None)
        if broken is None:
            self._finite = self.step
        elif self._finite is None:
            advice = "check init" if self.step == 0 else "continue from an earlier checkpoint by --from"
            raise TrainingError(f"{broken} not finite at the start, after update {self.step}: {advice}")
        else:
            raise TrainingError(
                f"{broken} not finite after update {self.step - self._broken} (after update {self._finite} all was finite): this is neither"
                f" saved nor exported, and earlier checkpoints stay; {ADVICE}"
            )

    def _checkpoint(self) -> None:
        """Write the state in the background; the main process writes. While updates are skipped no older checkpoint makes room."""
        if self.writer:
            scalars = self.state.scalars(self.step)
            self.writer.submit(self.step, self.state.tensors(), scalars, self.run_config, thin=self._broken == 0)

    def _save_last(self) -> None:
        """The save that a training ends with, on the disk when this returns."""
        self._checkpoint()
        if self.writer:
            self.writer.wait()

    def train(self) -> None:
        """Run to the last update, and export. Raises Interrupted after a signal, TrainingError where it cannot continue."""
        try:
            with self.stop:
                starts.record(
                    self.run,
                    self.step,
                    self.config.steps,
                    self.accelerator.num_processes,
                    self.accelerator.device,
                    self.reporter.say,
                )
                self._train()
        except BaseException as error:
            stopped = isinstance(error, (Interrupted, KeyboardInterrupt))
            if self.run:
                self.run.status("interrupted" if stopped else "failed", self.step, self.config.steps, error)
            raise
        finally:
            if self.run:
                self.run.close()

    def _train(self) -> None:
        config, processes = self.config, self.accelerator.num_processes
        if self.step >= config.steps:
            self.reporter.say(f"already trained to update {self.step} of {config.steps}")
            self._finish()  # a run that has all is not opened again: this one was killed before its export
            return
        self.reporter.say(
            f"global batch {config.batch_size} = {processes} process{'es' if processes > 1 else ''} × {self.split.micro_batch}"
            f" × {self.split.accumulation} accumulation, learning rate {config.lr:g}, {config.steps} updates"
        )
        with ExitStack() as stack:
            if self.writer:
                stack.enter_context(self.writer)
            stack.enter_context(self.recorder.open(config.trackers, self.step))
            feed = stack.enter_context(
                closing(batches(self.task.stream, self.split, self.step, config.steps, self.workers))
            )
            first = self.step
            try:
                self._updates(feed)
            except Exception as error:
                if self.writer and self.step > first:
                    self._save_before_the_end(error)
                raise
            self.processes.each(self._save_last)
        if self.step < config.steps:
            self.accelerator.wait_for_everyone()
            raise Interrupted(
                f"stopped and saved at update {self.step} of {config.steps}: the same command{self._without} continues"
            )
        self._finish()

    def _save_before_the_end(self, error: Exception) -> None:
        """Keep the updates since the last checkpoint, unless the error says that they are worth nothing or cannot be kept."""
        if not self._whole or isinstance(error, (TrainingError, ProcessesDifferError, shelf.CheckpointError)):
            return
        if self._finite != self.step and (problem := not_finite(self.state.tensors(), self.state.scalars(self.step))):
            self.reporter.say(f"not saved: {problem} not finite after update {self.step}")
            return
        try:
            self._save_last()
        except Exception as second:  # a lost device, a full disk: the first error is the one to tell
            self.reporter.say(f"not saved: {' '.join(str(second).split())}")
        else:
            self.reporter.say(f"saved at update {self.step}, before the end by an error")

    def _updates(self, feed: Iterator[Batch]) -> None:
        config, recorder = self.config, self.recorder
        started, first = time.monotonic(), self.step
        while self.step < config.steps and not self._stopping():
            metrics = self._update(feed)
            self.step += 1
            self._whole = True
            if self.flags.at_hand:
                self._look_back()
            last = self.step == config.steps
            saving = self.step % config.checkpoint_every == 0 and not last
            if saving or last or self.step % config.validate_every == 0:
                self._look_back()
                self._require_finite()
            values: dict[str, Any] = {}
            if self.step % config.log_every == 0 or last:
                values |= self._logged(metrics, (self.step - first) / (time.monotonic() - started))
            try:
                if self.step % config.validate_every == 0 or last:
                    with recorder.timed("a validation"):
                        values |= self._validated()
            finally:  # what is known of the update is kept where its validation fails
                if values:
                    recorder.figures(self.step, values)
            if values and self.writer:
                self.writer.poll()
            if last and self._broken and _validation_failed(values):
                raise TrainingError(self._skipped("with them the validation is not finite, so nothing is exported"))
            if self.step % config.sample_every == 0 or last:
                with recorder.timed("drawing samples"):
                    recorder.pictures(self.step, self._drawn)
            if saving:
                self._checkpoint()
        self._look_back()
        self._require_finite()

    def _stopping(self) -> bool:
        """True if training ends before the next update: agreed by all processes, so one update later with several."""
        return self.flags.stop or (self.accelerator.num_processes == 1 and self.stop.asked)

    def _look_back(self) -> None:
        """Take note where the update before was not finite, while the weights are still those that it had. Raises TrainingError."""
        finite = self.flags.receive()
        if finite is not False:
            self._broken = self._broken if finite is None else 0
            return
        self._broken += 1
        if self.accelerator.scaler is None or self._broken == MAX_NONFINITE:  # float16 looks for its scale that way
            self.incidents.record(self.step - 1, self._broken == 1)
        if self._broken == 1:
            self._require_finite()  # no later update would be finite
        if self._broken >= MAX_NONFINITE:
            raise TrainingError(self._skipped(f"`ldm replay {self.incidents.newest}` names the module"))

    def _skipped(self, then: str) -> str:
        """A line on the updates that were skipped since the last that was not."""
        last = self.step - self._broken
        return f"the last {self._broken} updates were not finite, so the weights are those after update {last}: {then}; {ADVICE}"

    def _update(self, feed: Iterator[Batch]) -> dict[str, Tensor]:
        """One optimizer update from ``accumulation`` micro-batches; returns their mean metrics, still on the device."""
        task, n = self.task, self.split.accumulation
        self.optimizers.begin(self.step, task.lr_scale)
        sums: dict[str, Tensor] = {}
        for i in range(n):
            batch = {
                k: v.to(self.accelerator.device, non_blocking=True) if isinstance(v, Tensor) else v
                for k, v in next(feed).items()
            }
            self.probe.draws(batch, (*task.stream.draws.normals, *task.stream.draws.uniforms))
            with ExitStack() as stack:
                if i < n - 1:  # gradients are exchanged once, with the last micro-batch
                    for network in task.wrapped.values():
                        stack.enter_context(self.accelerator.no_sync(network))
                metrics = task.micro_step(batch, self.step, lambda loss: self.accelerator.backward(loss / n))
            sums = {k: v / n + sums.get(k, 0.0) for k, v in metrics.items()}
        self.probe.gradients(task.networks)
        self._look_back()
        sums |= {f"grad_norm_{name}": self.optimizers.norm(name) for name in task.networks}
        finite = self.flags.send(self.stop.asked, torch.stack([torch.isfinite(v).all() for v in sums.values()]).all())
        self._whole = False
        self.optimizers.step(finite)
        self.ema.update(self.step, finite)
        task.after_update(self.step, self._mean, finite)
        return sums

    def _logged(self, metrics: dict[str, Tensor], per_second: float) -> dict[str, Any]:
        values = {k: float(self._mean(v.float())) for k, v in metrics.items()}
        return {**values, "lr": learning_rate(self.config, self.step - 1), "updates_per_second": per_second}

    def _validated(self) -> dict[str, Any]:
        network = self.task.networks[self.task.averaged]
        with self.ema.swap(network), _evaluating(self.task.networks), torch.no_grad():
            figures = self.task.validate(
                self.step, self._gather, self.accelerator.process_index, self.accelerator.num_processes
            )
        return {f"validation/{k}": v for k, v in figures.items()}

    def _drawn(self) -> dict[str, Any]:
        with self.ema.swap(self.task.networks[self.task.averaged]), _evaluating(self.task.networks), torch.no_grad():
            return self.task.previews()

    def _finish(self) -> None:
        if self.run:
            self.run.clear_export()
            with (
                self.ema.swap(self.task.networks[self.task.averaged]),
                _evaluating(self.task.networks),
                torch.no_grad(),
            ):
                self.task.export(self.run)
            self.run.status("done", self.step, self.config.steps)
        self.accelerator.wait_for_everyone()

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
    return any(
        key.startswith("validation/") and isinstance(v, float) and not math.isfinite(v) for key, v in values.items()
    )


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
