"""Variance of the variational bound's estimator at one uniform t, for learned and fixed noise schedules.

    python benchmarks/schedule_variance.py runs/cosine runs/learned

A draw is D = T · ½(SNR_{t−1} − SNR_t) · mean‖x_0 − x̂_0‖², 0 at t = 0, in nats per dimension of the latent
(or image), over validation images, fixed noise and evenly spread t, with EMA weights. The last line of a
run evaluates its network on another table: the cosine schedule between the same two ends, at the
fractional t of the same γ.
"""

from __future__ import annotations

import argparse
import dataclasses

import torch
from torch import Tensor

from ldm.config import DiffusionTrainingConfig, ScheduleConfig, load_run
from ldm.data.dataset import RandomFields, Stream, validation_batches
from ldm.data.sources import open_source
from ldm.diffusion.learned_schedule import LearnedSchedule, decoder, prior
from ldm.diffusion.schedule import Schedule
from ldm.pipeline import Pipeline

GOLDEN = (5**0.5 - 1) / 2


@torch.no_grad()
def draws(pipe: Pipeline, run: DiffusionTrainingConfig, table: Schedule, repeats: int) -> tuple[Tensor, Tensor]:
    """D, and the other two terms of the bound, for each validation image and repeat, float64."""
    factor, channels = pipe.factor, pipe.unet.in_channels
    side = run.data.image_size // factor
    source = open_source(run.data, "validation")
    total = source.length or run.train.validation_size
    gamma, steps = -2 * table.half_log_snr_table, table.num_steps
    found: list[Tensor] = []
    rest: list[Tensor] = []
    for repeat in range(repeats):
        names = {f"eps {repeat}": (channels, side, side), "posterior": (channels, side, side)}
        stream = Stream(source, run.data, 0, RandomFields(names), validation=True)
        for positions, batch in validation_batches(stream, total, 64, 0, 1):
            x0, eps = batch["image"].to(pipe.device), batch[f"eps {repeat}"].to(pipe.device)
            if pipe.codec is not None:
                x0 = pipe.codec.latent(pipe.codec.autoencoder.encode(x0), batch["posterior"].to(pipe.device))
            # multiples of the golden section: even over t, whatever the image
            shares = [(p * repeats + repeat) * GOLDEN % 1 for p in positions]
            t = (torch.tensor(shares, dtype=torch.float64) * steps).long()
            denoiser = pipe.denoiser(batch["text"], dataclasses.replace(run.sample, guidance_scale=1.0))
            pred = denoiser(table.add_noise(x0, eps, t), pipe.schedule.time(-gamma[t] / 2))
            error = (pred.eps.double() - eps.double()).square().flatten(1).mean(1)
            rise = gamma[t] - gamma[(t - 1).clamp(min=0)]
            found.append(steps / 2 * torch.expm1(rise) * error)
            rest.append(prior(gamma[-1], x0) + decoder(gamma[0], x0, eps, pipe.codec is None))
    return torch.cat(found), torch.cat(rest)


def line(name: str, table: Schedule, d: Tensor, rest: Tensor) -> str:
    """One line of results for a table."""
    mean, variance = d.mean(), d.var()
    of_mean, of_variance = (variance / len(d)).sqrt(), (((d - mean) ** 4).mean() - variance**2).sqrt() / len(d) ** 0.5
    first, last = (-2 * table.half_log_snr_table[[0, -1]]).tolist()
    return (
        f"{name}: γ {first:.2f} to {last:.2f}, variance {variance:.2f} ± {of_variance:.2f},"
        f" denoising {mean:.3f} ± {of_mean:.3f}, bound {mean + rest.mean():.3f} nats per dimension"
    )


def main() -> None:
    """Print two lines for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--repeats", type=int, default=20, help="draws of noise and t for each validation image")
    arguments = parser.parse_args()
    for path in arguments.runs:
        run, pipe = load_run(path), Pipeline.from_pretrained(path)
        if not isinstance(run, DiffusionTrainingConfig):
            raise SystemExit(f"{path} is not a run of train-ldm")
        first, last = (-2 * pipe.schedule.half_log_snr_table[[0, -1]]).tolist()
        ends = (max(first, -19.0), min(last, 19.0))
        cut = LearnedSchedule(ScheduleConfig("learned", pipe.schedule.num_steps, ends=ends)).schedule()
        for name, table in ((path, pipe.schedule), ("  cosine between these ends, same network", cut)):
            print(line(name, table, *draws(pipe, run, table, arguments.repeats)), flush=True)


if __name__ == "__main__":
    main()
