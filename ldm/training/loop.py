"""The one training loop, on accelerate: accumulation, clipping, EMA, checkpoints, resume, validation, trackers.

What is trained is a Task: it owns networks and says what one micro-batch contributes. The loop owns the rest. An
update depends on its number alone (data and noise are functions of position), so a resumed run needs only its step.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ldm.config import ConfigError, TrainConfig
from ldm.data.stream import Batch, Split, batches, split_batch
from ldm.evaluation.record import RunError
from ldm.training import checkpoint
from ldm.training.ema import EMA
from ldm.training.launch import launched
from ldm.training.probe import Probe
from ldm.training.run import RunDirectory
from ldm.training.skipped import SkipLog
from ldm.training.task import Reporter, Task
from ldm.training.trackers import open_trackers

MAX_NONFINITE = 10  # updates in a row with a non-finite gradient, after which training is given up


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what was saved."""

    exit_code = 5


class Interrupted(RuntimeError):
    """The run was asked to stop; its state is saved and the same command goes on."""

    exit_code = 75
    everywhere = True  # agreed: every process raises it


def learning_rate(config: TrainConfig, update: int) -> float:
    """The rate of update ``update`` (from 0): linear warm-up, then constant or a cosine down to ``lr_end``."""
    if update < config.warmup:
        return config.lr * (update + 1) / config.warmup
    if config.lr_schedule == "constant":
        return config.lr
    progress = (update - config.warmup) / max(config.steps - config.warmup, 1)
    return config.lr * (config.lr_end + (1 - config.lr_end) * 0.5 * (1 + math.cos(math.pi * progress)))


class Loop:
    """Training of one task in one run directory."""

    def __init__(self, task: Task, config: TrainConfig, run_config: Any, path: str, workers: int, reporter: Reporter) -> None:
        self.task, self.config, self.run_config, self.reporter, self.workers = task, config, run_config, reporter, workers
        self.processes, _ = launched()
        try:
            self.accelerator = Accelerator(mixed_precision=config.mixed_precision)
        except ValueError as error:  # a precision that the device lacks
            raise ConfigError(f"train.mixed_precision {config.mixed_precision}: {' '.join(str(error).split())}") from None
        if config.mixed_precision != "no" and not self.accelerator.native_amp:  # accelerate would go on in float32
            raise ConfigError(f"train.mixed_precision {config.mixed_precision} is not offered on {self.accelerator.device}: use no or bf16")
        self.split: Split = split_batch(config.batch_size, config.micro_batch, self.processes.count, self.processes.rank)
        _set_backends(config)
        self.step = 0
        self.run = RunDirectory(path) if self.accelerator.is_main_process else None
        self.probe = Probe(self.processes)
        self.skipped = SkipLog((task.stream, task.validation), self.run, reporter.say, self.processes)
        self._stop: int | None = None
        self._nonfinite = torch.zeros((), device=self.accelerator.device)
        try:
            self._prepare(path)
        except BaseException:
            if self.run:
                self.run.close()
            raise

    def _prepare(self, path: str) -> None:
        config, task, device = self.config, self.task, self.accelerator.device
        if self.run:
            self.run.start(self.run_config)
            for message in checkpoint.remove_stale(self.run.path):
                self.reporter.say(message)
        for network in task.networks.values():
            network.to(device)
            if config.channels_last:
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            if hasattr(network, "gradient_checkpointing"):
                network.gradient_checkpointing = config.gradient_checkpointing  # type: ignore[assignment]
        task.to(device)
        found = self._newest_checkpoint(path)
        if found is None:
            task.begin()
        self.optimizers = {
            name: torch.optim.AdamW(
                network.parameters(), lr=config.lr, betas=config.betas, eps=config.adam_eps, weight_decay=config.weight_decay, fused=True
            )  # type: ignore[arg-type]
            for name, network in task.networks.items()
        }
        if config.compile:
            for network in task.networks.values():
                network.compile()
        task.wrapped = {name: self.accelerator.prepare_model(network) for name, network in task.networks.items()}
        self.ema = EMA(task.networks[task.averaged], config.ema_decay)  # of the weights that all processes now share
        if found is not None:
            self._resume(found)
        if self.run:
            self.run.cut_back(self.step)
        self.probe.weights(task.networks)

    def _newest_checkpoint(self, path: str) -> Path | None:
        """The newest intact checkpoint of the run, if there is one."""
        found, problems = checkpoint.newest_valid(Path(path) / "checkpoints")
        for problem in problems:
            self.reporter.say(f"skipped a damaged checkpoint: {problem}")
        return found

    def _resume(self, found: Path) -> None:
        """Take over a checkpoint that has been verified."""
        tensors, state = checkpoint.load(found, verify=False)
        if "data" in state:  # checkpoints of before did not keep it
            self._check_data(state["data"])
        self.task.load_state(state["task"])
        for name, network in self.task.networks.items():
            network.load_state_dict(tensors[f"model_{name}"])
            checkpoint.restore_optimizer(self.optimizers[name], [n for n, _ in network.named_parameters()], tensors[f"optimizer_{name}"])
        self.ema.load(tensors["ema"])
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.reporter.say(f"going on from update {self.step} ({found})")

    def _data(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data it was trained on."""
        train, validation = self.task.stream.source, self.task.validation.source
        return {"images": train.length, "train": train.fingerprint, "validation": validation.fingerprint}

    def _check_data(self, before: dict[str, Any]) -> None:
        """Going on with other images is a decision, not an accident. Raises RunError."""
        now = self._data()
        if now != before and not self.task.stream.data.accept_changes:
            raise RunError(
                f"the images or captions have changed since this run began ({before['images']} training images then, {now['images']} now):"
                " restore them, use another run: directory, or go on with them by data.accept_changes=true"
            )

    def _checkpoint(self, writer: checkpoint.BackgroundWriter) -> None:
        tensors: dict[str, Mapping[str, Tensor]] = {"ema": self.ema.state()}
        for name, network in self.task.networks.items():
            tensors[f"model_{name}"] = network.state_dict()
            tensors[f"optimizer_{name}"] = checkpoint.optimizer_tensors(self.optimizers[name], [n for n, _ in network.named_parameters()])
        scaler = self.accelerator.scaler
        state = {
            "step": self.step,
            "task": self.task.state(),
            "data": self._data(),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        writer.submit(self.step, tensors, state, self.run_config)

    def train(self) -> None:
        """Run to the last update, and export. Raises Interrupted after a signal, TrainingError where it cannot go on."""
        try:
            self._train()
        except BaseException as error:
            stopped = isinstance(error, (Interrupted, KeyboardInterrupt))
            if self.run:
                self.run.status("interrupted" if stopped else "failed", self.step, self.config.steps)
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
        self.skipped.update()  # what was left out before training
        with ExitStack() as stack:
            stack.enter_context(_signals(self))
            writer = stack.enter_context(checkpoint.BackgroundWriter(self.run.checkpoints, config.keep_checkpoints)) if self.run else None
            trackers = open_trackers(config.trackers, self.run.path, self.step) if self.run else None
            if trackers:
                stack.callback(trackers.close)
            feed = batches(self.task.stream, self.split, self.step, config.steps, self.workers)
            self._updates(stack.enter_context(closing(feed)), writer, trackers)  # closed: ends the data workers, come what may
            interrupted = self._agreed_stop()
            if writer:
                self._checkpoint(writer)
        if interrupted and self.step < config.steps:
            self.accelerator.wait_for_everyone()
            raise Interrupted(f"stopped and saved at update {self.step} of {config.steps}: the same command goes on")
        self._finish()

    def _updates(self, feed: Iterator[Batch], writer: checkpoint.BackgroundWriter | None, trackers: Any) -> None:
        config = self.config
        started, first = time.monotonic(), self.step
        while self.step < config.steps and not self._agreed_stop():
            metrics = self._update(feed)
            self.step += 1
            last = self.step == config.steps
            values: dict[str, Any] = {}
            if self.step % config.log_every == 0 or last:
                values |= self._logged(metrics, (self.step - first) / (time.monotonic() - started))
            if self.step % config.validate_every == 0 or last:
                values |= self._validated()
            if values:
                self.skipped.update()
            if values and self.run:
                self.run.log(self.step, values)
                trackers.scalars(self.step, {k: v for k, v in values.items() if isinstance(v, (int, float))})
                self.reporter.progress(self.step, config.steps, values)
                self.run.status("running", self.step, config.steps)
            if (self.step % config.sample_every == 0 or last) and self.run:
                self._draw(trackers)
            if self.step % config.checkpoint_every == 0 and not last and writer:
                self._checkpoint(writer)

    def _update(self, feed: Iterator[Batch]) -> dict[str, Tensor]:
        """One optimizer update from ``accumulation`` micro-batches; returns their mean metrics, still on the device."""
        config, task, n = self.config, self.task, self.split.accumulation
        for name, optimizer in self.optimizers.items():
            optimizer.param_groups[0]["lr"] = learning_rate(config, self.step) * task.lr_scale(name)
            optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        for i in range(n):
            batch = {k: v.to(self.accelerator.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in next(feed).items()}
            self.probe.draws(batch, (*task.stream.draws.normals, *task.stream.draws.uniforms))
            with ExitStack() as stack:
                if i < n - 1:  # gradients are exchanged once, with the last micro-batch
                    for network in task.wrapped.values():
                        stack.enter_context(self.accelerator.no_sync(network))
                metrics = task.micro_step(batch, self.step, lambda loss: self.accelerator.backward(loss / n))
            sums = {k: v / n + sums.get(k, 0.0) for k, v in metrics.items()}
        self.probe.gradients(task.networks)
        finite = torch.ones((), dtype=torch.bool, device=self.accelerator.device)
        for name, optimizer in self.optimizers.items():
            norm = self._step(optimizer, list(task.networks[name].parameters()))
            finite &= torch.isfinite(norm)
            sums[f"grad_norm_{name}"] = norm
        self._nonfinite = torch.where(finite, torch.zeros_like(self._nonfinite), self._nonfinite + 1)
        self.ema.update(self.step)
        task.after_update(self.step, self._mean)
        return sums

    def _step(self, optimizer: torch.optim.AdamW, parameters: list[nn.Parameter]) -> Tensor:
        """Clip and step. A non-finite gradient leaves weights and moments as they are, decided on the device."""
        if optimizer.param_groups[0]["lr"] == 0.0 or all(p.grad is None for p in parameters):
            return torch.zeros((), device=self.accelerator.device)
        scaler = self.accelerator.scaler
        if scaler is not None:
            scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, self.config.clip if self.config.clip is not None else math.inf)
        if scaler is not None:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]  # fused AdamW skips where it is 1
            optimizer.step()
        return norm.detach()

    def _logged(self, metrics: dict[str, Tensor], per_second: float) -> dict[str, Any]:
        values = {k: float(self._mean(v.float())) for k, v in metrics.items()}
        if (skipped := int(self._nonfinite)) >= MAX_NONFINITE:
            raise TrainingError(
                f"the gradient was not finite in the last {skipped} updates: lower train.lr, or check the data; weights are those before"
            )
        return {**values, "lr": learning_rate(self.config, self.step - 1), "updates_per_second": per_second}

    def _validated(self) -> dict[str, Any]:
        network = self.task.networks[self.task.averaged]
        with self.ema.swap(network), _evaluating(self.task.networks), torch.no_grad():
            figures = self.task.validate(self.step, self._gather, self.accelerator.process_index, self.accelerator.num_processes)
        return {f"validation/{k}": v for k, v in figures.items()}

    def _draw(self, trackers: Any) -> None:
        from PIL import Image

        assert self.run is not None
        with self.ema.swap(self.task.networks[self.task.averaged]), _evaluating(self.task.networks), torch.no_grad():
            pictures = self.task.pictures()
        self.run.samples.mkdir(exist_ok=True)
        for name, picture in pictures.items():
            Image.fromarray(picture).save(self.run.samples / f"{name}-{self.step:08d}.png")
            trackers.image(self.step, name, picture)

    def _finish(self) -> None:
        if self.run:
            with self.ema.swap(self.task.networks[self.task.averaged]), _evaluating(self.task.networks), torch.no_grad():
                self.task.export(self.run)
            self.run.status("done", self.step, self.config.steps)
        self.accelerator.wait_for_everyone()

    def _mean(self, tensor: Tensor) -> Tensor:
        """Averaged over processes."""
        return cast(Tensor, self.accelerator.reduce(tensor, "mean"))

    def _gather(self, tensor: Tensor) -> Tensor:
        """Of all processes, along the first dimension."""
        return cast(Tensor, self.accelerator.gather(tensor))

    def _agreed_stop(self) -> bool:
        """Whether any process was asked to stop: the same answer on all of them."""
        asked = torch.tensor(float(self._stop is not None), device=self.accelerator.device)
        return bool(self._mean(asked) > 0) if self.accelerator.num_processes > 1 else self._stop is not None


@contextmanager
def _signals(loop: Loop) -> Iterator[None]:
    """SIGINT and SIGTERM stop the loop at the end of the update; a second one stops at once."""

    def handle(number: int, frame: Any) -> None:
        if loop._stop is not None:
            raise KeyboardInterrupt
        loop._stop = number
        loop.reporter.say("stopping after this update (once more: at once)")

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


def _set_backends(config: TrainConfig) -> None:
    torch.set_flush_denormal(True)  # denormals make CPU convolutions many times slower
    if config.deterministic:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    elif torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
