"""Stage 2 with a learned noise schedule (docs/equations.md F5): a second network in the same step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ldm.config import DiffusionTrainingConfig, ScheduleConfig
from ldm.data.dataset import Batch
from ldm.diffusion.learned_schedule import InputTap, LearnedSchedule, error_and_slope, schedule_loss
from ldm.training.stages.diffusion import DiffusionTask
from ldm.training.task import Networks

# On the gradients of the schedule, which AdamW does not notice. The steps with the largest are drawn rarely, and the
# run's clip would shorten these alone: the mean would point elsewhere.
UNCLIPPED = 1e-5


class LearnedScheduleTask(DiffusionTask):
    """Trains the U-Net by its own objective, and the schedule by the variance of the bound's estimator."""

    def __init__(self, config: DiffusionTrainingConfig, *parts: Any) -> None:
        self.learned = LearnedSchedule(config.schedule)
        super().__init__(config, *parts)
        self.networks["schedule"] = self.learned

    def lr_scale(self, network: str) -> float:
        """The schedule has a rate of its own."""
        return self.config.schedule.lr / self.config.train.lr if network == "schedule" else 1.0

    def micro_step(
        self, networks: Networks, batch: Batch, update: int, backward: Callable[[Tensor], None]
    ) -> dict[str, Tensor]:
        self._take_table(self.learned.schedule())
        noising, tap = self._noising(batch), InputTap(networks["unet"])
        terms = self._terms(tap, noising)
        # First the schedule's gradients, from the call that the U-Net's own loss is made of: the U-Net gets none of
        # them.
        x0, eps, t = noising.x0, noising.eps, noising.t
        error, slope = error_and_slope(self.schedule, self.config.objective.target, tap, x0, eps, t)
        loss, metrics = schedule_loss(networks["schedule"](), t, error, slope, x0, eps, self.codec is None)
        backward(UNCLIPPED * loss)
        return self._descend(noising, terms, batch["position"], backward) | metrics

    def validate(self, update: int, gather: Callable[[Tensor], Tensor], rank: int, processes: int) -> dict[str, Any]:
        """The same as with a fixed schedule, with the current table."""
        self._take_table(self.learned.schedule())
        return super().validate(update, gather, rank, processes)

    def _schedule_config(self) -> ScheduleConfig:
        return self.learned.given()
