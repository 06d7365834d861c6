"""Other networks that guide a model: a weaker model, a classifier. Loaded on first use and cached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import RLock

import torch
from torch import Tensor

from ldm.config import ConfigError, SampleConfig
from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.guidance import Gradient, classifier_gradient
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.windows import Windows, windowed
from ldm.errors import FolderError
from ldm.interop.classifier import ClassifierInfo, load_classifier
from ldm.models.classifier import NoisyClassifier
from ldm.pipeline.model import Model
from ldm.pipeline.prompts import Prompt, texts_of

_READING = RLock()  # a network that several threads ask for at once is read once


@dataclass
class Guides:
    """Weaker models and classifiers by the names that settings give them."""

    models: dict[str, Model] = field(default_factory=dict)
    classifiers: dict[str, tuple[ClassifierInfo, NoisyClassifier]] = field(default_factory=dict)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move every network to ``device``, and cast the weaker models to ``dtype``; classifiers stay in float32."""
        for guide in self.models.values():
            guide.to(device)
            if guide.dtype != dtype:
                guide.to(dtype)
        for _, classifier in self.classifiers.values():
            classifier.to(device)

    def guide(
        self,
        model: Model,
        path: str,
        prompts: Sequence[Prompt | str],
        settings: SampleConfig,
        windows: Windows | None,
        concat: Tensor | None = None,
    ) -> Denoise:
        """The model at ``path``, conditioned as autoguidance starts. Raises ConfigError where it does not fit."""
        guide = self._open_guide(model, path)
        guide.warn_cut(texts_of(prompts), settings, stacklevel=1)
        null = settings.negative_prompt or guide.null_caption
        cond = guide.condition(prompts if settings.guidance_scale else [null] * len(prompts), concat)
        predict = windowed(guide.predict, windows) if windows else guide.predict
        return lambda x_t, t: predict(x_t, t, cond)[:, : model.unet.in_channels]

    def _open_guide(self, model: Model, path: str) -> Model:
        with _READING:
            if path not in self.models:
                try:
                    guide = Model.from_pretrained(path, model.device, model.dtype)
                except (ConfigError, FolderError) as error:
                    raise type(error)(f"autoguidance: {error}") from None
                name = f"autoguidance {path}"
                autoencoder = guide.codec.hash if guide.codec else None
                _check_fits(model, name, autoencoder, guide.unet.in_channels, guide.schedule)
                if guide.target != model.target:
                    raise ConfigError(
                        f"{name}: its target is {guide.target}, this model's is {model.target}: they must be equal"
                    )
                if (guide.text is None) != (model.text is None):
                    raise ConfigError(f"{name}: one of the models has a text encoder and the other has none")
                if guide.unet.spec.fills != model.unet.spec.fills:
                    raise ConfigError(f"{name}: one of the models fills masked parts of images and the other does not")
                conditions = [one.conditioner.names if one.conditioner else () for one in (guide, model)]
                if conditions[0] != conditions[1]:
                    theirs, mine = (", ".join(names) or "none" for names in conditions)
                    raise ConfigError(f"{name}: its conditions are {theirs}, this model's {mine}: they must be equal")
                self.models[path] = guide
            return self.models[path]

    def gradient(self, model: Model, captions: list[str], settings: SampleConfig, form: str) -> Gradient | None:
        """w ∇ log p(y | x_t) of the classifier, y the class of each caption; None unless settings ask for it."""
        if settings.classifier is None or settings.classifier_form != form or settings.classifier_scale == 0:
            return None
        info, classifier = self.classifier(model, settings.classifier)
        labels = torch.tensor([info.label(caption) for caption in captions], device=model.device)
        return classifier_gradient(classifier, labels, settings.classifier_scale)

    def classifier(self, model: Model, path: str) -> tuple[ClassifierInfo, NoisyClassifier]:
        """The classifier at ``path``. Raises ConfigError where it does not fit this model."""
        with _READING:
            if path not in self.classifiers:
                info, classifier = load_classifier(path)
                schedule = Schedule.from_config(info.schedule)
                _check_fits(model, f"classifier {path}", info.autoencoder, info.in_channels, schedule)
                self.classifiers[path] = info, classifier.to(model.device)
            return self.classifiers[path]


def _check_fits(model: Model, name: str, autoencoder: str | None, channels: int, schedule: Schedule) -> None:
    """Raise ConfigError where another network was not trained on this model's latents or schedule.

    ``autoencoder``: the hash of the one whose latents it takes; None: it takes pixels.
    """
    own = model.codec.hash if model.codec else None
    if channels != model.unet.in_channels or (autoencoder is None) != (model.codec is None):
        theirs = f"{channels} channels{'' if autoencoder else ' (pixels)'}"
        ours = f"{model.unet.in_channels}{'' if model.codec else ' (pixels)'}"
        raise ConfigError(f"{name}: its latents have {theirs}, this model's {ours}")
    if autoencoder != own:
        theirs, ours = autoencoder and autoencoder[:12], own and own[:12]
        raise ConfigError(f"{name}: its latents are those of another autoencoder ({theirs}, not {ours})")
    a, b = schedule.alphas_cumprod.cpu(), model.schedule.alphas_cumprod.cpu()
    if len(a) != len(b):
        raise ConfigError(f"{name}: its schedule has {len(a)} steps, this model's {len(b)}")
    if not torch.allclose(a, b, rtol=1e-4, atol=1e-6):
        largest = float((a - b).abs().max())
        raise ConfigError(f"{name}: its schedule is another than this model's (ᾱ differs by up to {largest:.2g})")
