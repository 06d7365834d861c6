"""Other networks that guide a model: a weaker one of its kind, a classifier. Read when first named, and kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import RLock
from typing import TYPE_CHECKING

import torch

from ldm.config import ConfigError, SampleConfig
from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.guidance import Gradient, classifier_gradient
from ldm.diffusion.schedule import Schedule
from ldm.errors import FolderError
from ldm.interop.classifier import ClassifierInfo, load_classifier
from ldm.models.classifier import NoisyClassifier

if TYPE_CHECKING:
    from ldm.pipeline.pipeline import Pipeline

_READING = RLock()  # a network that several threads ask for at once is read once


@dataclass
class Guides:
    """Weaker models and classifiers by the names that settings give them."""

    weaker: dict[str, Pipeline] = field(default_factory=dict)
    classifiers: dict[str, tuple[ClassifierInfo, NoisyClassifier]] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> None:
        """Move every network to ``device``."""
        for weak in self.weaker.values():
            weak.to(device)
        for _, classifier in self.classifiers.values():
            classifier.to(device)

    def weak(self, pipe: Pipeline, path: str, captions: list[str], settings: SampleConfig) -> Denoise:
        """The model at ``path``, under the condition from which autoguidance starts. Raises ConfigError where it does not fit."""
        weak = self._weaker(pipe, path)
        weak.warn_cut(captions, settings, stacklevel=1)
        null = settings.negative_prompt or weak.null_caption
        cond = weak.condition(captions if settings.guidance_scale else [null] * len(captions))
        return lambda x_t, t: weak._predict(x_t, t, cond)[:, : pipe.unet.in_channels]

    def _weaker(self, pipe: Pipeline, path: str) -> Pipeline:
        with _READING:
            if path not in self.weaker:
                try:
                    weak = type(pipe).from_pretrained(path, pipe.device, pipe.unet.conv_in.weight.dtype)
                except (ConfigError, FolderError) as error:
                    raise type(error)(f"autoguidance: {error}") from None
                autoencoder = weak.codec.hash if weak.codec else None
                self._check_fits(pipe, f"autoguidance {path}", autoencoder, weak.unet.in_channels, weak.schedule)
                if weak.target != pipe.target:
                    raise ConfigError(
                        f"autoguidance {path}: its target is {weak.target}, this model's is {pipe.target}: they must be equal"
                    )
                if (weak.text is None) != (pipe.text is None):
                    raise ConfigError(
                        f"autoguidance {path}: one of the models has a text encoder and the other has none"
                    )
                self.weaker[path] = weak
            return self.weaker[path]

    def gradient(self, pipe: Pipeline, captions: list[str], settings: SampleConfig, form: str) -> Gradient | None:
        """w ∇ log p(y | x_t) of the classifier, y the class of each caption; None where the settings ask for none in this form."""
        if settings.classifier is None or settings.classifier_form != form or settings.classifier_scale == 0:
            return None
        info, classifier = self.classifier(pipe, settings.classifier)
        labels = torch.tensor([info.label(caption) for caption in captions], device=pipe.device)
        return classifier_gradient(classifier, labels, settings.classifier_scale)

    def classifier(self, pipe: Pipeline, path: str) -> tuple[ClassifierInfo, NoisyClassifier]:
        """The classifier at ``path``. Raises ConfigError where it does not fit this model."""
        with _READING:
            if path not in self.classifiers:
                info, classifier = load_classifier(path)
                self._check_fits(
                    pipe, f"classifier {path}", info.autoencoder, info.in_channels, Schedule.from_config(info.schedule)
                )
                self.classifiers[path] = info, classifier.to(pipe.device)
            return self.classifiers[path]

    def _check_fits(
        self, pipe: Pipeline, name: str, autoencoder: str | None, channels: int, schedule: Schedule
    ) -> None:
        """Raise ConfigError where another network was not trained on this model's latents or schedule."""
        mine = pipe.codec.hash if pipe.codec else None
        if channels != pipe.unet.in_channels or (autoencoder is None) != (pipe.codec is None):
            raise ConfigError(f"{name}: its latents have {channels} channels{'' if autoencoder else ' (pixels)'}, this model's"
                              f" {pipe.unet.in_channels}{'' if pipe.codec else ' (pixels)'}")  # fmt: skip
        if autoencoder != mine:
            raise ConfigError(
                f"{name}: its latents are those of another autoencoder ({autoencoder and autoencoder[:12]}, not {mine and mine[:12]})"
            )
        a, b = schedule.alphas_cumprod.cpu(), pipe.schedule.alphas_cumprod.cpu()
        if len(a) != len(b):
            raise ConfigError(f"{name}: its schedule has {len(a)} steps, this model's {len(b)}")
        if not torch.allclose(a, b, rtol=1e-4, atol=1e-6):
            raise ConfigError(
                f"{name}: its schedule is another than this model's (ᾱ differs by up to {float((a - b).abs().max()):.2g})"
            )
