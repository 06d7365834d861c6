"""Watch a picture appear: the clean image that the model predicts, decoded after each step of the sampler.

python examples/sample_with_previews.py runs/demo --prompt "a small red circle on a white background"
"""

import argparse
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

import ldm
from ldm.data.transforms import grid, to_uint8


def main(run: str, prompt: str, steps: int, out: str) -> None:
    pipe = ldm.Pipeline.from_pretrained(run)
    previews: list[Tensor] = []

    def preview(step: int, x: Tensor, x0: Tensor) -> None:
        previews.append(pipe.codec.decode(x0) if pipe.codec else x0)

    settings = replace(pipe.defaults, steps=steps, seed=1)
    (image,) = pipe.sample([prompt], settings, callback=preview)
    strip = torch.cat([*previews, image])
    Image.fromarray(grid(to_uint8(strip), columns=len(strip))).save(out)
    print(f"{len(previews)} previews and the picture: {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--prompt", default="")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", default="previews.png")
    arguments = parser.parse_args()
    main(arguments.run, arguments.prompt, arguments.steps, arguments.out)
