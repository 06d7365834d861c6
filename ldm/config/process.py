"""The diffusion process and the training objective. Imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from autoencoder.config import ConfigError, at_least, between, one_of

SCHEDULES = ("linear", "linear_rescaled", "scaled_linear", "cosine", "sigmoid", "sigmoid_signal", "rectified_flow")
FIXED = ("cosine", "sigmoid_signal", "rectified_flow")  # those without beta_start and beta_end
LEARNED = "learned"  # the schedule that is trained with the network
GIVEN = "given"  # the schedule whose β are listed in the configuration
TARGETS = ("eps", "x0", "v", "score", "flow")  # rows of ldm.diffusion.targets.TABLE
BLIND = ("eps", "score")  # those of them that say nothing of x_0 where no signal is left
WEIGHTINGS = ("simple", "min_snr", "p2", "variational_beta", "variational_posterior", "score_matching")
TIMESTEPS = ("uniform", "stratified", "logit_normal", "importance")


@dataclass(frozen=True)
class ScheduleConfig:
    """The noise schedule (docs/equations.md F4, F5).

    Null ``beta_start``, ``beta_end``: as published.
    """

    name: str = "scaled_linear"
    num_steps: int = 1000
    beta_start: float | None = None
    beta_end: float | None = None
    betas: tuple[float, ...] | None = None  # for name: given, all of them
    shift: float = 1.0  # side of the diffused image or latent over that of the schedule's design: λ' = λ − log(shift)
    zero_terminal_snr: bool = False  # no signal at all at the last step (v or x0 targets)
    start: str = "cosine"  # learned: the shape before training, cosine or linear in γ = −2λ
    ends: tuple[float, float] = (-10.0, 10.0)  # learned: γ of the first and of the last step before training
    lr: float = 3e-3  # learned: the learning rate of its table, with the run's warm-up and decay

    def __post_init__(self) -> None:
        one_of(self, (*SCHEDULES, LEARNED, GIVEN), "name")
        self._check_learned()
        between(self, 2, 100_000, "num_steps")
        between(self, 1e-12, 0.999, "beta_start", "beta_end")
        between(self, 1e-3, 1e3, "shift")
        if self.name in (*FIXED, GIVEN) and (self.beta_start, self.beta_end) != (None, None):
            raise ConfigError(f"beta_start and beta_end have no meaning for the {self.name} schedule: leave them out")
        if self.name == "linear_rescaled" and (self.beta_end or 0.02) * 1000 / self.num_steps >= 1:
            raise ConfigError(
                f"num_steps {self.num_steps} is too few for linear_rescaled:"
                " its last β, times 1000/num_steps, must be below 1"
            )
        if (self.betas is not None) != (self.name == GIVEN):
            raise ConfigError(f"betas go with name: given and with no other, got name {self.name!r}")
        if self.betas is not None:
            if len(self.betas) != self.num_steps:
                raise ConfigError(f"betas must be num_steps = {self.num_steps} numbers, got {len(self.betas)}")
            if not all(0 < beta < 1 for beta in self.betas[:-1]) or not 0 < self.betas[-1] <= 1:
                raise ConfigError("betas must lie strictly between 0 and 1 (the last may be 1)")

    def _check_learned(self) -> None:
        """Raise ConfigError for settings of a learned schedule out of range or without effect."""
        one_of(self, ("cosine", "linear"), "start")
        at_least(self, 1e-12, "lr")
        if not -19.0 <= self.ends[0] <= -2.0 or not 2.0 <= self.ends[1] <= 19.0:
            raise ConfigError(f"ends must be γ in [-19, -2] and γ in [2, 19], got {list(self.ends)}")
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        learned = ("start", "ends", "lr")
        for name in ("beta_start", "beta_end", "shift", "zero_terminal_snr") if self.name == LEARNED else learned:
            if getattr(self, name) != defaults[name]:
                which = "a" if self.name == LEARNED else "any but a"
                raise ConfigError(f"{name} has no meaning for {which} learned schedule: leave it out")

    @property
    def ends_without_signal(self) -> bool:
        """True if the SNR of the last step is 0."""
        return self.zero_terminal_snr or (self.betas is not None and self.betas[-1] == 1)

    def blind_at_the_end(self, target: str) -> bool:
        """True if ``target`` does not determine x̂_0 at the last step (division by zero)."""
        return self.ends_without_signal and target in BLIND


@dataclass(frozen=True)
class ObjectiveConfig:
    """Target, weighting and distribution of timesteps (docs/equations.md L1, L2, L4, L7, L10)."""

    target: str = "eps"
    weighting: str = "simple"
    min_snr_gamma: float = 5.0
    p2_gamma: float = 1.0
    learned_variance: bool = False  # the U-Net also gives the reverse variance, in c more output channels
    vlb_weight: float = 0.001  # learned_variance: of the variational bound, the sum over all t in bits per dimension
    timesteps: str = "uniform"

    def __post_init__(self) -> None:
        one_of(self, TARGETS, "target")
        one_of(self, WEIGHTINGS, "weighting")
        one_of(self, TIMESTEPS, "timesteps")
        at_least(self, 1e-6, "min_snr_gamma", "p2_gamma")
        at_least(self, 1e-12, "vlb_weight")
        if self.vlb_weight != 0.001 and not self.learned_variance:
            raise ConfigError("vlb_weight is for learned_variance: true: leave it out")


@dataclass(frozen=True)
class DistillConfig:
    """Consistency distillation of the model of ``init`` (docs/equations.md L13)."""

    guidance_scale: float = 3.0  # of the teacher, which the student draws with in one call; its own is then 1
    intervals: int = 50  # the teacher's DDIM steps over 1…T; fewer are learned sooner and less exactly
    huber: float = 0.001  # c of the loss √(d² + c²) − c

    def __post_init__(self) -> None:
        between(self, 0.0, 100.0, "guidance_scale")
        between(self, 1, 100_000, "intervals")
        at_least(self, 1e-6, "huber")
