"""Judge of digits: a support vector machine trained on the real digits of the train split."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from ldm.config import DataConfig
from ldm.data.digits import DigitsSource


class DigitJudge:
    """An RBF support vector machine on 8×8 averages of square images. Raises DataError without scikit-learn."""

    def __init__(self, side: int) -> None:
        self.side = side
        images, labels = self._real("train")
        from sklearn.svm import SVC

        # scikit-learn's stub allows only text as labels
        self._model = SVC(C=10.0, gamma=0.001).fit(self._features(images), labels)  # type: ignore[arg-type]

    def _real(self, split: str) -> tuple[np.ndarray, list[int]]:
        source = DigitsSource(DataConfig(source="digits", image_size=self.side, image_channels=1), split)
        samples = [source[i] for i in range(source.length or 0)]
        return np.stack([s.image for s in samples]), [s.truth for s in samples]

    def _features(self, images: np.ndarray) -> np.ndarray:
        """Area averages in the units of the data set, [n, 64] in 0…16."""
        from PIL import Image

        grey = images.astype(np.float32).mean(-1) * (16 / 255)
        small = [np.asarray(Image.fromarray(g).resize((8, 8), Image.Resampling.BOX)) for g in grey]
        return np.stack(small).reshape(len(small), 64)

    def read(self, images: np.ndarray) -> list[int]:
        """Read the digit of each image, uint8 [n, h, w, c] with any number of channels."""
        if images.ndim != 4 or images.shape[1:3] != (self.side, self.side) or images.dtype != np.uint8:
            raise ValueError(
                f"images must be uint8 [n, {self.side}, {self.side}, c], got {images.dtype} {list(images.shape)}"
            )
        return [int(digit) for digit in self._model.predict(self._features(images))] if len(images) else []

    @cached_property
    def held_out_accuracy(self) -> float:
        """Share of the real digits of the validation split read right: the ceiling of generated ones."""
        images, labels = self._real("validation")
        return float(np.mean(np.array(self.read(images)) == np.array(labels)))
