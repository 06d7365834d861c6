"""LPIPS (Zhang et al. 2018), the perceptual distance; the only file that imports ``lpips``."""

from __future__ import annotations

import warnings
from pathlib import Path

import lpips
import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import models

from autoencoder.config import PERCEPTUAL_NETS, ConfigError

TORCHVISION_FILES = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}
BUILDERS = {"alex": models.alexnet, "vgg": models.vgg16}
SMALLEST = {"alex": 31, "vgg": 16}  # pixels below which the last pooling leaves nothing
RANDOM_SEED = 0


class PerceptualLoss(nn.Module):
    """LPIPS distance between images, all weights frozen; gradients flow to the images.

    ``weights`` is the torchvision trunk's file, ``torchvision`` for the file in torchvision's
    download cache, or ``random`` for an untrained trunk of fixed seed, whose distances are
    meaningless (``meaningful`` is False). The linear heads are those of the installed lpips.
    Nothing is downloaded.

    Raises ConfigError if the net is unknown, or if the file is missing, not a whole state dict of
    that network, or not finite.
    """

    def __init__(self, net: str = "vgg", weights: str | Path = "torchvision") -> None:
        super().__init__()
        if net not in PERCEPTUAL_NETS:
            raise ConfigError(f"lpips_net must be one of {', '.join(PERCEPTUAL_NETS)}, got {net!r}")
        self.net = net
        self.meaningful = str(weights) != "random"
        network = _read(_locate(net, weights), net) if self.meaningful else None
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # building draws from the global generator
            # lpips calls torchvision in a deprecated way
            warnings.filterwarnings("ignore", "(The parameter 'pretrained'|Arguments other than a weight enum)")
            torch.default_generator.manual_seed(RANDOM_SEED)
            self.distance = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        if network is not None:
            _load_trunk(self.distance.net, network)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> PerceptualLoss:
        """Stay in evaluation mode: the heads hold dropout, and a frozen metric does not train."""
        return super().train(False)

    def forward(self, a: Float[Tensor, "b C H W"], b: Float[Tensor, "b C H W"]) -> Float[Tensor, " b"]:
        """Return the distance of each pair of images in [−1, 1], shape [b].

        One channel is repeated to three. Raises ValueError for other channel counts than 1 and 3,
        and for sides below 31 pixels (alex) or 16 (vgg).
        """
        if a.shape[1] not in (1, 3):
            raise ValueError(
                f"LPIPS compares images of 1 or 3 channels, got {a.shape[1]}: set loss.lpips to 0 for other data"
            )
        least = SMALLEST[self.net]
        if min(a.shape[2:]) < least:
            raise ValueError(
                f"image {a.shape[2]}×{a.shape[3]} is too small for LPIPS with {self.net}: "
                f"each side needs at least {least} pixels"
            )
        if a.shape[1] == 1:
            a, b = a.expand(-1, 3, -1, -1), b.expand(-1, 3, -1, -1)
        return self.distance(a, b).flatten()


def _locate(net: str, weights: str | Path) -> Path:
    cached = Path(torch.hub.get_dir()) / "checkpoints" / TORCHVISION_FILES[net]
    path = cached if str(weights) == "torchvision" else Path(weights)
    if not path.is_file():
        raise ConfigError(
            f"LPIPS weights not found at {path}: put torchvision's {TORCHVISION_FILES[net]} there, "
            "or set loss.lpips_weights to that file's path, or to `random` for a test without meaning"
        )
    return path


def _read(path: Path, net: str) -> nn.Module:
    """The whole torchvision network in the file, strictly: no other file may pass for it."""
    expected = f"expected the whole state dict of torchvision's {net} ({TORCHVISION_FILES[net]})"
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for other files
        raise ConfigError(f"LPIPS weights {path} cannot be read ({type(error).__name__}): {expected}") from error
    with torch.device("meta"):  # takes no memory and draws no numbers
        network = BUILDERS[net](weights=None)
    try:
        network.load_state_dict(state, strict=True, assign=True)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[-1].strip()[:200]
        raise ConfigError(f"LPIPS weights {path} do not fit ({reason}): {expected}") from error
    if not all(bool(tensor.isfinite().all()) for tensor in network.state_dict().values()):
        raise ConfigError(f"LPIPS weights {path} hold values that are infinite or NaN: {expected}")
    return network


def _load_trunk(trunk: nn.Module, network: nn.Module) -> None:
    """Copy the convolutions in.

    They are numbered in lpips by slice and by torchvision's index in ``features``.
    """
    features = network.get_submodule("features").state_dict()
    trunk.load_state_dict({key: features[key.split(".", 1)[1]] for key in trunk.state_dict()}, strict=True)
