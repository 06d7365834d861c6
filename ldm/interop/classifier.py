"""The folder of a classifier of noisy samples: `classifier/` with config.json and weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.config import ClassifierConfig, ConfigError, ScheduleConfig, build, to_dict
from ldm.errors import FolderError
from ldm.files.json import read_json, write_json
from ldm.interop.sizes import WIDEST
from ldm.interop.weights import read_module, write_module
from ldm.models.classifier import NoisyClassifier

WEIGHTS = "classifier.safetensors"
CLASS_NAME = "NoisyClassifier"


@dataclass(frozen=True)
class ClassifierInfo:
    """A classifier without its weights.

    Attributes:
        model: the network's settings.
        classes: names of the classes, in the order of the logits.
        captions: caption to the index of its class.
        in_channels: channels of x_t.
        schedule: noise schedule that its timesteps refer to.
        autoencoder: sha256 of the weights of the autoencoder that encoded its training images;
            None: pixels.
    """

    model: ClassifierConfig
    classes: tuple[str, ...]
    captions: Mapping[str, int]
    in_channels: int
    schedule: ScheduleConfig
    autoencoder: str | None

    def label(self, caption: str) -> int:
        """The class index of a caption. Raises ConfigError that lists the known captions."""
        if caption not in self.captions:
            raise ConfigError(f"the classifier knows no {caption!r}, only: {', '.join(self.captions)}")
        return self.captions[caption]

    def make(self) -> NoisyClassifier:
        """A newly initialised network."""
        return NoisyClassifier(self.model, self.in_channels, len(self.classes))

    def save(self, network: NoisyClassifier, folder: Path) -> None:
        """Write the weights, then the configuration. Raises FolderError or OSError."""
        write_module(network, folder / WEIGHTS)
        about = {
            "model": to_dict(self.model),
            "in_channels": self.in_channels,
            "classes": list(self.classes),
            "captions": dict(self.captions),
        }
        made_for = {"schedule": to_dict(self.schedule), "autoencoder_sha256": self.autoencoder}
        write_json(folder / "config.json", {"_class_name": CLASS_NAME, "format": 1, **about, **made_for})


def read_classifier(path: str | Path) -> tuple[ClassifierInfo, Path]:
    """The classifier of a run or folder, and the file of its weights.

    Raises FolderError or ConfigError.
    """
    path = Path(path)
    folder = next(
        (f for f in (path / "model/classifier", path / "classifier", path) if (f / "config.json").is_file()), None
    )
    if folder is None:
        hint = "let its training finish" if path.exists() else "train one with `ldm train-classifier`"
        raise FolderError(f"no classifier in {path}: {hint}")
    about = read_json(folder / "config.json")
    if about.get("_class_name") != CLASS_NAME:
        raise FolderError(
            f"{folder} holds a {about.get('_class_name')}, not a classifier: name a run of `ldm train-classifier`"
        )
    try:
        model = build(ClassifierConfig, about["model"], "model.")
        schedule = build(ScheduleConfig, about["schedule"], "schedule.")
        rest = about["in_channels"], schedule, about["autoencoder_sha256"]
        _check_types(about, str(folder / "config.json"))
        info = ClassifierInfo(model, tuple(about["classes"]), about["captions"], *rest)
    except KeyError as error:
        raise FolderError(f"{folder / 'config.json'}: {error.args[0]} is missing") from None
    return info, folder / WEIGHTS


def _check_types(about: Mapping[str, Any], where: str) -> None:
    """Raise FolderError for an entry whose type is not the one that ``save`` writes."""
    classes, captions, channels, autoencoder = (
        about[key] for key in ("classes", "captions", "in_channels", "autoencoder_sha256")
    )
    faults = {
        "classes should be a list of names": not isinstance(classes, list)
        or not all(isinstance(name, str) for name in classes),
        "captions should give each caption the number of a class": not isinstance(captions, dict)
        or not isinstance(classes, list)
        or not all(type(number) is int and 0 <= number < len(classes) for number in captions.values()),
        "in_channels should be a whole number from 1": type(channels) is not int or not 1 <= channels <= WIDEST,
        "autoencoder_sha256 should be text or null": autoencoder is not None and not isinstance(autoencoder, str),
    }
    for fault, holds in faults.items():
        if holds:
            raise FolderError(f"{where}: {fault}")


def load_classifier(path: str | Path) -> tuple[ClassifierInfo, NoisyClassifier]:
    """The classifier of a run or folder, frozen, float32. Raises FolderError or ConfigError."""
    info, weights = read_classifier(path)
    return info, read_module(info.make, weights).float()
