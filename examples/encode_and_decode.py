"""Encode images to latents and decode them again, with the autoencoder of a run or of any diffusers folder.

python examples/encode_and_decode.py runs/demo photo.jpg
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

import ldm
from autoencoder.metrics import psnr
from ldm.data.decode import read_image
from ldm.data.transforms import grid, prepare, to_uint8


@torch.no_grad()
def main(run: str, file: str, size: int, out: str) -> float:
    codec = ldm.load_autoencoder(run)
    image = prepare(read_image(Path(file), channels=3), size)[None]  # [1, 3, size, size] in [−1, 1]
    posterior = codec.autoencoder.encode(image)
    latent = (posterior.mean - codec.shift) * codec.scale  # what the diffusion model sees: unit variance
    decoded = codec.decode(latent)
    quality = psnr(decoded, image).item()
    print(f"latent {list(latent.shape[1:])}, standard deviation {latent.std():.2f}; PSNR {quality:.1f} dB: {out}")
    Image.fromarray(grid(to_uint8(torch.cat([image, decoded])), columns=2)).save(out)
    return quality


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("file")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--out", default="reconstruction.png")
    arguments = parser.parse_args()
    main(arguments.run, arguments.file, arguments.size, arguments.out)
