"""Consistency distillation of a trained model (docs/equations.md L13): another loss in the step of stage 2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ldm.config import NULL_CAPTION, ConfigError, DiffusionTrainingConfig
from ldm.data.dataset import Batch
from ldm.diffusion.condition import Condition
from ldm.diffusion.consistency import Distillation
from ldm.diffusion.guidance import Guidance, Model
from ldm.diffusion.objective import Terms
from ldm.training.placement import place
from ldm.training.precision import autocast
from ldm.training.stages.diffusion import DiffusionTask, Noising
from ldm.training.stages.finetune import check_initial, initial_unet
from ldm.training.task import AVERAGE, Networks


class DistillationTask(DiffusionTask):
    """Trains a U-Net, or a LoRA, that starts as the model of ``init``, towards the end of that model's flow.

    The teacher is that model, frozen and guided by ``distill.guidance_scale``. Guidance is so learned with the rest,
    and one call of the student is a sample.
    """

    def __init__(self, config: DiffusionTrainingConfig, *parts: Any) -> None:
        super().__init__(config, *parts)
        assert config.distill is not None
        self.distill = config.distill
        info = check_initial(config, self.trained.unet.spec, self.text)
        if info.extra.get("caption_dropout") == 0.0 and self.distill.guidance_scale != 1.0:
            raise ConfigError(
                f"distill.guidance_scale: init {config.init} was trained without caption dropout, so it cannot be"
                " guided: set it to 1"
            )
        self.teacher = initial_unet(info, config.train.mixed_precision)
        self._frozen["init"] = info.hash

    @property
    def summary(self) -> list[str]:
        guidance = f"guidance {self.distill.guidance_scale:g} in {self.distill.intervals} steps"
        return [*super().summary, f"teacher: {self.config.init} with {guidance}"]

    def to(self, device: torch.device) -> None:
        place(self.teacher, replace(self.config.train, gradient_checkpointing=False), device)
        super().to(device)

    def micro_step(
        self, networks: Networks, batch: Batch, update: int, backward: Callable[[Tensor], None]
    ) -> dict[str, Tensor]:
        unet, noising = networks["unet"], self._noising(batch)
        terms = self._terms(unet, noising, networks.get(AVERAGE, unet))
        return self._descend(noising, terms, batch["position"], backward)

    def _terms(self, unet: Model, noising: Noising, average: Model | None = None) -> Terms:
        """The distance of the student's end of the path from x_t and its average's from a step of the teacher down.

        In validation the student is the average.
        """
        vector, concat = noising.cond.vector, noising.cond.concat
        nothing = None if vector is None else torch.zeros_like(vector)
        null_cond = self._condition([NULL_CAPTION] * len(noising.t), nothing, concat)
        guidance = Guidance(
            self._teach, noising.cond, null_cond, self.schedule, self.config.objective.target,
            scale=self.distill.guidance_scale,
        )  # fmt: skip
        distillation = Distillation(self.distill, self.schedule, self.config.objective.target)
        loss = distillation.losses(unet, average or unet, guidance, noising.x0, noising.eps, noising.t, noising.cond)
        return Terms(loss, loss.detach(), None)

    def _teach(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        with autocast(self.config.train.mixed_precision, self.device):
            return self.teacher(x_t, t, cond).float()
