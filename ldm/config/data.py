"""Sources of images and captions. Imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from autoencoder.config import MOST_CHANNELS, MOST_SIDE, ConfigError, between, one_of, shown

SOURCES = ("folder", "shapes", "shapes-two", "shapes-striped", "shapes-columns", "digits", "textures")
CAPTIONS = ("metadata", "sidecar", "class", "none")


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes of the images that an autoencoder trains on. Its captions do not matter, so all may change."""

    turn: bool = False  # quarter turns, mirrored or not
    zoom: float = 1.0  # the smallest part that is cut out and enlarged, as a share of the side; 1: none
    colours: bool = False  # channels exchanged, inverted and faded

    def __post_init__(self) -> None:
        between(self, 0.05, 1.0, "zoom")

    @property
    def none(self) -> bool:
        """True if nothing is changed."""
        return self == AugmentConfig()


@dataclass(frozen=True)
class DataConfig:
    """Source of images and captions, and the transform to [c, size, size] in [−1, 1]."""

    source: str = "folder"
    folder: str | None = None  # for source: folder
    captions: str = "metadata"  # metadata.jsonl or .csv; sidecar: a.txt beside a.png; class: class_name/a.png; or none
    text_column: str = "text"  # folder with metadata: the column that holds the caption
    caption_templates: tuple[str, ...] = ("a photo of a {}",)  # captions: class, one per image; {} is the class name
    image_size: int = 256
    image_channels: int = 3
    size: int | None = None  # procedural sources: number of training images; null: endless
    crop: str = "center"  # or random
    flip: bool = False  # mirror left–right with probability ½, unless the caption says left or right
    background: tuple[int, int, int] = (255, 255, 255)  # folder: the colour under transparent pixels, 0 to 255
    min_side: int | None = None  # folder: images with a shorter side are left out; null: a quarter of image_size
    max_skipped: float = 0.01  # folder: share of images and rows that may be unusable before the run stops
    accept_changes: bool = False  # folder: continue with a run although its images or captions have changed
    validation_fraction: float = 0.05  # folder: share of files, chosen by a hash of the file name
    workers: int = 0  # data worker processes per training process
    worker_timeout: int = 300  # seconds without data from a worker before the run ends

    def __post_init__(self) -> None:
        one_of(self, SOURCES, "source")
        one_of(self, CAPTIONS, "captions")
        one_of(self, ("center", "random"), "crop")
        between(self, 1, MOST_SIDE, "image_size", "min_side")
        between(self, 1, MOST_CHANNELS, "image_channels")
        between(self, 1, 10**8, "size")
        between(self, 1, 10**7, "worker_timeout")
        between(self, 0, 1024, "workers")
        between(self, 0.0, 0.5, "validation_fraction")
        between(self, 0.0, 1.0, "max_skipped")
        if (self.folder is not None) != (self.source == "folder"):
            got = f"source {self.source!r} and folder {self.folder!r}"
            raise ConfigError(f"folder goes with source: folder and with no other, got {got}")
        if self.size is not None and self.source in ("folder", "digits"):
            raise ConfigError(f"size is for procedural sources (shapes, shapes-two, textures), not for {self.source}")
        if self.flip and self.source in ("shapes-two", "digits"):
            raise ConfigError(f"flip must be false for {self.source}: a mirrored image no longer fits its caption")
        if not all(0 <= part <= 255 for part in self.background):
            raise ConfigError(f"background must be three numbers from 0 to 255, got {shown(list(self.background))}")
        if not self.caption_templates or any(template.count("{}") != 1 for template in self.caption_templates):
            raise ConfigError(f"caption_templates must each hold {{}} once, got {shown(list(self.caption_templates))}")
        self._refuse_unused()

    def _refuse_unused(self) -> None:
        """Reject settings that the chosen source ignores."""
        unread: dict[str, str] = {}
        if self.source != "folder":
            names = ("captions", "background", "min_side", "max_skipped", "accept_changes")
            unread = dict.fromkeys(names, "source: folder")
        if self.captions != "metadata" or self.source != "folder":
            unread["text_column"] = "captions: metadata"
        if self.captions != "class":
            unread["caption_templates"] = "captions: class"
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name, where in unread.items():
            if getattr(self, name) != defaults[name]:
                raise ConfigError(f"{name} is for {where}: leave it out")

    @property
    def smallest_side(self) -> int:
        """Images of a folder with a shorter side than this are left out."""
        return max(1, self.image_size // 4) if self.min_side is None else self.min_side
