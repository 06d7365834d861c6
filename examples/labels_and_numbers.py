"""Condition on a class and a number, without text: handwritten digits, given which one and how much ink.

python examples/labels_and_numbers.py --updates 600      (seven minutes on one core)

Draws every digit with little to much ink, and prints how well the ink follows. Each condition is dropped alone from a
tenth of the samples, so that each can be guided alone: here the digit with a scale of 2 and the ink with 1.
"""

import argparse

import torch
from PIL import Image

import ldm
from ldm.config import DataConfig
from ldm.data.sources import open_source
from ldm.data.transforms import grid, prepare, to_uint8

SIDE, BATCH, INKS = 16, 64, 8


def main(updates: int, out: str) -> float:
    """Train and draw; returns the correlation of the ink that was asked for and that of the pictures."""
    source = open_source(DataConfig(source="digits", image_size=SIDE, image_channels=1), "train")
    samples = [source[i] for i in range(source.length or 0)]
    images = torch.stack([prepare(sample.image, SIDE) for sample in samples])  # [n, 1, 16, 16] in [−1, 1]
    ink = images.mean((1, 2, 3))
    rows = [{"digit": s.truth, "ink": float(level)} for s, level in zip(samples, ink, strict=True)]
    wanted = (ldm.ConditionConfig("digit", "class"), ldm.ConditionConfig("ink", "scalar"))
    conditioner = ldm.Conditioner.measured(wanted, rows)
    vectors = torch.stack([conditioner.row(row) for row in rows])  # [n, width]

    torch.manual_seed(0)
    schedule = ldm.Schedule.named("cosine")
    objective = ldm.Objective("v", schedule)
    config = ldm.UNetConfig(
        channels=(32, 64), layers_per_level=1, attention_levels=(1,), heads=(2,), groups=8, vector_dim=conditioner.width
    )
    unet = ldm.UNet(config, in_channels=1)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for update in range(updates):
        pick = torch.randint(len(images), (BATCH,))
        dropped = {one.name: torch.rand(BATCH) < one.dropout for one in wanted}
        cond = ldm.Condition(vector=conditioner.dropping(vectors[pick], dropped))
        t = torch.randint(schedule.num_steps, (BATCH,))
        loss = objective.loss(unet, images[pick], torch.randn_like(images[pick]), t, cond).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        if update % 100 == 0:
            print(f"update {update}: loss {loss.item():.3f}", flush=True)

    levels = torch.quantile(ink, torch.linspace(0.05, 0.95, INKS)).tolist()
    asked = [(digit, level) for digit in range(10) for level in levels]
    values = {"digit": [digit for digit, _ in asked], "ink": [level for _, level in asked]}
    cond, without_digit = (conditioner(given, len(asked)) for given in (values, {"ink": values["ink"]}))
    guidance = {"cond": cond, "null_cond": without_digit, "guidance_scale": 2.0}
    x = ldm.sample(unet, schedule, "v", (len(asked), 1, SIDE, SIDE), steps=15, **guidance)
    Image.fromarray(grid(to_uint8(x), columns=INKS)).resize((INKS * 48, 480), Image.Resampling.NEAREST).save(out)
    drawn = x.clamp(-1, 1).mean((1, 2, 3))
    correlation = float(torch.corrcoef(torch.stack([torch.tensor(values["ink"]), drawn]))[0, 1])
    print(f"ink asked for and drawn: correlation {correlation:.3f}; {len(asked)} samples: {out}")
    return correlation


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=600)
    parser.add_argument("--out", default="samples.png")
    arguments = parser.parse_args()
    main(arguments.updates, arguments.out)
