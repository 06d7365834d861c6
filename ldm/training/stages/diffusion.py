"""Stage 2: the step, validation and export of the latent diffusion model (docs/equations.md T1, L1, L2, L4, L7)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoencoder.config import AutoencoderConfig
from ldm.config import LEARNED, NONE, NULL_CAPTION, ConfigError, DiffusionTrainingConfig, to_dict
from ldm.data import latent_cache as cache
from ldm.data.dataset import Batch, RandomFields, Stream, scattered, validation_batches
from ldm.data.sources import open_source
from ldm.data.transforms import grid, to_uint8
from ldm.diffusion.condition import Condition
from ldm.diffusion.learned_schedule import InputTap, LearnedSchedule, error_and_slope, schedule_loss
from ldm.diffusion.objective import Objective
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.timesteps import Timesteps, uniform_timesteps
from ldm.distributed.launch import launched
from ldm.errors import FolderError
from ldm.interop.bundle import UNET
from ldm.interop.diffusers.lora_folder import Reference
from ldm.interop.lora import FILE as LORA_FILE
from ldm.interop.lora import write_lora
from ldm.models.lora import Lora
from ldm.models.unet import NetworkSpec
from ldm.pipeline import Pipeline
from ldm.pipeline.codec import autoencoder_config, load_codec
from ldm.pipeline.info import load_unet
from ldm.runs.checkpoints import folder as shelf
from ldm.runs.directory import RunDirectory
from ldm.training.stages.finetune import check_initial, initial_unet
from ldm.training.stages.latents import diffused, ensure_cache
from ldm.training.task import seeded

PICTURES = 8
COUNTED = 20_000  # captions at most that are counted as too long where they are encoded in the step
# On the gradients of a learned schedule, which AdamW does not notice. The steps with the largest are drawn rarely, and the run's
# clip would shorten these alone: the mean would point elsewhere.
UNCLIPPED = 1e-5
BINS = 10  # parts of 1…T for which the validation loss is reported apart


class DiffusionTask:
    """Trains ``unet`` on latents (or pixels) of the data, given its captions."""

    averaged = "unet"

    def __init__(self, config: DiffusionTrainingConfig, say: Callable[[str], None]) -> None:
        self.config, data, seed = config, config.data, config.train.seed
        self.codec = None
        if config.autoencoder != NONE:
            self._check_data(autoencoder_config(config.autoencoder))
            self.codec = load_codec(config.autoencoder)
        self.text = self._text_encoder()
        self._frozen = {"autoencoder": self.codec and self.codec.hash, "text": self.text and self.text.hash}
        channels, side = self._latent()
        self.source = open_source(data, "train")
        validation = open_source(data, "validation")
        context_dim = self.text.width if self.text else None
        out_channels = 2 * channels if config.objective.learned_variance else channels
        self._make_unet(NetworkSpec(config.unet, channels, out_channels, context_dim))
        self.networks: dict[str, nn.Module] = {"unet": self.lora or self.unet}
        self.learned = LearnedSchedule(config.schedule) if config.schedule.name == LEARNED else None
        if self.learned is not None:
            self.networks["schedule"] = self.learned
        self.wrapped = self.networks
        self._set_process(
            self.learned.schedule() if self.learned else Schedule.from_config(config.schedule), torch.device("cpu")
        )
        normals = {"eps": (channels, side, side)} | ({"posterior": (channels, side, side)} if self.codec else {})
        self.stream = Stream(self.source, data, seed, RandomFields(normals, ("t", "drop")), self._cache(say))
        self.validation = Stream(validation, data, seed, RandomFields(normals), validation=True)
        self._table: Any = None  # made in `to`, on the device
        self._say = say
        self.prompts = list(config.prompts) or [
            validation.text(i) for i in range(min(PICTURES, validation.length or PICTURES))
        ]

    def _make_unet(self, spec: NetworkSpec) -> None:
        """The network that is trained: fresh (``begin`` may give it weights), or low-rank changes of one that is read here."""
        config, seed = self.config, self.config.train.seed
        self.lora, self.base, self._spec = None, None, spec
        self._init_hash: str | None = None  # of the weights that the whole U-Net began with
        if config.init is not None and (config.train.lora or not shelf.steps(Path(config.run) / "checkpoints")):
            self.base = check_initial(config, spec, self.text)
        if (lora := config.train.lora) is None:
            self.unet = seeded(seed, spec.make)
            return
        assert self.base is not None
        self._base_hash = self.base.hash  # of all its weights: once, for it takes seconds where they are large
        self.unet = initial_unet(self.base, config.train.mixed_precision)
        self.lora = seeded(seed, lambda: Lora.fresh(self.unet, lora))
        self.lora.attach()

    def _check_data(self, model: AutoencoderConfig) -> None:
        data = self.config.data
        if model.image_channels != data.image_channels:
            raise ConfigError(
                f"data.image_channels is {data.image_channels} but the autoencoder takes {model.image_channels}"
            )
        if data.image_size % model.factor:
            raise ConfigError(
                f"data.image_size {data.image_size} is not a multiple of {model.factor} (the autoencoder's factor)"
            )

    def _latent(self) -> tuple[int, int]:
        """Channels and side of what is diffused."""
        data = self.config.data
        if self.codec is None:
            return data.image_channels, data.image_size
        model = self.codec.autoencoder.config
        return model.latent_channels, data.image_size // model.factor

    def _text_encoder(self) -> Any:
        if self.config.text == NONE:
            return None
        from ldm.interop.text import read_text  # transformers takes seconds to import

        try:
            return read_text(self.config.text)
        except FolderError as error:
            raise ConfigError(f"text: {error}") from None

    def _cache(self, say: Callable[[str], None]) -> cache.LatentCache | None:
        """The latent cache beside the run, written first where there is none yet."""
        if self.codec is None or not self.config.cache_latents:
            return None
        return ensure_cache(self.config, self.codec.autoencoder, self.source, say, *launched())

    def _caption_table(self) -> Any:
        """The states of all captions of a small set, encoded once; None where they are encoded in the step."""
        captions = self.source.captions(self.config.cache_captions) if self.config.cache_captions else None
        if captions is None:
            counted = min(COUNTED, self.source.length or COUNTED)
            self._say_cut(self.text.tokenize([self.source.text(i) for i in range(counted)])[1], f"the first {counted}")
            return None
        from ldm.models.text import CaptionTable

        table = CaptionTable(self.text, captions, 256)
        self._say_cut(table.truncated, f"{len(table)} distinct")
        return table

    def _say_cut(self, cut: int, of: str) -> None:
        if cut:
            self._say(f"{cut} of {of} captions are longer than {self.text.max_length} tokens and are cut")

    @property
    def summary(self) -> list[str]:
        """Lines to print once, before training."""
        parameters = sum(p.numel() for p in self.unet.parameters())
        what = "pixels" if self.codec is None else "latents"
        notes = [
            f"U-Net of {parameters / 1e6:.2f} M parameters on {what} of {'×'.join(map(str, self.stream.draws.normals['eps']))}"
        ]
        if self.lora is not None:
            changed = sum(p.numel() for p in self.lora.parameters())
            notes.append(f"trained: LoRA of {changed / 1e6:.3f} M parameters in {len(self.lora.changes)} of its layers")
        return notes

    def lr_scale(self, network: str) -> float:
        """A learned schedule has a rate of its own."""
        return self.config.schedule.lr / self.config.train.lr if network == "schedule" else 1.0

    def to(self, device: torch.device) -> None:
        if self.lora is not None:
            self.unet.to(device)
            if self.config.train.channels_last:
                self.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._set_process(self.schedule.to(device), device)
        if self.codec is not None:
            self.codec.autoencoder.to(device)
        if self.text is not None:
            self.text.to(device)
            self._table = self._caption_table()

    def _set_process(self, schedule: Schedule, device: torch.device) -> None:
        """The schedule with what is tabulated from it, and an empty history of losses."""
        config, steps, batch_size = self.config.objective, schedule.num_steps, self.config.train.batch_size
        self.device = device
        self._take_table(schedule)
        self.timesteps = Timesteps(config.timesteps, steps, batch_size, device)

    def _take_table(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.objective = Objective(self.config.objective, schedule, pixels=self.codec is None)

    def _refresh(self) -> None:
        """Take the table that a learned schedule has by now."""
        if self.learned is not None:
            self._take_table(self.learned.schedule())

    def micro_step(self, batch: Batch, update: int, backward: Callable[[Tensor], None]) -> dict[str, Tensor]:
        self._refresh()
        x0, eps = diffused(self.codec, batch), batch["eps"]
        t, weight = self.timesteps.draw(batch["t"], batch["position"])
        dropped = (batch["drop"] < self.config.caption_dropout).tolist()
        cond = self._condition(
            [NULL_CAPTION if drop else text for text, drop in zip(batch["text"], dropped, strict=True)]
        )
        watched = InputTap(self.wrapped["unet"]) if self.learned is not None else None
        terms = self.objective.terms(watched or self.wrapped["unet"], x0, eps, t, cond)
        loss = (weight * terms.total).mean()
        figures = {} if watched is None else self._train_schedule(watched, x0, eps, t, backward)
        backward(loss)
        self.timesteps.note(batch["position"], t, terms.total.detach())
        vlb = {} if terms.vlb is None else {"vlb": (weight * terms.vlb).mean().detach()}
        return {"loss": loss.detach(), **vlb, **figures}

    def _train_schedule(
        self, watched: InputTap, x0: Tensor, eps: Tensor, t: Tensor, backward: Callable[[Tensor], None]
    ) -> dict[str, Tensor]:
        """Gradients for the learned schedule, from the network's call that its own loss is made of; the network gets none."""
        error, slope = error_and_slope(self.schedule, self.config.objective.target, watched, x0, eps, t)
        loss, figures = schedule_loss(self.wrapped["schedule"](), t, error, slope, x0, eps, self.codec is None)
        backward(UNCLIPPED * loss)
        return figures

    def _condition(self, captions: list[str]) -> Condition:
        if self.text is None:
            return Condition()
        return Condition(context=self._table[captions] if self._table is not None else self.text.encode(captions))

    def initialize(self) -> None:
        """The initial weights are those of ``init``; they take nothing from the data."""
        if self.config.init is not None and self.lora is None:
            info = self.base or check_initial(self.config, self._spec, self.text)
            self.unet.load_state_dict(load_unet(info).state_dict())
            self._init_hash = info.hash

    def after_update(self, update: int, reduce: Callable[[Tensor], Tensor], finite: Tensor) -> None:
        """The timesteps of the next update may depend on the losses of this one."""
        self.timesteps.after_update(reduce, finite)

    def state(self) -> dict[str, Any]:
        given = {} if self._init_hash is None else {"init": self._init_hash}
        return {"timesteps": self.timesteps.state(), **self._frozen, **given} | (
            {} if self.lora is None else {"base": self._base_hash}
        )

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._init_hash = state.get("init")
        for name, value in self._frozen.items():  # older checkpoints lack them
            if state.get(name, value) != value:
                path = getattr(self.config, name)
                raise FolderError(
                    f"{name} {path}: its weights have changed since this run began: bring them back, or use another run:"
                )
        self.timesteps.load_state(state.get("timesteps", {}))  # older checkpoints lack it
        if self.lora is not None and state["base"] != self._base_hash:
            raise FolderError(
                f"init {self.config.init}: its weights have changed since this run began: bring them back, or begin anew"
            )

    def validate(self, update: int, gather: Callable[[Tensor], Tensor], rank: int, processes: int) -> dict[str, Any]:
        """Unweighted loss on fixed noise and stratified timesteps, whole and by tenths of 1…T, with its standard error."""
        self._refresh()
        train = self.config.train
        total = (
            train.validation_size
            if self.validation.source.length is None
            else min(train.validation_size, self.validation.source.length)
        )
        sums = torch.zeros(3, BINS, dtype=torch.float64, device=self.device)  # count, Σ loss, Σ loss²
        for positions, batch in validation_batches(self.validation, total, train.batch_size, rank, processes):
            moved = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            t = uniform_timesteps(scattered(positions, total), self.schedule.num_steps).to(self.device)
            cond = Condition(context=self.text.encode(moved["text"])) if self.text else Condition()
            loss = self.objective.terms(
                self.networks["unet"], diffused(self.codec, moved), moved["eps"], t, cond
            ).error.double()
            bins = t * BINS // self.schedule.num_steps
            sums.index_add_(1, bins, torch.stack([torch.ones_like(loss), loss, loss.square()]))
        sums = gather(sums[None]).sum(0).cpu()
        count, first, second = sums
        n, mean = count.sum(), first.sum() / count.sum()
        error = ((second.sum() / n - mean.square()).clamp(min=0) / n).sqrt()
        return {"loss": float(mean), "loss_error": float(error), "loss_by_t": (first / count).tolist()}

    def pipeline(self) -> Pipeline:
        """The model as it stands."""
        config = self.config
        schedule = config.schedule if self.learned is None else self.learned.given()
        return Pipeline(
            self.unet, schedule, config.objective.target, self.codec, self.text, config.data.image_size, config.sample,
            caption_dropout=config.caption_dropout if self.text else None,
        ).to(self.device)  # fmt: skip

    def previews(self) -> dict[str, np.ndarray]:
        """Samples of fixed prompts from fixed noise."""
        images = torch.cat(list(self.pipeline().sample(self.prompts, self.config.sample)))
        return {"samples": grid(to_uint8(images), PICTURES)}

    def export(self, run: RunDirectory) -> None:
        """Write ``model/``: the whole pipeline, or the LoRA with the name of the model that it changes."""
        if self.lora is None or self.base is None:
            self.pipeline().save_pretrained(run.model)
            return
        write_lora({UNET: self.lora}, run.model / LORA_FILE)
        extra = {"sample_size": self.config.data.image_size, "defaults": to_dict(self.config.sample)}
        extra["caption_dropout"] = self.config.caption_dropout if self.text else None
        Reference(run.model, self.base.path, self._base_hash, extra).write()
