"""Stage 1: the step, validation and export of the autoencoder (docs/equations.md L8, N2)."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from autoencoder.discriminator import PatchDiscriminator
from autoencoder.layout import to_diffusers
from autoencoder.loss import (
    adaptive_weight,
    discriminator_hinge,
    gan_factor,
    generator_hinge,
    reconstruction_terms,
    weighted_sum,
)
from autoencoder.metrics import ACTIVE_VARIANCE, high_frequency_energy, kl_per_dimension, psnr, ssim
from autoencoder.model import AutoencoderKL
from autoencoder.posterior import DiagonalGaussian
from ldm.config import AutoencoderTrainingConfig, ConfigError
from ldm.data import augment
from ldm.data.dataset import Batch, RandomFields, Stream, validation_batches
from ldm.data.sample import readable
from ldm.data.sources import open_source
from ldm.data.transforms import grid, prepare, to_uint8
from ldm.errors import DataError, NonFiniteError
from ldm.interop.bundle import VAE, Part
from ldm.interop.diffusers.folder import write_part
from ldm.interop.intact import write_hashes
from ldm.training.finite import not_finite
from ldm.training.task import Networks, seeded

if TYPE_CHECKING:
    from autoencoder.perceptual import PerceptualLoss

NOISE_LEVELS = (0.1, 0.3, 1.0)  # latent standard deviations at which decoding under noise is measured
STATISTICS_SIZE = 8192  # training images at most from which the latent statistics are measured
FIRST_IMAGES = 64  # training images at most whose initial latents are whitened
AT_ONCE = 8  # images encoded together for either
PICTURES = 8
SQUARE = "_square"  # suffix of the sum of a figure's squares, of which its standard error is made


class AutoencoderTask:
    """Trains ``autoencoder``, and ``discriminator`` if the loss has an adversarial term."""

    averaged = "autoencoder"

    def __init__(self, config: AutoencoderTrainingConfig) -> None:
        self.config, model, loss, seed = config, config.model, config.loss, config.train.seed
        self.perceptual: PerceptualLoss | None = None
        if loss.lpips > 0:  # first, because its weights may be missing
            from autoencoder.perceptual import PerceptualLoss  # torchvision's models take seconds to import

            self.perceptual = PerceptualLoss(loss.lpips_net, loss.lpips_weights)
        side = config.data.image_size // model.factor
        self.latent_shape = (model.latent_channels, side, side)
        self.autoencoder = seeded(seed, lambda: AutoencoderKL(model))
        self.networks: dict[str, nn.Module] = {"autoencoder": self.autoencoder}
        if loss.gan > 0:
            make = PatchDiscriminator
            self.networks["discriminator"] = seeded(
                seed + 1, lambda: make(model.image_channels, loss.disc_channels, loss.disc_layers)
            )
        self.source = open_source(config.data, "train")
        draws = RandomFields({"posterior": self.latent_shape}, () if config.augment.none else augment.DRAWS)
        self.stream = Stream(self.source, config.data, seed, draws)
        draws = RandomFields({"noise": self.latent_shape})
        self.validation = Stream(open_source(config.data, "validation"), config.data, seed, draws, validation=True)
        self._check_sizes()
        self._adaptive = torch.zeros(())  # of the previous update; 0 until measured
        self._last_layer: dict[str, Tensor] = {}  # gradients of this update, added up over its micro-batches
        self._micro_batches = 0

    def _check_sizes(self) -> None:
        """Run the losses once on a blank image, to refuse an image size too small for them before training."""
        data = self.config.data
        blank = torch.zeros(1, data.image_channels, data.image_size, data.image_size)
        try:
            for module, inputs in ((self.perceptual, (blank, blank)), (self.networks.get("discriminator"), (blank,))):
                if module is not None:
                    with torch.no_grad():
                        module(*inputs)
        except ValueError as error:
            raise ConfigError(f"data.image_size: {error}") from None

    @property
    def summary(self) -> list[str]:
        """Lines to print once, before training."""
        if self.perceptual is None:
            return ["loss.lpips is 0: no perceptual term, LPIPS is null"]
        return (
            []
            if self.perceptual.meaningful
            else ["loss.lpips_weights is random: an untrained perceptual trunk, LPIPS is null"]
        )

    def lr_scale(self, network: str) -> float:
        """The discriminator may have a rate of its own."""
        train, loss = self.config.train, self.config.loss
        return loss.disc_lr / train.lr if network == "discriminator" and loss.disc_lr is not None else 1.0

    def to(self, device: torch.device) -> None:
        self._adaptive = self._adaptive.to(device)
        if self.perceptual is not None:
            self.perceptual.to(device)

    @torch.no_grad()
    def initialize(self) -> None:
        """Whiten the latents: decorrelated channels of unit variance on the first training images."""
        self.autoencoder.whiten(
            torch.cat([posterior.mean for posterior in self._posteriors(self.autoencoder, FIRST_IMAGES)])
        )

    def _posteriors(self, network: AutoencoderKL, limit: int) -> Iterator[DiagonalGaussian]:
        """Posteriors of the first ``limit`` training images at most, a few at once, without random crop or flip."""
        images = (
            prepare(sample.image, self.config.data.image_size)
            for _, sample in itertools.islice(readable(self.source), limit)
        )
        if (first := next(images, None)) is None:
            raise DataError(f"{self.config.data.folder}: none of {self.source.length} training images can be read")
        images = itertools.chain([first], images)
        while several := list(itertools.islice(images, AT_ONCE)):
            yield network.encode(torch.stack(several).to(self._adaptive.device))

    def micro_step(
        self, networks: Networks, batch: Batch, update: int, backward: Callable[[Tensor], None]
    ) -> dict[str, Tensor]:
        loss, image = self.config.loss, augment.augmented(batch["image"], batch, self.config.augment)
        reconstruction, posterior = networks["autoencoder"](image, batch["posterior"])
        terms = reconstruction_terms(reconstruction, image, posterior, loss, self.perceptual)
        # The terms on pixels meet at the reconstruction: their gradients there are taken once and go back together.
        pixels = weighted_sum({name: term for name, term in terms.items() if name != "kl"}, loss)
        (gradient,) = torch.autograd.grad(pixels, reconstruction)
        metrics = {name: term.detach() for name, term in terms.items()}
        adversarial = loss.gan > 0 and update >= loss.gan_start
        if adversarial:
            generator, gan_gradient = self._generator_gradient(reconstruction)
            self._keep_last_layer(reconstruction, {"rec": gradient, "gan": gan_gradient})
            gradient = gradient + gan_factor(update, loss) * self._adaptive * gan_gradient
            metrics["generator"] = generator
        backward((reconstruction * gradient.detach()).sum() + loss.kl * terms["kl"])
        if adversarial:
            metrics |= _discriminator_step(networks["discriminator"], image, reconstruction.detach(), backward)
            metrics["adaptive_weight"] = self._adaptive.clone()
        return metrics

    def _generator_gradient(self, reconstruction: Tensor) -> tuple[Tensor, Tensor]:
        """The generator's hinge loss and its gradient at the reconstruction; the discriminator gets none."""
        discriminator = self.networks["discriminator"].requires_grad_(False)
        hinge = generator_hinge(discriminator(reconstruction))
        (gradient,) = torch.autograd.grad(hinge, reconstruction)
        discriminator.requires_grad_(True)
        return hinge.detach(), gradient

    def _keep_last_layer(self, reconstruction: Tensor, gradients: Mapping[str, Tensor]) -> None:
        """Accumulate each term's own gradient at the decoder's last layer over the micro-batches."""
        for name, gradient in gradients.items():
            (at_layer,) = torch.autograd.grad(reconstruction, self.autoencoder.last_layer, gradient, retain_graph=True)
            self._last_layer[name] = at_layer + self._last_layer.get(name, 0.0)
        self._micro_batches += 1

    def after_update(self, update: int, reduce: Callable[[Tensor], Tensor], finite: Tensor) -> None:
        """The adversarial weight of the next update, from this one's gradients over the global batch."""
        if self._last_layer:
            averaged = {name: reduce(gradient / self._micro_batches) for name, gradient in self._last_layer.items()}
            weight = adaptive_weight(averaged["rec"], averaged["gan"])
            self._adaptive = torch.where(finite & torch.isfinite(weight), weight, self._adaptive)
            self._last_layer, self._micro_batches = {}, 0

    def state(self) -> dict[str, Any]:
        return {"adaptive_weight": float(self._adaptive)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._adaptive = torch.full_like(self._adaptive, state["adaptive_weight"])

    def validate(self, update: int, gather: Callable[[Tensor], Tensor], rank: int, processes: int) -> dict[str, Any]:
        """PSNR, SSIM, LPIPS, KL in nats per dimension, active channels, and PSNR of decoding under latent noise.

        PSNR and LPIPS have their standard errors over the images as well.
        """
        network, device = self.autoencoder, self._adaptive.device

        def total(value: Tensor) -> Tensor:
            return gather(value.double()[None]).sum(0)

        # all names from the start: a process without images still takes part in each exchange
        figures = dict.fromkeys(self._sum_names(), torch.zeros((), dtype=torch.float64, device=device))
        moments = torch.zeros(3, *self.latent_shape, dtype=torch.float64, device=device)  # Σ mean, Σ mean², Σ variance
        kept: list[tuple[Tensor, DiagonalGaussian, Tensor]] = []
        train = self.config.train
        for _, batch in validation_batches(self.validation, train.validation_size, train.batch_size, rank, processes):
            image = batch["image"].to(device)
            reconstruction, posterior = network(image)
            kept.append((image, posterior, batch["noise"].to(device)))
            mean = posterior.mean.double()
            moments += torch.stack([mean.sum(0), mean.square().sum(0), posterior.std.double().square().sum(0)])
            clipped = reconstruction.clamp(-1, 1)
            sums = {"count": torch.tensor(len(image)), "psnr": psnr(clipped, image), "kl": kl_per_dimension(posterior)}
            sums["l1"] = (reconstruction - image).abs().mean((1, 2, 3))
            sums["high_frequency"] = _energy(clipped, image)
            if "ssim" in figures:
                sums["ssim"] = ssim(clipped, image)
            if "lpips" in figures and self.perceptual is not None:
                sums["lpips"] = self.perceptual(clipped, image)
            sums |= {name + SQUARE: sums[name].double().square() for name in ("psnr", "lpips") if name in sums}
            _add(figures, sums)
        moments = total(moments)
        n = float(total(torch.as_tensor(figures["count"], device=device)))
        variance, std = _statistics(moments, n)
        for level in NOISE_LEVELS:
            scale = (level * std).float()[:, None, None]
            for image, posterior, noise in kept:
                decoded = network.decode(posterior.mean + scale * noise).clamp(-1, 1)
                _add(figures, {f"psnr_noise_{level:g}": psnr(decoded, image)})
        means: dict[str, Any] = {name: float(total(value)) / n for name, value in figures.items() if name != "count"}
        for name in [name for name in means if name.endswith(SQUARE)]:
            of = name.removesuffix(SQUARE)
            means[f"{of}_error"] = math.sqrt(max(0.0, means.pop(name) - means[of] ** 2) / n)
        means.setdefault("lpips", None)
        return {**means, "active_channels": int((variance > ACTIVE_VARIANCE).sum())}

    def _sum_names(self) -> list[str]:
        """Names of the sums over validation images."""
        names = ["count", "psnr", "psnr" + SQUARE, "kl", "l1", "high_frequency"]
        names += [f"psnr_noise_{level:g}" for level in NOISE_LEVELS]
        if self.config.data.image_size >= 11:  # SSIM's window
            names.append("ssim")
        if self.perceptual is not None and self.perceptual.meaningful:
            names += ["lpips", "lpips" + SQUARE]
        return names

    def previews(self) -> dict[str, np.ndarray]:
        """Originals above their reconstructions."""
        samples = [self.validation[i]["image"] for i in range(min(PICTURES, self.validation.source.length or PICTURES))]
        image = torch.stack(samples).to(self._adaptive.device)
        reconstruction = self.autoencoder(image)[0]
        return {"reconstructions": grid(to_uint8(torch.cat([image, reconstruction])), len(samples))}

    def export(self, folder: Path) -> None:
        """Write ``vae`` with the latent statistics of the training set folded in."""
        network = copy.deepcopy(self.autoencoder)
        mean, std = self.latent_statistics(network)
        try:
            network.fold_statistics(mean, std)
        except ValueError as error:
            raise NonFiniteError(f"the latents of the training images: {error}: nothing is exported") from None
        if (problem := not_finite({"model_autoencoder": network.state_dict()}, {})) is not None:
            raise NonFiniteError(
                f"{problem} not finite once the statistics of the latents are folded in: nothing is exported"
            )
        config = {**to_diffusers(self.config.model), "sample_size": self.config.data.image_size}
        write_hashes(folder, write_part(Part(config, network.state_dict()), folder / VAE, VAE))

    @torch.no_grad()
    def latent_statistics(self, network: AutoencoderKL) -> tuple[Tensor, Tensor]:
        """Per-channel mean and standard deviation of the latents of training images, [c] each, float64."""
        moments, count = torch.zeros(3, *self.latent_shape, dtype=torch.float64), 0
        for posterior in self._posteriors(network, STATISTICS_SIZE):
            count += len(posterior.mean)
            mean, var = posterior.mean.double().cpu(), posterior.std.double().cpu().square()
            moments += torch.stack([mean.sum(0), mean.square().sum(0), var.sum(0)])
        return _centre(moments, count), _statistics(moments, count)[1]


def _discriminator_step(
    discriminator: Callable[[Tensor], Tensor], image: Tensor, fake: Tensor, backward: Callable[[Tensor], None]
) -> dict[str, Tensor]:
    # Two calls: while every hinge is open, the last bias has a gradient of exactly 0, the sum of two that are opposite
    # to the bit. One call of both would leave a rounding error, of which AdamW makes whole steps, different ones for
    # every split of the batch.
    real_logits, fake_logits = discriminator(image), discriminator(fake)
    hinge = discriminator_hinge(real_logits, fake_logits)
    backward(hinge)
    return {
        "discriminator": hinge.detach(),
        "logits_real": real_logits.detach().mean(),
        "logits_fake": fake_logits.detach().mean(),
    }


def _add(sums: dict[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        sums[name] = sums[name] + value.double().sum()


def _statistics(moments: Tensor, n: float) -> tuple[Tensor, Tensor]:
    """Per channel: variance of the posterior mean over the set, averaged over positions, and the latent's deviation."""
    mean, square, var = moments / n
    over_set = (square - mean.square()).mean((1, 2))
    return over_set, (square.mean((1, 2)) - _centre(moments, n).square() + var.mean((1, 2))).sqrt()


def _centre(moments: Tensor, n: float) -> Tensor:
    """Per channel: the mean of the latent."""
    return (moments[0] / n).mean((1, 2))


def _energy(reconstruction: Tensor, image: Tensor) -> Tensor:
    """High-frequency energy ratio, 1 where the original has none."""
    ratio = high_frequency_energy(reconstruction, image)
    return torch.where(torch.isfinite(ratio), ratio, torch.ones_like(ratio))
