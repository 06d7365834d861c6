"""Survey of a folder of images before training, for `ldm init`."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from statistics import median

from ldm.config import CAPTIONS, DataConfig
from ldm.data.captions import CAPTION_NAMES, Row, missing_metadata, near_misses, read_rows
from ldm.data.decode import SUFFIXES, Header, read_header, read_image, too_long
from ldm.data.folder import in_validation
from ldm.data.names import Listing, all_files, image_files
from ldm.data.sample import BadSample, Skipped
from ldm.data.tables import METADATA, text_columns
from ldm.errors import DataError

# Folder names that are not classes.
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "eval"}
UNREAD_IMAGES = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".raw", ".cr2", ".nef", ".dng", ".svg", ".psd", ".exr")
DARK = 64  # of 255: brightest pixel of a 14-bit image that is stored in 16 bits
DECODED = 5000  # images at most that are fully decoded, unless all are asked for
MOST_VALIDATION, WANTED_VALIDATION = 0.2, 16  # largest share of the files, and number of images wanted


@dataclass(frozen=True)
class Survey:
    """Findings of a survey. ``headers`` and ``rows`` correspond: one of each per usable image."""

    data: DataConfig  # the settings that read this folder
    rows: tuple[Row, ...]
    headers: tuple[Header, ...]
    skipped: tuple[Skipped, ...]
    decoded: int  # images fully decoded; of the others, only the header was read
    others: dict[str, int]  # files that are neither images nor captions, by suffix
    unlisted: int  # images without a row of metadata
    remarks: tuple[str, ...]

    @property
    def total(self) -> int:
        """Number of images and rows surveyed."""
        return len(self.rows) + len(self.skipped)

    @property
    def short_side(self) -> int:
        """Median of the images' shorter sides, in pixels."""
        return int(median(min(h.width, h.height) for h in self.headers))

    @property
    def split(self) -> tuple[int, int]:
        """Numbers of images for training and for validation."""
        validation = sum(in_validation(row.file_name, self.data.validation_fraction) for row in self.rows)
        return len(self.rows) - validation, validation

    @property
    def grey(self) -> bool:
        """True if no image has colour."""
        return all(h.mode in ("1", "L", "LA", "La") or h.mode.startswith("I;16") for h in self.headers)


def survey(
    folder: Path, captions: str | None = None, every: bool = False, progress: Callable[[int, int], None] | None = None
) -> Survey:
    """Survey every image of ``folder``. Raises DataError.

    ``captions``: their layout (None: detect it). ``every``: decode all images fully, not only about
    DECODED of them, evenly spaced.
    """
    layout, remarks = (captions, []) if captions else detect(folder)
    column, column_remarks = _text_column(folder) if layout == "metadata" else ("text", [])
    remarks = [*remarks, *column_remarks]
    data = DataConfig(folder=str(folder), captions=layout, text_column=column, min_side=1, max_skipped=1.0)
    found, left_out = read_rows(data)
    skipped, rows, headers, decoded, dark = list(left_out), [], [], 0, []
    stride = 1 if every else max(1, -(-len(found) // DECODED))
    for i, row in enumerate(found):
        try:
            headers.append(read_header(folder / row.file_name))
            if i % stride == 0:
                brightest = read_image(folder / row.file_name, 3).max()
                decoded += 1
                if headers[-1].bits == 16 and 0 < brightest <= DARK:
                    dark.append(row.file_name)
        except BadSample as bad:
            del headers[len(rows) :]
            skipped.append(bad.skipped)
        else:
            rows.append(row)
        if progress:
            progress(i + 1, len(found))
    if not rows:
        first = skipped[0]
        raise DataError(
            f"{folder}: none of {len(skipped)} images and rows can be used, such as {first.file}: {first.reason}"
        )
    if layout != "none" and not any(row.text.strip() for row in rows):
        raise DataError(f"{folder}: every caption is empty: fix them, or train without with --captions none")
    unlisted = 0
    if layout == "metadata":
        unlisted = len(set(image_files(folder)) - {row.file_name for row in found})
    data = dataclasses.replace(data, min_side=None, max_skipped=0.01)
    others = _others(folder, layout)
    if unread := sum(n for suffix, n in others.items() if suffix in UNREAD_IMAGES):
        remarks.append(f"{unread} images are of formats that are not read: convert them to JPEG or PNG")
    if dark:
        remarks.append(
            f"{len(dark)} images of 16 bits, such as {dark[0]}, stay below a quarter of white, as 10, 12 or 14 bits"
            " stored in 16 do: they are read as they are, nearly black; scale them if so"
        )
    return Survey(data, tuple(rows), tuple(headers), tuple(skipped), decoded, others, unlisted, tuple(remarks))


def leave_out_small(looked: Survey, image_size: int) -> Survey:
    """The survey for training at ``image_size``, without images too small or too long for it."""
    data = dataclasses.replace(looked.data, image_size=image_size, image_channels=1 if looked.grey else 3)
    kept: list[tuple[Row, Header]] = []
    refused: list[Skipped] = []
    for row, h in zip(looked.rows, looked.headers, strict=True):
        reason = too_long(h.width, h.height, image_size)
        if min(h.width, h.height) < data.smallest_side:
            reason = f"{h.width}×{h.height} is smaller than {data.smallest_side} pixels"
        if reason:
            refused.append(Skipped(str(Path(str(data.folder)) / row.file_name), reason))
        else:
            kept.append((row, h))
    if not kept:
        raise DataError(f"{data.folder}: no image is left, such as {refused[0].file}: {refused[0].reason}")
    left_out = (*looked.skipped, *refused)
    data = dataclasses.replace(data, validation_fraction=_fraction([row for row, _ in kept], left_out, data))
    rows, headers = zip(*kept, strict=True)
    return dataclasses.replace(looked, data=data, rows=rows, headers=headers, skipped=left_out)


def detect(folder: Path) -> tuple[str, list[str]]:
    """Layout of the captions (one of CAPTIONS), and remarks.

    Raises DataError where that is unclear.
    """
    if not folder.is_dir():
        raise DataError(f"no folder {folder}" if not folder.exists() else f"{folder} is a file, no folder of images")
    present = [name for name in METADATA if (folder / name).is_file()]
    if present:
        return "metadata", []
    if below := sorted(str(file.relative_to(folder)) for name in METADATA for file in folder.glob(f"*/{name}")):
        raise DataError(
            f"{folder} has no {METADATA[0]}, but {', '.join(below[:5])}: give that folder, or move the file up"
        )
    if near := near_misses(folder):
        raise DataError(
            f"{folder} has no {METADATA[0]} and no {METADATA[1]}, but {', '.join(near[:5])}: rename it if it holds"
            f" the captions, or say where they are with --captions ({', '.join(CAPTIONS[1:])})"
        )
    listing = Listing(folder)
    images = list(listing.images)
    if not images:
        raise DataError(f"{folder} holds no image ({', '.join(SUFFIXES)})")
    others = set(listing.names) - set(images)
    if any(listing.captions(name) for name in images):
        return "sidecar", []
    _refuse_other_sidecars(folder, images, others)
    classes = {name.split("/")[0] for name in images if "/" in name}
    if len(classes) > 1 and all("/" in name for name in images):
        if named := sorted(c for c in classes if c.lower() in SPLITS):
            raise DataError(
                f"{folder}: {', '.join(named)} look like splits, not classes: give one of them (validation is split off"
                " automatically), or say --captions class"
            )
        return "class", [f"captions are made from the {len(classes)} folder names ({', '.join(sorted(classes)[:5])} …)"]
    return "none", [
        "no captions found: the model will be unconditional (say --captions class if the folder names are classes)"
    ]


def _refuse_other_sidecars(folder: Path, images: list[str], others: set[str]) -> None:
    """Raise DataError if most images have a file beside them that may hold a caption."""
    names = {*images, *(str(PurePosixPath(name).with_suffix("")) for name in images)}
    beside = [name for name in others if str(PurePosixPath(name).with_suffix("")) in names]  # a.caption, and a.png.txt
    if 2 * len(beside) >= len(images):
        example = min(beside)
        raise DataError(
            f"{folder}: {len(beside)} files such as {example} are beside images: if they hold captions, rename them to"
            f" {PurePosixPath(example.removesuffix('.txt')).with_suffix('.txt')}; else say --captions none or class"
        )


def _text_column(folder: Path) -> tuple[str, list[str]]:
    """Column of the captions, by the first row with a text: `text`, or a similar name."""
    path = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    if path is None:
        raise DataError(missing_metadata(folder))
    columns = text_columns(path)
    near = [c for c in columns if c.lower() in CAPTION_NAMES]
    if "text" in columns or not near:
        return "text", []
    return near[0], [f"{path.name} has no column `text` but `{near[0]}`: that one is read (data.text_column)"]


def _fraction(rows: Sequence[Row], left_out: Sequence[Skipped], data: DataConfig) -> float:
    """Validation share: a twentieth, or more if that gives too few images."""
    hundredths = round(100 * max(0.05, min(MOST_VALIDATION, WANTED_VALIDATION / len(rows))))
    for h in range(hundredths, 51):
        if 0 < sum(in_validation(row.file_name, h / 100) for row in rows) < len(rows):
            return h / 100
    others = ""
    if left_out:
        others = f", and {len(left_out)} were left out, such as {left_out[0].file}: {left_out[0].reason}"
    what = f"{len(rows)} usable image{'s are' if len(rows) > 1 else ' is'}"
    raise DataError(f"{data.folder}: {what} too few to train on some and validate on others{others}")


def _others(folder: Path, layout: str) -> dict[str, int]:
    """Numbers of files below the folder that the layout does not read, by suffix."""
    read = {*SUFFIXES, ".txt"} if layout == "sidecar" else set(SUFFIXES)
    names = (name for name in all_files(folder) if not (layout == "metadata" and name in METADATA))
    suffixes = Counter(PurePosixPath(name).suffix.lower() or "no suffix" for name in names)
    return {suffix: n for suffix, n in suffixes.most_common() if suffix not in read}
