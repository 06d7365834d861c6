"""How far training on two processes is from training on one, and after a change of their number in the middle of a run.

    OMP_NUM_THREADS=1 PYTHONPATH=.:tests python benchmarks/elastic.py

The tiny stages of tests/training/test_ranks.py, on the CPU: 4 updates by one process, then 50 more. By one process as one batch of 8, with
which the rest is compared; by one with accumulation; by two; and with the number of processes changed after 25. Gradients: the largest
deviation over the largest gradient of the same network, in the first update (equal weights) and in that after the first 25 (weights
that far apart). Losses: the largest deviation of a logged loss or validation figure, and the same over the largest value of that
figure (the mean logits of the adversary are near 0). Weights: the largest deviation of a parameter at the end, over the largest
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
    """The largest deviation of a logged figure, and the largest over the largest value of that figure."""
    found, expected = losses(place / "run", after), losses(straight / "run", after)
    largest = {k: max(abs(line.get(k, 0.0)) for line in expected) for line in expected for k in line}
    apart = [(abs(a[k] - b[k]), largest[k] or 1.0) for a, b in zip(found, expected, strict=True) for k in b]
    return max(size for size, _ in apart), max(size / scale for size, scale in apart)


def weight_deviation(place: Path, straight: Path) -> float:
    """The largest deviation of a parameter over the largest parameter, in any network."""
    last = f"run/checkpoints/step-{BASE + UPDATES:08d}"
    shares = []
    for file in (straight / last).glob("model_*.safetensors"):
        expected, found = load_file(file), load_file(place / last / file.name)
        largest = max(float(t.abs().max()) for t in expected.values())
        shares.append(max(float((found[k] - t).abs().max()) for k, t in expected.items()) / largest)
    return max(shares)


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        configured(folder)
        trained(folder)
        print(
            "| stage | processes × batch | gradients, first update | 25 updates later | losses | over the largest | weights at the end |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for name in TREES:
            for variant, text in VARIANTS.items():
                if variant in ("1x2", "2x2") and name not in ACCUMULATED:
                    continue
                place, straight = folder / variant / name, folder / "1x8" / name
                after = MIDDLE if "to" in variant else BASE
                first = f"{largest_share(place, straight, BASE):.1e}" if after == BASE else "–"
                later = f"{largest_share(place, straight, MIDDLE):.1e}"
                absolute, relative = loss_deviation(place, straight, after)
                figures = f"{absolute:.1e} | {relative:.1e} | {weight_deviation(place, straight):.1e}"
                print(f"| {name} | {text} | {first} | {later} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
