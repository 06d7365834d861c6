"""The configuration: every setting with its range, read and written as YAML. Imports no torch."""

from __future__ import annotations

from autoencoder.config import ConfigError
from ldm.config.conditions import ConditionConfig, InpaintConfig
from ldm.config.data import CAPTIONS, SOURCES, AugmentConfig, DataConfig
from ldm.config.figure import Figure
from ldm.config.networks import VECTOR_MAPS, ClassifierConfig, ClipConfig, UNetConfig
from ldm.config.process import (
    GIVEN,
    LEARNED,
    SCHEDULES,
    TARGETS,
    TIMESTEPS,
    WEIGHTINGS,
    DistillConfig,
    ObjectiveConfig,
    ScheduleConfig,
)
from ldm.config.reading import (
    build,
    config_file,
    load,
    load_any,
    load_run,
    model_config_file,
    runs_below,
    save,
    to_dict,
)
from ldm.config.runs import (
    NONE,
    NULL_CAPTION,
    RUNS,
    AutoencoderTrainingConfig,
    ClassifierTrainingConfig,
    ClipTrainingConfig,
    DiffusionTrainingConfig,
)
from ldm.config.sample import (
    CIRCULAR,
    CLASSIFIER_FORMS,
    COMPLETIONS,
    GRIDS,
    SAMPLERS,
    STRENGTHS,
    VARIANCES,
    SampleConfig,
)
from ldm.config.train import LR_SCHEDULES, PRECISIONS, TRACKERS, LoraConfig, TrainConfig

__all__ = [
    "AugmentConfig",
    "AutoencoderTrainingConfig",
    "CAPTIONS",
    "CIRCULAR",
    "CLASSIFIER_FORMS",
    "COMPLETIONS",
    "ClassifierConfig",
    "ClassifierTrainingConfig",
    "ClipConfig",
    "ClipTrainingConfig",
    "ConditionConfig",
    "ConfigError",
    "DataConfig",
    "DiffusionTrainingConfig",
    "DistillConfig",
    "Figure",
    "GIVEN",
    "GRIDS",
    "InpaintConfig",
    "LEARNED",
    "LR_SCHEDULES",
    "LoraConfig",
    "NONE",
    "NULL_CAPTION",
    "ObjectiveConfig",
    "PRECISIONS",
    "RUNS",
    "SAMPLERS",
    "SCHEDULES",
    "SOURCES",
    "STRENGTHS",
    "SampleConfig",
    "ScheduleConfig",
    "TARGETS",
    "TIMESTEPS",
    "TRACKERS",
    "TrainConfig",
    "UNetConfig",
    "VARIANCES",
    "VECTOR_MAPS",
    "WEIGHTINGS",
    "build",
    "config_file",
    "load",
    "load_any",
    "load_run",
    "model_config_file",
    "runs_below",
    "save",
    "to_dict",
]
