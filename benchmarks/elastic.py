"""Deviation of training on two processes from training on one, also with the number changed within a run.

    OMP_NUM_THREADS=1 PYTHONPATH=.:tests:tests/training python benchmarks/elastic.py

The tiny stages of tests/training/test_ranks.py on the CPU: 4 updates by one process, then 50 more, by one
process as one batch of 8 (the reference), by one with accumulation, by two, and with the number of
processes changed after 25.

Gradients: largest deviation over the largest gradient of the same network, in the first update (equal
weights) and in the one after 25 (weights that have drifted apart). Losses: largest deviation of a logged
loss or validation metric, absolute and over the largest value of that metric (the mean logits of the
discriminator are near 0). Weights: largest deviation of a parameter at the end, over the largest
parameter of the same network.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from safetensors.torch import load_file
from test_ranks import ACCUMULATED, BASE, MIDDLE, TREES, UPDATES, configured, largest_share, losses, trained

VARIANTS = {
    "1x2": "1 × 2 × 4 accumulation",
    "2x4": "2 × 4",
    "2x2": "2 × 2 × 2 accumulation",
    "2to1": "2 × 4, then 1 × 8",
    "1to2": "1 × 8, then 2 × 4",
}


def loss_deviation(place: Path, straight: Path, after: int) -> tuple[float, float]:
    """Largest deviation of a logged metric, absolute and over the largest value of that metric."""
    found, expected = losses(place / "run", after), losses(straight / "run", after)
    largest = {k: max(abs(line.get(k, 0.0)) for line in expected) for line in expected for k in line}
    apart = [(abs(a[k] - b[k]), largest[k] or 1.0) for a, b in zip(found, expected, strict=True) for k in b]
    return max(size for size, _ in apart), max(size / scale for size, scale in apart)


def weight_deviation(place: Path, straight: Path) -> float:
    """Largest deviation of a parameter over the largest parameter of its network."""
    last = f"run/checkpoints/step-{BASE + UPDATES:08d}"
    shares = []
    for file in (straight / last).glob("model_*.safetensors"):
        expected, found = load_file(file), load_file(place / last / file.name)
        largest = max(float(t.abs().max()) for t in expected.values())
        shares.append(max(float((found[k] - t).abs().max()) for k, t in expected.items()) / largest)
    return max(shares)


def main() -> None:
    """Train all variants and print a table."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        configured(folder)
        trained(folder)
        columns = ["stage", "processes × batch", "gradients, first update", "25 updates later"]
        columns += ["losses", "over the largest", "weights at the end"]
        print(f"| {' | '.join(columns)} |")
        print(f"| {' | '.join(['---'] * len(columns))} |")
        for name in TREES:
            for variant, text in VARIANTS.items():
                if variant in ("1x2", "2x2") and name not in ACCUMULATED:
                    continue
                place, straight = folder / variant / name, folder / "1x8" / name
                after = MIDDLE if "to" in variant else BASE
                first = f"{largest_share(place, straight, BASE):.1e}" if after == BASE else "–"
                later = f"{largest_share(place, straight, MIDDLE):.1e}"
                absolute, relative = loss_deviation(place, straight, after)
                weights = weight_deviation(place, straight)
                results = f"{absolute:.1e} | {relative:.1e} | {weights:.1e}"
                print(f"| {name} | {text} | {first} | {later} | {results} |", flush=True)


if __name__ == "__main__":
    main()
