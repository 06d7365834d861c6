"""What a person sees while a command works: a progress bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from typing import Any

SHOWN = ("loss", "l1", "validation/loss", "validation/psnr", "validation/retrieval_top1", "updates_per_second")


def rank() -> int:
    """This process's number among those that the launcher started; the main one is 0."""
    return int(os.environ.get("RANK", "0"))


class Console:
    """Messages and progress of the main process; other processes are silent."""

    def __init__(self) -> None:
        self.silent = rank() != 0
        self._bar: Any = None
        self._begun: tuple[float, int] | None = None

    def say(self, text: str) -> None:
        """One line."""
        if self.silent:
            return
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def progress(self, step: int, steps: int, values: Mapping[str, Any]) -> None:
        """Step ``step`` of ``steps`` is done; ``values`` are figures to show beside it."""
        if self.silent:
            return
        shown = {k.replace("/", " "): f"{values[k]:.3g}" for k in SHOWN if isinstance(values.get(k), (int, float))}
        if sys.stderr.isatty():
            self._on_bar(step, steps, shown)
            return
        if self._begun is None:
            self._begun = time.monotonic(), step
        passed, done = time.monotonic() - self._begun[0], step - self._begun[1]
        figures = "  ".join(f"{k} {v}" for k, v in shown.items())
        left = f"{passed / done * (steps - step):.0f} s left" if done and step < steps else ""
        print(f"{step}/{steps}  {', '.join(part for part in (figures, left) if part)}".rstrip(), flush=True)
        if step >= steps:
            self._begun = None

    def _on_bar(self, step: int, steps: int, shown: Mapping[str, str]) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=step, dynamic_ncols=True)
        self._bar.set_postfix(shown)
        self._bar.update(step - self._bar.n)
        if step >= steps:
            self._bar.close()
            self._bar = None
