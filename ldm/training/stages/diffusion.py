"""Stage 2: the step, validation and export of the latent diffusion model (docs/equations.md T1, L1, L2, L4, L7)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from autoencoder.config import AutoencoderConfig
from ldm.config import NONE, NULL_CAPTION, ConfigError, DataConfig, DiffusionTrainingConfig, ScheduleConfig
from ldm.data.dataset import Batch, RandomFields, Stream, scattered, validation_batches
from ldm.data.latent_cache import LatentCache
from ldm.data.sample import Source
from ldm.data.sources import open_source
from ldm.data.transforms import grid, to_uint8
from ldm.diffusion.condition import Condition
from ldm.diffusion.conditioner import Conditioner
from ldm.diffusion.guidance import Model
from ldm.diffusion.objective import Objective, Terms
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.timesteps import Timesteps, uniform_timesteps
from ldm.distributed.launch import launched
from ldm.errors import FolderError
from ldm.models.unet import NetworkSpec
from ldm.pipeline import Pipeline
from ldm.pipeline.codec import LatentCodec, autoencoder_config, load_codec, masked_condition
from ldm.training.stages.finetune import initial_conditioner
from ldm.training.stages.latents import diffused, ensure_cache
from ldm.training.stages.trained import Trained, make_trained
from ldm.training.task import Networks

T = TypeVar("T", bound="DiffusionTask")

PICTURES = 8
COUNTED = 20_000  # captions checked for length at most, if they are encoded in the step
BINS = 10  # equal parts of 1…T with a validation loss of their own
MEASURED = 10_000  # samples of an endless source whose columns are measured
JOINT = "drop/all"  # stream of the draws that drop everything at once


class Noising(NamedTuple):
    """Inputs of the denoising loss of one micro-batch; ``weight`` corrects for t that are not drawn uniformly."""

    x0: Tensor
    eps: Tensor
    t: Tensor
    weight: Tensor
    cond: Condition


class DiffusionTask:
    """Trains a U-Net (``trained``) on latents, or pixels, of the data, given its captions.

    Args:
        codec: the frozen autoencoder; None: x_0 is the image.
        text: the frozen text encoder; None: unconditional.
        cache: latents of the training split; None: they are encoded in the step.
        say: prints one line for the user.
        conditioner: encodes the columns that are conditions; None: there are none.
    """

    averaged = "unet"

    def __init__(
        self,
        config: DiffusionTrainingConfig,
        trained: Trained,
        codec: LatentCodec | None,
        text: Any,
        source: Source,
        validation: Source,
        cache: LatentCache | None,
        say: Callable[[str], None],
        conditioner: Conditioner | None = None,
    ) -> None:
        self.config, self.trained, self.codec, self.text, self.source = config, trained, codec, text, source
        self._say, self._frozen = say, {"autoencoder": codec and codec.hash, "text": text and text.hash}
        self.conditioner, encode, drops = conditioner, None, ["drop"]
        if conditioner is not None:
            encode, drops = conditioner.row, ["drop", JOINT, *(f"drop/{name}" for name in conditioner.names)]
        self._table: Any = None  # made in `to`, on the device
        self.networks: dict[str, nn.Module] = {"unet": trained.network}
        self._set_process(Schedule.from_config(self._schedule_config()), torch.device("cpu"))
        data, seed, shape = config.data, config.train.seed, _shape(config, codec)
        normals = {"eps": shape} | ({"posterior": shape} if codec else {})
        more: dict[str, Any] = {"encode": encode, "masks": config.inpaint}
        self.stream = Stream(source, data, seed, RandomFields(normals, ("t", *drops)), cache, **more)
        self.validation = Stream(validation, data, seed, RandomFields(normals), validation=True, **more)
        shown = range(min(PICTURES, validation.length or PICTURES))
        self.prompts = list(config.prompts) or [validation.text(i) for i in shown]
        self._check_validation()

    @classmethod
    def from_config(cls: type[T], config: DiffusionTrainingConfig, say: Callable[[str], None]) -> T:
        """Open what the configuration names; encode the data set if a latent cache is wanted and missing."""
        codec = None
        if config.autoencoder != NONE:
            _check_data(config.data, autoencoder_config(config.autoencoder))
            codec = load_codec(config.autoencoder)
        text = _text_encoder(config.text)
        source, validation = (open_source(config.data, split) for split in ("train", "validation"))
        conditioner = _conditioner(config, source)
        unet = replace(config.unet, vector_dim=conditioner.width) if conditioner else config.unet
        channels = _shape(config, codec)[0]
        unet = replace(unet, concat_channels=1 + channels) if config.inpaint else unet
        out_channels = 2 * channels if config.objective.learned_variance else channels
        trained = make_trained(config, NetworkSpec(unet, channels, out_channels, text.width if text else None), text)
        cache = None
        if codec is not None and config.cache_latents:
            cache = ensure_cache(config, codec.autoencoder, source, say, *launched())
        return cls(config, trained, codec, text, source, validation, cache, say, conditioner)

    def _check_validation(self) -> None:
        """Raise ConfigError for a value of the validation images that training images do not have."""
        if self.conditioner is None:
            return
        source, most = self.validation.source, self.config.train.validation_size
        for i in range(min(most, source.length or most)):
            try:
                self.conditioner.row(source.columns(i))
            except ConfigError as error:
                raise ConfigError(
                    f"conditions: in the validation split, not among the training images: {error}"
                ) from None

    def _caption_table(self) -> Any:
        """Text states of all captions of a small set, encoded once; None if captions are encoded in the step."""
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
        parameters = sum(p.numel() for p in self.trained.unet.parameters())
        kind, shape = (
            "pixels" if self.codec is None else "latents",
            "×".join(map(str, self.stream.draws.normals["eps"])),
        )
        return [f"U-Net of {parameters / 1e6:.2f} M parameters on {kind} of {shape}", *self.trained.summary]

    def lr_scale(self, network: str) -> float:
        return 1.0

    def to(self, device: torch.device) -> None:
        self.trained.to(device)
        self._set_process(self.schedule.to(device), device)
        if self.codec is not None:
            self.codec.autoencoder.to(device)
        if self.text is not None:
            self.text.to(device)
            self._table = self._caption_table()

    def _set_process(self, schedule: Schedule, device: torch.device) -> None:
        """Set the schedule and all tables made from it, with an empty history of losses."""
        self.device = device
        self._take_table(schedule)
        self.timesteps = Timesteps(
            self.config.objective.timesteps, schedule.num_steps, self.config.train.batch_size, device
        )

    def _take_table(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.objective = Objective(self.config.objective, schedule, pixels=self.codec is None)

    def micro_step(
        self, networks: Networks, batch: Batch, update: int, backward: Callable[[Tensor], None]
    ) -> dict[str, Tensor]:
        noising = self._noising(batch)
        terms = self._terms(networks["unet"], noising)
        return self._descend(noising, terms, batch["position"], backward)

    def _noising(self, batch: Batch) -> Noising:
        """x_0, ε and t of a batch, and its condition: some captions and values are dropped for guidance."""
        t, weight = self.timesteps.draw(batch["t"], batch["position"])
        dropped, vector = batch["drop"] < self.config.caption_dropout, None
        if self.conditioner is not None:
            joint = batch[JOINT] < self.conditioner.joint_dropout
            each = {c.name: joint | (batch[f"drop/{c.name}"] < c.dropout) for c in self.conditioner.configs}
            dropped, vector = dropped | joint, self.conditioner.dropping(batch["vector"], each)
        captions = [NULL_CAPTION if drop else text for text, drop in zip(batch["text"], dropped.tolist(), strict=True)]
        return Noising(
            diffused(self.codec, batch), batch["eps"], t, weight, self._condition(captions, vector, self._concat(batch))
        )

    def _terms(self, unet: Model, noising: Noising) -> Terms:
        """The loss of each sample (L1, and L4 with a learned variance)."""
        return self.objective.terms(unet, noising.x0, noising.eps, noising.t, noising.cond)

    def _descend(
        self, noising: Noising, terms: Terms, position: Tensor, backward: Callable[[Tensor], None]
    ) -> dict[str, Tensor]:
        """Send the mean loss backward; the timesteps of later updates may depend on the losses."""
        loss = (noising.weight * terms.total).mean()
        backward(loss)
        self.timesteps.note(position, noising.t, terms.total.detach())
        vlb = {} if terms.vlb is None else {"vlb": (noising.weight * terms.vlb).mean().detach()}
        return {"loss": loss.detach(), **vlb}

    def _condition(self, captions: list[str], vector: Tensor | None, concat: Tensor | None) -> Condition:
        context = None
        if self.text is not None:
            context = self._table[captions] if self._table is not None else self.text.encode(captions)
        return Condition(context, vector, concat)

    @torch.no_grad()
    def _concat(self, batch: Batch) -> Tensor | None:
        """The masks, and the parts of the images that they leave; None where nothing is to be filled."""
        return masked_condition(self.codec, batch["image"], batch["mask"]) if "mask" in batch else None

    def initialize(self) -> None:
        self.trained.initialize()

    def after_update(self, update: int, reduce: Callable[[Tensor], Tensor], finite: Tensor) -> None:
        """The timesteps of the next update may depend on the losses of this one."""
        self.timesteps.after_update(reduce, finite)

    def state(self) -> dict[str, Any]:
        conditions = {} if self.conditioner is None else {"conditions": self.conditioner.to_dict()}
        return {"timesteps": self.timesteps.state(), **self._frozen, **conditions, **self.trained.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        for name, value in self._frozen.items():  # older checkpoints lack them
            if state.get(name, value) != value:
                path = getattr(self.config, name)
                raise FolderError(
                    f"{name} {path}: its weights have changed since this run began: bring them back, or use another"
                    " run:"
                )
        if self.conditioner is not None:
            self._keep_conditions(self.conditioner, state["conditions"])
        self.timesteps.load_state(state.get("timesteps", {}))  # older checkpoints lack it
        self.trained.load_state(state)

    def _keep_conditions(self, measured: Conditioner, described: Mapping[str, Any]) -> None:
        """Go on with what values meant when the run began, where the data have changed since.

        Raises ConfigError for values that it cannot encode.
        """
        if described == measured.to_dict():
            return
        self.conditioner = kept = measured.kept(Conditioner.from_dict(described))
        self.stream.encode = self.validation.encode = kept.row
        try:
            for i in range(self.source.length or MEASURED):
                kept.row(self.source.columns(i))
        except ConfigError as error:
            raise ConfigError(f"conditions: new in the data since this run began: {error}") from None

    def validate(self, update: int, gather: Callable[[Tensor], Tensor], rank: int, processes: int) -> dict[str, Any]:
        """Unweighted loss and its standard error on fixed noise and stratified timesteps, and by tenths of 1…T."""
        train, length = self.config.train, self.validation.source.length
        total = train.validation_size if length is None else min(train.validation_size, length)
        sums = torch.zeros(3, BINS, dtype=torch.float64, device=self.device)  # count, Σ loss, Σ loss²
        for positions, batch in validation_batches(self.validation, total, train.batch_size, rank, processes):
            moved = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            t = uniform_timesteps(scattered(positions, total), self.schedule.num_steps).to(self.device)
            context = self.text.encode(moved["text"]) if self.text else None
            cond = Condition(context, moved.get("vector"), self._concat(moved))
            x0 = diffused(self.codec, moved)
            noising = Noising(x0, moved["eps"], t, torch.ones_like(t), cond)
            loss = self._terms(self.networks["unet"], noising).error.double()
            bins = t * BINS // self.schedule.num_steps
            sums.index_add_(1, bins, torch.stack([torch.ones_like(loss), loss, loss.square()]))
        sums = gather(sums[None]).sum(0).cpu()
        count, first, second = sums
        n, mean = count.sum(), first.sum() / count.sum()
        error = ((second.sum() / n - mean.square()).clamp(min=0) / n).sqrt()
        return {"loss": float(mean), "loss_error": float(error), "loss_by_t": (first / count).tolist()}

    def pipeline(self) -> Pipeline:
        """The model with the current weights."""
        config = self.config
        return Pipeline(
            self.trained.unet,
            self._schedule_config(),
            config.objective.target,
            self.codec,
            self.text,
            config.data.image_size,
            config.sample,
            caption_dropout=config.caption_dropout if self.text else None,
            conditioner=self.conditioner,
        ).to(self.device)

    def _schedule_config(self) -> ScheduleConfig:
        return self.config.schedule

    def previews(self) -> dict[str, np.ndarray]:
        """Samples of fixed prompts, and the values of the first validation images, from fixed noise."""
        values = None
        if self.conditioner is not None:
            source = self.validation.source
            rows = (source.columns(i % (source.length or PICTURES)) for i in range(len(self.prompts)))
            values = [self.conditioner.values(row) for row in rows]
        pipe, settings = self.pipeline(), self.config.sample
        images = torch.cat(list(pipe.sample(self.prompts, settings, values=values)))
        grids = {"samples": grid(to_uint8(images), PICTURES)}
        return grids if self.config.inpaint is None else {**grids, "filled": self._filled(pipe)}

    def _filled(self, pipe: Pipeline) -> np.ndarray:
        """The first validation images: as they are given, with gray to be filled, and filled."""
        source = self.validation.source
        places = range(min(PICTURES, source.length or PICTURES))
        samples = [self.validation[i] for i in places]
        images, masks = (torch.stack([sample[name] for sample in samples]) for name in ("image", "mask"))
        given: dict[str, Any] = {"image": list(to_uint8(images)), "mask": list(to_uint8(2 * masks - 1))}
        if self.conditioner is not None:
            given["values"] = [self.conditioner.values(source.columns(i)) for i in places]
        filled = torch.cat(list(pipe.sample([sample["text"] for sample in samples], self.config.sample, **given)))
        return grid(to_uint8(torch.cat([images * (1 - masks), filled.cpu()])), PICTURES)

    def export(self, folder: Path) -> None:
        """Write a model folder: the whole pipeline, or a LoRA and the name of its base."""
        self.trained.export(folder, self.pipeline)


def _conditioner(config: DiffusionTrainingConfig, source: Source) -> Conditioner | None:
    """Encodes the conditions, as measured on the training split, or as the model of ``init`` was trained with them."""
    if not config.conditions:
        return None
    if config.init is not None:
        return initial_conditioner(config)
    rows = (source.columns(i) for i in range(source.length or MEASURED))
    return Conditioner.measured(config.conditions, rows, config.joint_dropout)


def _check_data(data: DataConfig, model: AutoencoderConfig) -> None:
    if model.image_channels != data.image_channels:
        raise ConfigError(
            f"data.image_channels is {data.image_channels} but the autoencoder takes {model.image_channels}"
        )
    if data.image_size % model.factor:
        raise ConfigError(
            f"data.image_size {data.image_size} is not a multiple of {model.factor} (the autoencoder's factor)"
        )


def _shape(config: DiffusionTrainingConfig, codec: LatentCodec | None) -> tuple[int, int, int]:
    """Channels and sides of x_0."""
    if codec is None:
        return config.data.image_channels, config.data.image_size, config.data.image_size
    model = codec.autoencoder.config
    side = config.data.image_size // model.factor
    return model.latent_channels, side, side


def _text_encoder(path: str) -> Any:
    if path == NONE:
        return None
    from ldm.interop.text import read_text  # transformers takes seconds to import

    try:
        return read_text(path)
    except FolderError as error:
        raise ConfigError(f"text: {error}") from None
