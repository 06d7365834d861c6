"""Settings of the training loop. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from autoencoder.config import MOST_CHANNELS, MOST_UPDATES, ConfigError, at_least, between, one_of

TRACKERS = ("tensorboard", "wandb")
PRECISIONS = ("no", "bf16", "fp16")
LR_SCHEDULES = ("constant", "cosine")
OPTIMIZERS = ("adamw", "muon")
SAVE_ERRORS = ("stop", "continue")


@dataclass(frozen=True)
class LoraConfig:
    """Layers of a frozen U-Net that get a low-rank change, and its rank (Hu et al. 2021)."""

    rank: int = 8
    alpha: float | None = None  # the change is α / rank · B A; null: rank
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")  # suffixes of layer names; also proj_in, ff.net.2 …

    def __post_init__(self) -> None:
        between(self, 1, MOST_CHANNELS, "rank")
        at_least(self, 1e-12, "alpha")
        if not self.targets:
            raise ConfigError("targets must name at least one layer")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of the training loop. Schedules and intervals count optimizer updates."""

    steps: int = 100_000
    batch_size: int = 64  # the GLOBAL batch of one update
    micro_batch: int | None = None  # per process and forward pass; null: batch_size / processes
    optimizer: str = "adamw"  # or muon: for the matrices of hidden layers, and AdamW for the rest
    lr: float = 1e-4
    muon_lr: float | None = None  # learning rate of those matrices; null: lr
    lr_schedule: str = "constant"
    warmup: int = 0  # updates of linear warm-up
    lr_end: float = 0.0  # cosine: final learning rate, as a fraction of lr
    betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = 1.0  # global gradient norm; null: none
    ema_decay: float = 0.9999  # ramped: min(ema_decay, (1 + k) / (10 + k)) at update k
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    compile: bool = False
    channels_last: bool = False
    deterministic: bool = False
    seed: int = 0
    log_every: int = 50
    validate_every: int = 1000
    validation_size: int = 256
    sample_every: int = 1000
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    rank_timeout: int = 1800  # seconds that a process waits for the others before the run ends
    keep_every: int | None = None  # updates: checkpoints at its multiples stay for good and are not counted; null: none
    save_errors: str = "stop"  # when a checkpoint fails (full disk …); continue: warn, try again at the next interval
    keep_best: bool = False  # keep the averaged weights of the best validation; at the end they become RUN/best
    patience: int | None = None  # validations in a row without a better one after which the run ends; null: at `steps`
    trackers: tuple[str, ...] = ("tensorboard",)
    lora: LoraConfig | None = None  # train-ldm: train low-rank changes of the U-Net of `init`, which stays frozen

    def __post_init__(self) -> None:
        between(self, 1, MOST_UPDATES, "steps", "log_every", "validate_every", "sample_every")
        between(self, 1, MOST_UPDATES, "checkpoint_every", "keep_every", "patience")
        between(self, 1, 10**6, "batch_size", "micro_batch")
        between(self, 1, 10**7, "validation_size", "rank_timeout")
        between(self, 2, MOST_UPDATES, "keep_checkpoints")
        one_of(self, SAVE_ERRORS, "save_errors")
        at_least(self, 0.0, "weight_decay", "adam_eps")
        between(self, 0, MOST_UPDATES, "warmup")
        at_least(self, 1e-12, "lr", "muon_lr", "clip")
        between(self, 0.0, 1.0, "lr_end")
        between(self, 0.0, 0.9999999, "ema_decay")
        between(self, 0, 2**63 - 1, "seed")
        one_of(self, OPTIMIZERS, "optimizer")
        one_of(self, PRECISIONS, "mixed_precision")
        one_of(self, LR_SCHEDULES, "lr_schedule")
        if not all(0.0 <= b < 1.0 for b in self.betas):
            raise ConfigError(f"betas must lie in [0, 1), got {list(self.betas)}")
        if self.muon_lr is not None and self.optimizer != "muon":
            raise ConfigError("muon_lr is for optimizer: muon: leave it out")
        if self.keep_every is not None and self.keep_every % self.checkpoint_every:
            multiple = f"a multiple of checkpoint_every {self.checkpoint_every}"
            raise ConfigError(f"keep_every {self.keep_every} is not {multiple}")
        if self.micro_batch is not None and self.batch_size % self.micro_batch:
            raise ConfigError(f"batch_size {self.batch_size} is not a multiple of micro_batch {self.micro_batch}")
        for tracker in self.trackers:
            if tracker not in TRACKERS:
                raise ConfigError(f"trackers: {tracker!r} is none of {', '.join(TRACKERS)}")
