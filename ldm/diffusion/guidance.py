"""Guidance: one stack around a model, `model(x_t, t, cond)` in, `denoise(x_t, t)` out.

docs/equations.md G1–G3.

The steps in their order, each applied to the result of the one before; a step that is off costs
nothing:

1. interval: outside it the plain model is called alone, and steps 2 to 5 are left out;
2. classifier-free guidance (a negative prompt takes the place of the null condition), from the null
   condition and from any other ones, and autoguidance, as a sum of differences;
3. rescale;
4. the classifier's gradient, in the form that any sampler can use;
5. (its other form belongs to the sampler: ``mean_shift``);
6. dynamic thresholding, inside and outside the interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from ldm.diffusion.condition import Condition, concatenate
from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.process import from_x0, to_x0
from ldm.diffusion.schedule import Schedule, like
from ldm.diffusion.targets import per_score

Model = Callable[[Tensor, Tensor, Condition], Tensor]  # model(x_t [b, …], t [b], cond) -> prediction [b, …]
Classifier = Callable[[Tensor, Tensor], Tensor]  # classifier(x_t [b, …], t [b]) -> logits [b, classes]
Gradient = Callable[[Tensor, Tensor], Tensor]  # gradient(x_t [b, …], t [b]) -> w ∇ log p(y | x_t) [b, …]

EVERYWHERE = (0.0, math.inf)  # the interval of σ = s/a that leaves nothing out


@dataclass(frozen=True)
class Guidance:
    """A model with its guidance; ``t`` is the same for the whole batch.

    Attributes:
        model, cond, null_cond: the model, its condition and the null condition (or a negative
            prompt's).
        schedule, target: its process, and what it predicts.
        learned_variance: the model returns 2c channels; guidance changes the first half, and the
            second half is that of the evaluation with the condition.
        scale: γ of classifier-free guidance. 1 is the conditional model and 0 the unconditional
            one, each with one evaluation, from which the steps below then start.
        away: further conditions to steer away from, each with a weight: c for S adds
            c (ε(cond) − ε(S)). With S lacking one part of the condition, that part is guided alone.
            Guidance of an image by s_I and of a text on top of it by s_T, ε(∅, ∅) + s_I (ε(∅, I) −
            ε(∅, ∅)) + s_T (ε(T, I) − ε(∅, I)) (Brooks et al. 2023, eq. 3), has γ = s_I, S = (∅, I)
            and c = s_T − s_I. All are evaluated in one batch, and none whose coefficient is 0.
        rescale: φ of ``rescaled``.
        interval: (lo, hi) of σ = s/a, both included. Outside it there is no guidance: one
            evaluation, with the condition (γ = 1), or with the null condition if γ = 0.
        guide, guide_scale: autoguidance: ``guide(x_t, t)``, a weaker model under the same
            condition, and its scale.
        gradient: w ∇ log p(y | x_t), added to the score.
        threshold: p of ``thresholded``, 0 < p ≤ 1; None: none.
    """

    model: Model
    cond: Condition
    null_cond: Condition
    schedule: Schedule
    target: str
    learned_variance: bool = False
    scale: float = 1.0
    away: tuple[tuple[Condition, float], ...] = ()
    rescale: float = 0.0
    interval: tuple[float, float] = EVERYWHERE
    guide: Denoise | None = None
    guide_scale: float = 1.0
    gradient: Gradient | None = None
    threshold: float | None = None

    def __call__(self, x_t: Float[Tensor, "b *d"], t: Shaped[Tensor, " b"]) -> Float[Tensor, "b *o"]:
        """The guided prediction; 2c channels where the model has learned the reverse variance."""
        inside = guides(self.schedule, self.interval, t)
        count = len(self._terms) if inside else 1
        preds = self.model(_repeated(x_t, count), _repeated(t, count), self._batch(inside)).chunk(count)
        if self.learned_variance:
            halves = [pred.chunk(2, dim=1) for pred in preds]
            guided = self._guided([first for first, _ in halves], x_t, t, inside)
            return torch.cat([guided, halves[-1][1]], dim=1)
        return self._guided(preds, x_t, t, inside)

    @cached_property
    def _terms(self) -> list[tuple[Condition, float]]:
        """The conditions that are evaluated, the whole one last, with coefficients that sum to 1."""
        terms = [(self.null_cond, 1.0 - self.scale), *((cond, -weight) for cond, weight in self.away)]
        last = self.scale + sum(weight for _, weight in self.away)
        kept = [(cond, weight) for cond, weight in terms if weight]
        compared = bool(self.rescale) or self.guide is not None
        return [*kept, (self.cond, last)] if last or (self.away and compared) else kept

    def _batch(self, inside: bool) -> Condition:
        if inside:
            return self._all
        return self.null_cond if self.scale == 0 and not self.away else self.cond

    @cached_property
    def _all(self) -> Condition:
        return reduce(concatenate, [cond for cond, _ in self._terms])

    def _guided(self, preds: Sequence[Tensor], x_t: Tensor, t: Tensor, inside: bool) -> Tensor:
        base, cond = preds[0], preds[-1]
        pred = base
        if inside:
            for other, (_, weight) in zip(preds[1:], self._terms[1:], strict=True):
                pred = pred + weight * (other - base)
            if self.guide is not None and self.guide_scale != 1.0:
                pred = pred + (self.guide_scale - 1) * (cond - self.guide(x_t, t))
            if self.rescale and pred is not cond:
                pred = rescaled(pred, cond, self.rescale)
            if self.gradient is not None:
                pred = moved_score(self.schedule, self.target, pred, self.gradient(x_t, t), t)
        if self.threshold is not None:
            x0 = thresholded(to_x0(self.schedule, self.target, pred, x_t, t), self.threshold)
            pred = from_x0(self.schedule, self.target, x0, x_t, t)
        return pred


def _repeated(tensor: Tensor, count: int) -> Tensor:
    """The tensor as a batch of so many, one after the other."""
    return tensor if count == 1 else torch.cat([tensor] * count)


def guides(schedule: Schedule, interval: tuple[float, float], t: Shaped[Tensor, " b"]) -> bool:
    """True if σ = s/a of this step lies in the interval, ends included.

    Kynkäänniemi et al. 2024, eq. 5; G3.

    Where no signal is left σ is infinite, outside any finite interval. Raises ValueError if the
    samples of a batch differ.
    """
    if interval == EVERYWHERE:
        return True
    ratio = schedule.sigma(t) / schedule.alpha(t)
    inside = (interval[0] <= ratio) & (ratio <= interval[1])
    if bool(inside.any()) != bool(inside.all()):
        raise ValueError(
            "guidance with an interval needs one t for the whole batch: some samples lie inside it and some outside"
        )
    return bool(inside.all())


def rescaled(guided: Float[Tensor, "b *d"], cond: Float[Tensor, "b *d"], phi: float) -> Float[Tensor, "b *d"]:
    """φ · (guided, with the conditional output's deviation) + (1 − φ) · guided.

    Lin et al. 2023, eq. 15 and 16. Outputs are the network's own, whatever its target; deviations
    are over all dimensions but the batch.
    """
    dims = tuple(range(1, guided.ndim))
    return guided * (phi * cond.std(dims, keepdim=True) / guided.std(dims, keepdim=True) + 1 - phi)


def thresholded(x0: Float[Tensor, "b *d"], p: float) -> Float[Tensor, "b *d"]:
    """x̂_0 clipped to ±q and divided by q, where q ≥ 1 is the quantile p of each sample's |x̂_0|.

    Dynamic thresholding, Saharia et al. 2022, section 2.3.
    """
    q = torch.quantile(x0.abs().flatten(1), p, dim=1).clamp(min=1)
    q = like(q, x0)
    return x0.clamp(-q, q) / q


def moved_score(
    schedule: Schedule,
    target: str,
    prediction: Float[Tensor, "b *d"],
    gradient: Float[Tensor, "b *d"],
    t: Shaped[Tensor, " b"],
) -> Float[Tensor, "b *d"]:
    """The prediction whose score is larger by ``gradient`` (G2, P4).

    ε̂ − s_t ∇, x̂_0 + (s_t²/a_t) ∇, v̂ − (s_t/a_t) ∇, or score + ∇. Where a_t = 0 there is no
    signal that a classifier could see: its gradient is taken to be 0, as it should be.
    """
    a, s = schedule.alpha(t), schedule.sigma(t)
    return prediction + like(torch.where(a > 0, per_score(target, a, s), 0.0), prediction) * gradient


def classifier_gradient(classifier: Classifier, label: Int[Tensor, " b"], scale: float) -> Gradient:
    """w ∇_{x_t} log p(y | x_t) of a classifier of noisy samples, by autograd.

    Dhariwal & Nichol 2021; G2.
    """

    def gradient(x_t: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            x_t = x_t.detach().requires_grad_()
            log_p = classifier(x_t, t).log_softmax(dim=1).gather(1, label[:, None]).sum()
            return scale * torch.autograd.grad(log_p, x_t)[0]

    return gradient


def mean_shift(gradient: Gradient, schedule: Schedule, interval: tuple[float, float] = EVERYWHERE) -> Gradient:
    """The gradient for ancestral sampling, which adds it to its mean: μ + σ_t² w ∇ log p(y | x_t).

    Dhariwal & Nichol 2021, Algorithm 1; G2. It is 0 outside the interval.
    """
    return lambda x_t, t: gradient(x_t, t) if guides(schedule, interval, t) else torch.zeros_like(x_t)
