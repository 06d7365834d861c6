"""The figure by which the models of a stage are compared while it trains. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """The metric of a stage's validation that says which of its models is best.

    Its standard error, where it has one, is the metric ``name`` + `_error`.
    """

    name: str
    higher: bool = False  # a higher value is better

    def gap(self, value: float, best: float) -> float:
        """By how much ``value`` is worse than ``best``; negative: better."""
        return best - value if self.higher else value - best
