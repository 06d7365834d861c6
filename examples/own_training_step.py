"""Write your own training loop: drawn shapes, a small U-Net in pixel space, plain PyTorch.

python examples/own_training_step.py --updates 200
"""

import argparse

import torch
from PIL import Image

import ldm
from ldm.config import DataConfig
from ldm.data.sources import open_source
from ldm.data.transforms import grid, prepare, to_uint8


def main(updates: int, out: str) -> float:
    source = open_source(DataConfig(source="shapes", image_size=24, size=512), "train")
    images = torch.stack([prepare(source[i].image, 24) for i in range(512)])  # [n, 3, 24, 24] in [−1, 1]

    torch.manual_seed(0)
    schedule = ldm.Schedule.named("cosine")
    objective = ldm.Objective("v", schedule)
    config = ldm.UNetConfig(channels=(32, 64), layers_per_level=1, attention_levels=(1,), heads=(2,), groups=8)
    unet = ldm.UNet(config, in_channels=3)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)

    loss = torch.tensor(torch.nan)
    for update in range(updates):
        x0 = images[torch.randint(len(images), (16,))]
        eps = torch.randn_like(x0)
        t = torch.randint(schedule.num_steps, (len(x0),))
        loss = objective.loss(unet, x0, eps, t).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if update % 50 == 0:
            print(f"update {update}: loss {loss.item():.3f}")

    x = ldm.sample(unet, schedule, "v", shape=(8, 3, 24, 24), sampler="dpmpp_2m", steps=10, seed=0)
    Image.fromarray(grid(to_uint8(x), columns=8)).resize((8 * 64, 64), Image.Resampling.NEAREST).save(out)
    print(f"8 samples: {out}")
    return loss.item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--out", default="samples.png")
    arguments = parser.parse_args()
    main(arguments.updates, arguments.out)
