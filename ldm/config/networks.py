"""The networks except for the autoencoder, which is a package of its own. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from autoencoder.config import MOST_CHANNELS, MOST_LAYERS, MOST_SIDE, ConfigError, between, divisible, one_of, shown

VECTOR_MAPS = ("mlp", "linear", "identity")


@dataclass(frozen=True)
class UNetConfig:
    """The conditional U-Net, expressible as diffusers' UNet2DConditionModel.

    Input and output channels follow from the latent, the context width from the text encoder.
    """

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_level: int = 2  # residual blocks per level going down; one more going up
    attention_levels: tuple[int, ...] | None = None  # levels with attention besides the middle; None: all but the last
    heads: tuple[int, ...] = (8,)  # one number, or one per level
    transformer_layers: int = 1
    groups: int = 32
    linear_projection: bool = False  # the transformer's projections as Linear (SD 2) or 1×1 convolution (SD 1)
    scale_shift: bool = False  # true: the timestep embedding scales and shifts; false: it is added
    vector_dim: int | None = None  # width of a vector added to the timestep embedding (not in training configurations)
    concat_channels: int = 0  # additional input channels, e.g. a mask (not in training configurations)
    vector_map: str = "mlp"  # with vector_dim: two layers, one, or none
    num_labels: int | None = None  # class labels, each with a learned vector (not in training configurations)
    sinusoidal_labels: bool = False  # a number embedded like the timestep (not in training configurations)
    upcast_attention: bool = False  # attention scores in float32: kept for other readers, here they always are

    def __post_init__(self) -> None:
        between(self, 1, MOST_LAYERS, "layers_per_level", "transformer_layers")
        between(self, 1, MOST_CHANNELS, "groups", "vector_dim")
        between(self, 1, 10**7, "num_labels")
        between(self, 0, MOST_CHANNELS, "concat_channels")
        divisible(self.channels, self.groups)
        self._check_class_embedding()
        if self.attention_levels is None:  # resolved here, so that a saved configuration says it
            object.__setattr__(self, "attention_levels", tuple(range(max(1, len(self.channels) - 1))))
        for level in self.attending:
            if not 0 <= level < len(self.channels):
                levels = f"{len(self.channels)} (0 to {len(self.channels) - 1})"
                raise ConfigError(f"attention_levels: {shown(level)} is not a level of {levels}")
        if len(self.heads) not in (1, len(self.channels)):
            wanted = f"one number or one per level ({len(self.channels)})"
            raise ConfigError(f"heads must be {wanted}, got {shown(list(self.heads))}")
        for level in sorted({*self.attending, len(self.channels) - 1}):  # the middle has the heads of the last
            if (h := self.heads[level if len(self.heads) > 1 else 0]) < 1 or self.channels[level] % h:
                raise ConfigError(f"heads: {shown(h)} does not divide channels {self.channels[level]} of level {level}")

    @property
    def attending(self) -> tuple[int, ...]:
        """``attention_levels``, resolved."""
        assert self.attention_levels is not None
        return self.attention_levels

    @property
    def time_dim(self) -> int:
        """Width of the timestep embedding."""
        return 4 * self.channels[0]

    @property
    def class_embedded(self) -> bool:
        """True if a vector or label condition is added to the timestep embedding."""
        return self.vector_dim is not None or self.num_labels is not None or self.sinusoidal_labels

    def _check_class_embedding(self) -> None:
        """Raise ConfigError for several embedded conditions, or a map without a vector."""
        one_of(self, VECTOR_MAPS, "vector_map")
        given = {
            "vector_dim": self.vector_dim,
            "num_labels": self.num_labels,
            "sinusoidal_labels": self.sinusoidal_labels or None,
        }
        if len(names := [name for name, value in given.items() if value is not None]) > 1:
            reason = "one condition is added to the timestep embedding"
            raise ConfigError(f"{names[0]} and {names[1]} exclude each other: {reason}")
        if self.vector_map != "mlp" and self.vector_dim is None:
            raise ConfigError("vector_map is for vector_dim: set it, or leave both out")
        if self.vector_map == "identity" and self.vector_dim != self.time_dim:
            wanted = f"{self.time_dim} (4 · channels[0])"
            raise ConfigError(f"vector_dim must be {wanted} for vector_map identity, got {self.vector_dim}")


@dataclass(frozen=True)
class ClipConfig:
    """A small CLIP: transformers' text and vision towers, of equal width."""

    width: int = 128
    layers: int = 2
    heads: int = 2
    max_length: int = 77  # tokens, start and end included
    merges: int = 512  # learned BPE merges on top of the 2 × 256 byte symbols
    patch_size: int = 4
    # Deviation of the vision tower's initial position embeddings, by default transformers' own. With 1 it learns far
    # sooner where in an image things are (docs/training.md).
    position_std: float = 0.02
    projection: int = 64

    def __post_init__(self) -> None:
        between(self, 1, MOST_CHANNELS, "width", "heads", "projection")
        between(self, 1, MOST_LAYERS, "layers")
        between(self, 1, MOST_SIDE, "patch_size")
        between(self, 0, 10**6, "merges")
        between(self, 4, 77, "max_length")
        between(self, 0, 100, "position_std")
        if self.width % self.heads:
            raise ConfigError(f"width {self.width} is not a multiple of heads {self.heads}")


@dataclass(frozen=True)
class ClassifierConfig:
    """The classifier of noisy samples (docs/equations.md L11): the down half of a U-Net, pooled."""

    channels: tuple[int, ...] = (64, 128, 256)
    layers_per_level: int = 1
    groups: int = 32

    def __post_init__(self) -> None:
        between(self, 1, MOST_LAYERS, "layers_per_level")
        between(self, 1, MOST_CHANNELS, "groups")
        divisible(self.channels, self.groups)
