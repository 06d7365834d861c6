"""Train all three stages of a tiny model from Python, then draw with it.

python examples/train_from_python.py --out runs/example
"""

import argparse

import ldm

TINY = ("data.size=256", "train.batch_size=8", "train.validation_size=16", "train.trackers=[]")


def main(out: str, updates: int) -> None:
    every = ("steps", "validate_every", "sample_every", "checkpoint_every", "log_every")
    short = [*TINY, *(f"train.{name}={updates}" for name in every)]
    parts = [f"autoencoder={out}/autoencoder", f"text={out}/text"]
    ldm.train("configs/demo/autoencoder.yaml", f"run={out}/autoencoder", *short)
    ldm.train("configs/demo/clip.yaml", f"run={out}/text", *short)
    ldm.train("configs/demo/ldm.yaml", f"run={out}", *parts, *short)

    pipe = ldm.Pipeline.from_pretrained(out)
    for i, image in enumerate(pipe(["a small red circle on a white background"] * 2, steps=5, seed=0)):
        image.save(f"{out}/image-{i}.png")
        print(f"{out}/image-{i}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/example")
    parser.add_argument("--updates", type=int, default=20)
    arguments = parser.parse_args()
    main(arguments.out, arguments.updates)
