"""Strict judge of drawn shapes: accepts an image that is nearer to a drawn scene than to anything else, or refuses it.

Stars, crosses and rings may be drawn as one of `outlines.VARIANTS`: softly rounded, leaning, a little uneven. What else
an image may show are the outlines of `outlines.DECOYS`, shapes of other sizes, and what no template explains. The
thresholds were set on pictures that a trained model drew, labelled by eye: docs/results.md has the figures.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data.shapes import BACKGROUNDS, COLOURS, RADII, SHAPES, SIZES, STRIPE, Object, Scene, inside
from ldm.evaluation.judges.outlines import DECOYS, VARIANTS, Outline
from ldm.evaluation.judges.shapes import ShapesJudge, agreement, check, matched, ordered

# What is accepted
RESIDUAL = 0.09  # largest residual of an object's fit
MARGIN = 0.33  # share of what the shape leaves unexplained that a decoy must explain for a refusal
FLOOR = 0.003  # residual that any drawing may have, between the templates: added to the shape's in that share
STRAY, STRAY_SIDE = 0.36, 0.4  # largest mean left by the fit over squares of this side: of the contrast, of the radius
TOLERANCE = 0.1  # of the radius
LOOSE_TOLERANCE = 0.2  # of the radius if captions name no size
OFF_PALETTE = 58  # levels from a colour of the palette: half the distance between the nearest two
FAINTEST = 0.7  # contrast of an object over the contrast of the colours it is read as
EMPTY = 30  # levels of contrast below which nothing is drawn
LEAST_BACKGROUND = 0.25  # of the image
NOISIEST = 0.08  # σ of noise that is subtracted from the residual, of the range
NOTHING = "nothing is drawn"

# How images and templates are compared
BLUR = 0.7  # σ in px of the Gaussian blur applied to images and templates: edges of equal softness, less noise
BLURS = (0.2, 0.75)  # σ in px of the templates' own blur: images from latents are soft
SIDE = 32  # one object: larger images are averaged down to a side between this and twice as much
STEP = 1.08  # ratio of neighbouring radii of the templates
SMALLEST, LARGEST = 0.4, 1.3  # radii of templates, over the smallest and the largest that is drawn
COMPONENTS = 128  # principal components in which templates are weighed
CHI_SQUARE = 3 / 1.2125  # mean over first quartile of its distribution with 3 degrees of freedom
_REACH = 2  # half pixels between the centroids of template and image, at most, along either axis
_FINE = 4  # samples per pixel along either axis
_CHUNK = 256  # images weighed at once


@dataclass(frozen=True)
class Verdict:
    """Reading of an image.

    Attributes:
        scene: the nearest scene.
        refused: reasons why the image does not show it, by attribute as in ``agreement``; empty if it is accepted.
        residual: squared error of the worst object's fit over the energy that the fit explains.
    """

    scene: Scene
    refused: dict[str, str]
    residual: float


@dataclass(frozen=True)
class Template:
    """Outline drawn by one row of a bank; ``name``: of a shape or of a decoy."""

    name: str
    radius: float  # px
    dx: float  # of the outline's origin from the window's middle, px
    dy: float
    striped: bool = False


@dataclass(frozen=True)
class Fit:
    """The fits of some pictures' objects.

    Attributes:
        shape: [n] row of the bank that fits best among those of drawn shapes.
        decoy: [n] the best of the decoys.
        margin: [n] share of the shape's squared error that the decoy explains.
        residual: [n] squared error of the shape over the energy that it explains.
        stray: [n] largest mean of what is left of the cell over a square of STRAY_SIDE, over the contrast.
        colour: [n, 3] of the object in 0…1.
        x, y: [n] the window's middle.
    """

    shape: Tensor
    decoy: Tensor
    margin: Tensor
    residual: Tensor
    stray: Tensor
    colour: Tensor
    x: Tensor
    y: Tensor


class Bank:
    """Templates of all shapes and decoys as unit vectors.

    ``drawn``: radii of the scenes' objects in px; ``tolerance``: as a share of them; ``stripe``: height of stripes in
    px, None for plain shapes.

    Attributes:
        window: side of a template, px.
        rows: float32 [k, window²], blurred, each of norm 1.
        norms: float32 [k], of the rows before.
        templates: outline of each row.
        origin: float32 [k, xy], of the outlines from the window's middle, px.
        drawn: number of the rows that are of drawn shapes and their variants; they come first.
    """

    def __init__(self, drawn: tuple[float, ...], tolerance: float, stripe: float | None) -> None:
        least, most = SMALLEST * min(drawn), LARGEST * max(drawn)
        near = sorted({r * STEP**k for r in drawn for k in range(-9, 10) if abs(STEP**k - 1) < 1.6 * tolerance})
        rest = [least * STEP**k for k in range(math.ceil(math.log(most / least) / math.log(STEP)))]
        rest = [r for r in rest if all(abs(math.log(r / n)) > 0.7 * math.log(STEP) for n in near)]
        self.window = 2 * math.ceil(most) + 3
        drawn_outlines = [(shape, partial(inside, shape), radius) for shape in SHAPES for radius in near + rest]
        drawn_outlines += [(shape, outline, r) for shape, some in VARIANTS.items() for outline in some for r in near]
        self.templates: list[Template] = []
        fine: list[Tensor] = []
        for shape, outline, radius in drawn_outlines:
            for height in (None,) if stripe is None or radius in rest else (None, stripe):
                fine.append(self._fine(shape, outline, radius, height))
        self.drawn = len(self.templates)
        for name, outlines in DECOYS.items():
            fine += [self._fine(name, outline, radius, None) for outline, radius in itertools.product(outlines, near)]
        sharp = torch.stack(fine)
        rows = torch.stack([blur(sharp, 2 * math.hypot(BLUR, sigma)) for sigma in BLURS], 1)  # σ in half pixels
        rows = rows.flatten(0, 1)
        starts = range(2 * _REACH + 1)
        rows = torch.stack(
            [rows[:, y:, x:][:, ::2, ::2][:, : self.window, : self.window] for y in starts for x in starts], 1
        )
        rows = rows.reshape(len(self.templates), -1)
        self.norms = rows.norm(dim=1)
        self.rows = rows / self.norms[:, None]
        self.origin = torch.tensor([(t.dx, t.dy) for t in self.templates])  # [k, xy]
        some = self.rows[::7]  # prime to the number of offsets and blurs: all of them occur
        self.basis = torch.linalg.eigh(some.T @ some).eigenvectors[:, -COMPONENTS:]
        self.weights = self.rows @ self.basis

    def _fine(self, name: str, outline: Outline, radius: float, stripe: float | None) -> Tensor:
        """Coverage of whole pixels at every half pixel, with the outline's centroid in the middle."""
        wide = self.window + _REACH
        points = (np.arange(wide * _FINE) + 0.5) / _FINE - wide / 2  # px from the middle
        mask = outline(points[None] / radius, points[:, None] / radius)
        if stripe is not None:
            mask = mask & (np.floor(points / stripe + 0.5) % 2 == 0)[:, None]
        area = mask.sum()
        x0, y0 = (round(float((mask.sum(axis) * points).sum() / area) * _FINE) for axis in (0, 1))
        mask = np.roll(mask, (-y0, -x0), (0, 1)).astype(np.float32)
        half = [i / 2 - _REACH / 2 for i in range(2 * _REACH + 1)]
        self.templates += [
            Template(name, radius, -dx - x0 / _FINE, -dy - y0 / _FINE, stripe is not None)
            for _, dy, dx in itertools.product(BLURS, half, half)
        ]
        return F.avg_pool2d(torch.from_numpy(mask)[None], _FINE, _FINE // 2)[0]


@lru_cache(maxsize=8)
def bank(drawn: tuple[float, ...], tolerance: float, stripe: float | None) -> Bank:
    """The templates of objects with the radii ``drawn`` (px)."""
    return Bank(drawn, tolerance, stripe)


def blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of the last two axes, edges repeated; σ in px."""
    reach = math.ceil(3 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma).square())
    kernel = kernel / kernel.sum()
    flat = images.reshape(-1, 1, *images.shape[-2:])
    flat = F.conv2d(F.pad(flat, (reach, reach, 0, 0), mode="replicate"), kernel[None, None, None])
    flat = F.conv2d(F.pad(flat, (0, 0, reach, reach), mode="replicate"), kernel[None, None, :, None])
    return flat.reshape(images.shape)


class StrictJudge:
    """Reads pictures by comparing each object with templates of all shapes and decoys, in any colour, place and size.

    The background's colour is the median of the pixels nearest to it; an object's is that of least squares. Two objects
    are looked for where the nearest scene has them, and each owns the pixels that are nearer to it than to the other.
    """

    def __init__(self, side: int, objects: int, striped: bool = False) -> None:
        self.side, self.objects = side, objects
        self._nearest = ShapesJudge(side, objects, striped)
        self._factor = max(1, side // SIDE) if objects == 1 else 1
        self._sizes: tuple[str | None, ...] = SIZES if objects == 1 else (None,)
        self._radii = tuple(RADII[size] * side / self._factor for size in self._sizes)
        self._tolerance = TOLERANCE if objects == 1 else LOOSE_TOLERANCE
        self._bank = bank(self._radii, self._tolerance, STRIPE * side / self._factor if striped else None)
        self._backgrounds = torch.tensor(list(BACKGROUNDS.values())) / 255
        self._colours = torch.tensor(list(COLOURS.values())) / 255

    def read(self, images: np.ndarray) -> list[Verdict]:
        """The verdict on each image, uint8 [n, side, side, 3]."""
        check(images, self.side)
        verdicts: list[Verdict] = []
        with torch.inference_mode():
            for start in range(0, len(images), _CHUNK):
                verdicts += self._verdicts(images[start : start + _CHUNK])
        return verdicts

    def _verdicts(self, images: np.ndarray) -> list[Verdict]:
        batch = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        ground, near, share = self._ground(batch)
        scenes = self._nearest.read(images, near.tolist()) if self.objects == 2 else []
        rest = F.avg_pool2d(batch, self._factor) - ground[..., None, None]
        rest = blur(rest, BLUR)
        cells = self._cells(scenes, rest)
        fits = [self._fit(rest * cells[:, i, None], cells[:, i], ground) for i in range(self.objects)]
        verdicts = []
        for i, b in enumerate(near.tolist()):
            refused: dict[str, str] = {}
            if (ground[i] - self._backgrounds[b]).norm() * 255 > OFF_PALETTE or share[i] < LEAST_BACKGROUND:
                refused["background"] = "no background colour"
            objects = [self._object(fit, i, b, refused) for fit in fits]
            residual = max(float(fit.residual[i]) for fit in fits)
            background = list(BACKGROUNDS)[b]
            scene = Scene(background, tuple(objects)) if len(objects) == 1 else ordered(background, *objects)
            verdicts.append(Verdict(scene, refused, residual))
        return verdicts

    def _ground(self, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The background's colour [n, 3], number [n] and share of the picture [n]."""
        pixels = batch.flatten(2).transpose(1, 2)  # [n, p, 3]
        close = torch.cdist(pixels, self._backgrounds[None]) * 255 <= OFF_PALETTE  # [n, p, b]
        share, near = close.float().mean(1).max(1)
        mine = close.gather(2, near[:, None, None].expand(-1, close.shape[1], 1))
        median = pixels.masked_fill(~mine, math.nan).nanmedian(1).values
        return median.nan_to_num(0.0), near, share

    def _cells(self, scenes: list[Scene], rest: Tensor) -> Tensor:
        """Mask of the pixels nearer to each object than to the other, [n, objects, side, side]."""
        side = rest.shape[-1]
        if not scenes:
            return torch.ones(len(rest), 1, side, side, dtype=torch.bool)
        at = torch.tensor([[(o.x, o.y) for o in scene.objects] for scene in scenes]).float()  # [n, 2, xy]
        place = torch.arange(side)
        distance = torch.maximum(
            (place - at[..., :1]).abs()[:, :, None, :], (place - at[..., 1:]).abs()[:, :, :, None]
        )  # [n, 2, y, x]
        first = distance[:, 0] <= distance[:, 1]
        return torch.stack([first, ~first], 1)

    def _fit(self, cell: Tensor, mask: Tensor, ground: Tensor) -> Fit:
        """The best template for what a cell [n, 3, s, s] shows over the background."""
        energy = cell.square().sum(1)
        noise = self._noise(energy, mask)
        above = (energy - 3 * noise[:, None, None]).clamp(min=0) + 1e-12  # 3: 97 % of the noise is below
        place = torch.arange(cell.shape[-1]).float()
        x = ((above.sum(1) * place).sum(1) / above.sum((1, 2))).round().long()
        y = ((above.sum(2) * place).sum(1) / above.sum((1, 2))).round().long()
        half = self._bank.window // 2
        padded, near = F.pad(cell, (half,) * 4), torch.arange(self._bank.window)
        at = torch.arange(len(cell))[:, None, None], (y[:, None] + near)[:, :, None], (x[:, None] + near)[:, None, :]
        window = padded.permute(0, 2, 3, 1)[at].permute(0, 3, 1, 2).flatten(2)  # [n, 3, window²]
        explained = (window @ self._bank.basis @ self._bank.weights.T).square_().sum(1)  # [n, k]
        shape = explained[:, : self._bank.drawn].argmax(1)
        decoy = explained[:, self._bank.drawn :].argmax(1) + self._bank.drawn
        outside = energy.sum((1, 2)) - window.square().sum((1, 2)) - noise * mask.sum((1, 2))
        colour, left = self._refined(window, shape)
        error, by_decoy = (each.square().sum((1, 2)) for each in (left, self._refined(window, decoy)[1]))
        fitted = (colour.norm(dim=1) * self._bank.norms[shape]).square().clamp(min=1e-9)
        residual = (outside + error) / fitted
        margin = (error - by_decoy) / (error + FLOOR * fitted)
        padded.permute(0, 2, 3, 1)[at] = left.unflatten(2, (self._bank.window,) * 2).permute(0, 2, 3, 1)
        stray = self._stray(padded, torch.tensor([self._bank.templates[k].radius for k in shape.tolist()]))
        stray = stray / colour.norm(dim=1).clamp(min=EMPTY / 255)
        return Fit(shape, decoy, margin, residual, stray, ground + colour, x, y)

    def _stray(self, left: Tensor, radius: Tensor) -> Tensor:
        """Largest mean [n] of what fits leave, over squares of STRAY_SIDE of the objects' radii [n]."""
        found = torch.zeros(len(left))
        sides = (STRAY_SIDE * radius).round().clamp(min=3).int()
        for side in sides.unique().tolist():
            mine = sides == side
            found[mine] = F.avg_pool2d(left[mine], side, 1).norm(dim=1).amax((1, 2))
        return found

    def _refined(self, window: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """Colour over the background [n, 3] by a row [n] of the bank, and what is left of the window [n, 3, window²].

        The template is moved and enlarged to first order by what lowers the error most, up to half a step of the bank.
        """
        width = self._bank.window
        template = self._bank.rows[row] * self._bank.norms[row, None]
        colour = (window * template[:, None]).sum(2) / template.square().sum(1, keepdim=True)
        left = window - colour[..., None] * template[:, None]
        down, across = torch.gradient(template.unflatten(1, (width, width)), dim=(1, 2))
        middle = torch.arange(width) - width // 2
        larger = -(
            down * (middle[:, None] - self._bank.origin[row, 1, None, None])
            + across * (middle - self._bank.origin[row, 0, None, None])
        )
        changes = torch.stack([-across, -down, larger], 1).flatten(2)  # [n, 3 changes, window²]
        weight = colour.square().sum(1)[:, None, None].clamp(min=1e-9)
        normal = weight * changes @ changes.transpose(1, 2) + 1e-6 * torch.eye(3)
        wanted = (changes[:, :, None] * (left * colour[..., None])[:, None]).sum((2, 3))
        amount = torch.linalg.solve(normal, wanted)
        most = torch.tensor([0.3, 0.3, math.log(STEP) / 2])
        amount = amount.clamp(-most, most)
        moved = (amount[:, None] @ changes)[:, 0]  # [n, window²]
        return colour, left - colour[..., None] * moved[:, None]

    def _noise(self, energy: Tensor, mask: Tensor) -> Tensor:
        """Energy of normal noise per pixel of a cell, [n], estimated from the first quartile of the energies."""
        energy = energy.masked_fill(~mask, math.nan).flatten(1)
        most = 3 * NOISIEST**2 / (4 * math.pi * BLUR**2)  # of a pixel, after the blur
        return (energy.nanquantile(0.25, 1) * CHI_SQUARE).clamp(max=most)

    def _object(self, fit: Fit, i: int, background: int, refused: dict[str, str]) -> Object:
        """The object that a fit found; adds to ``refused``."""
        many = "s" if self.objects == 2 else ""
        drawn, decoy = (self._bank.templates[int(k[i])] for k in (fit.shape, fit.decoy))
        colour = fit.colour[i]
        distances = (self._colours - colour).norm(dim=1) * 255
        c = int(distances.argmin())
        ground = self._backgrounds[background]
        full = self._colours[c] - ground
        contrast = float((colour - ground) @ full / full.square().sum())
        if float((colour - ground).norm()) * 255 < EMPTY:
            refused["colour" + many] = refused["shape" + many] = NOTHING
        elif distances[c] > OFF_PALETTE:
            refused["colour" + many] = "no colour of the palette"
        elif contrast < FAINTEST:
            refused["colour" + many] = "faint"
        ratios = [abs(drawn.radius / r - 1) for r in self._radii]
        size = ratios.index(min(ratios))
        if fit.margin[i] > MARGIN:
            refused.setdefault("shape" + many, decoy.name)
        elif fit.residual[i] > RESIDUAL:
            refused.setdefault("shape" + many, "no shape fits")
        elif fit.stray[i] > STRAY:
            refused.setdefault("shape" + many, "something is added or missing")
        if refused.get("shape" + many) != NOTHING and min(ratios) > self._tolerance:
            refused["size" if self.objects == 1 else "shapes"] = "size"
        x, y = (
            round((float(middle[i]) + shift) * self._factor + (self._factor - 1) / 2)
            for middle, shift in ((fit.x, drawn.dx), (fit.y, drawn.dy))
        )
        return Object(self._sizes[size], list(COLOURS)[c], drawn.name, x, y, drawn.striped)


REFUSED = "refused"  # the column of a confusion matrix, and the attribute of a row, of pictures that show no scene
Seen = tuple[str, str]  # a shape that was asked for, and the one that was read or REFUSED


def examined(verdict: Verdict, asked: Scene, striped: bool = False) -> tuple[dict[str, bool], list[Seen]]:
    """The attributes that a picture shows as asked, `refused` beside them, and what each shape was read as.

    An attribute for which a picture is refused is wrong, and so is `all` of a refused picture.
    """
    row = agreement(verdict.scene, asked, striped)
    row = {name: right and name not in verdict.refused for name, right in row.items()}
    row["all"] = row["all"] and not verdict.refused
    found = matched(verdict.scene, asked)[0]
    seen = [(a.shape, REFUSED if verdict.refused else b.shape) for a, b in zip(asked.objects, found, strict=True)]
    return row | {REFUSED: bool(verdict.refused)}, seen


def confusion(seen: Sequence[Seen]) -> dict[str, dict[str, int]]:
    """How often each shape that was asked for was read as which, or refused; rows and columns in a fixed order."""
    counts = Counter(seen)
    asked, read = sorted({a for a, _ in seen}), sorted({b for _, b in seen} - {REFUSED})
    return {a: {b: counts[a, b] for b in [*read, REFUSED]} for a in asked}


def reasons(refused: Sequence[Mapping[str, str]]) -> dict[str, int]:
    """How often pictures were refused for which reason, the most frequent first; a picture may have several."""
    counts = Counter(f"{attribute}: {reason}" for each in refused for attribute, reason in each.items())
    return dict(counts.most_common())
