"""Cut crops from the photographs inside scikit-learn and scikit-image, for training and comparing autoencoders.

python examples/folder_of_photos.py runs/photographs/crops
ldm train-autoencoder configs/photographs/gan.yaml

Crops for training and for validation come from different photographs. `make photos` does it all.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.data.folder import in_validation
from ldm.data.rng import generator
from ldm.data.writing import check_new, write_folder
from ldm.errors import DataError, UserError

SPLITS = {
    "train": ("astronaut", "chelsea", "china", "flower", "grass", "gravel", "rocket"),
    "validation": ("coffee", "motorcycle"),
}
FRACTION = 0.1  # data.validation_fraction of the configurations


def photographs() -> dict[str, Image.Image]:
    """The photographs of SPLITS by name, from the installed packages. Raises DataError if one of them is missing."""
    try:
        from skimage import data
        from sklearn.datasets import load_sample_image
    except ModuleNotFoundError as error:
        raise DataError(
            f"{error.name} is missing: pip install scikit-learn scikit-image (they are in the extra `photos`)"
        ) from None
    photos = {name: load_sample_image(f"{name}.jpg") for name in ("china", "flower")}
    photos["motorcycle"] = data.stereo_motorcycle()[0]
    names = {name for split in SPLITS.values() for name in split} - photos.keys()
    photos |= {name: getattr(data, name)() for name in names}
    return {name: Image.fromarray(pixels).convert("RGB") for name, pixels in photos.items()}


def crops(photos: Mapping[str, Image.Image], count: int, size: int) -> Iterator[tuple[Image.Image, dict[str, Any]]]:
    """Yield ``count`` crops of ``size`` pixels, cut up to twice as large, with their rows for metadata.jsonl.

    The hash of a file's name puts it into training or validation; its crop is from a photograph of
    that split, drawn in proportion to its area.
    """
    for number in range(count):
        file_name = f"{number:05d}.png"
        names = SPLITS["validation" if in_validation(file_name, FRACTION) else "train"]
        areas = np.array([photos[name].width * photos[name].height for name in names], dtype=float)
        rng = generator(0, "crops", number)
        name = names[rng.choice(len(names), p=areas / areas.sum())]
        photo = photos[name]
        side = int(rng.integers(size, min(2 * size, photo.width, photo.height) + 1))
        left, top = int(rng.integers(photo.width - side + 1)), int(rng.integers(photo.height - side + 1))
        crop = photo.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
        yield crop, {"file_name": file_name, "text": name, "left": left, "top": top, "side": side}


def main(folder: str, count: int, size: int) -> int:
    check_new(Path(folder))
    photos = photographs()
    largest = min(min(photo.size) for photo in photos.values())
    if not 16 <= size <= largest or count < 100:
        raise DataError(f"a crop has 16 to {largest} pixels, and there are at least 100 of them: got {size}, {count}")
    written = write_folder(Path(folder), crops(photos, count, size))
    print(f"{folder}: {written} crops of {size} px")
    return written


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--count", type=int, default=4096)
    parser.add_argument("--size", type=int, default=64)
    arguments = parser.parse_args()
    try:
        main(arguments.folder, arguments.count, arguments.size)
    except (UserError, OSError) as error:
        sys.exit(f"{parser.prog}: {error}")
