"""How fast images become cached latents, beside the two bare loops it is made of running side by side.

    python benchmarks/caching.py [--images 96] [--rounds 5] [--threads 2]

One bare loop decodes and resizes with Pillow in a pool of threads, the other encodes ready pixels with the VAE; both run at the same
time, as they must in caching, and the slower of the two is what caching could reach. Ours also reads, hashes, checks and writes.
The VAE is a random miniature of the real architecture. Run with OMP_NUM_THREADS=1. Exits 1 below the limit.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from helpers.data.buckets import BucketPlan, DatasetColumns, ResolutionRule, plan
from helpers.data.cache import LOCATION, Cache
from helpers.data.captions import CaptionRule
from helpers.data.catalogue import Catalogue
from helpers.data.fill import FillOptions, available_threads
from helpers.data.images import cut, decode
from helpers.data.latents import LatentFiller
from helpers.data.scan import DatasetRules, scan
from helpers.storage.local import LocalSource

LEAST_SHARE = 0.85
BATCH = 4
RULE = ResolutionRule(resolution=256, resolution_type="pixel", alignment=64)


class Codec:
    """A VAE of SDXL's architecture, narrow enough for a processor."""

    fingerprint = "benchmark"

    def __init__(self) -> None:
        torch.manual_seed(0)
        blocks = ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4
        self.vae = AutoencoderKL(3, 3, *blocks, block_out_channels=(16, 32, 32, 32), layers_per_block=1, norm_num_groups=8).eval()

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        return {"mean": self.vae.encode(pixels).latent_dist.mean}

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents).sample


def make_images(folder: Path, count: int) -> None:
    """Photograph-like JPEGs: soft shapes with some grain."""
    for number in range(count):
        random = np.random.default_rng(number)
        soft = Image.fromarray(random.integers(0, 256, (30, 45, 3), dtype=np.uint8)).resize((720, 480), Image.Resampling.BICUBIC)
        grain = random.normal(0, 6, (480, 720, 3))
        Image.fromarray((np.asarray(soft) + grain).clip(0, 255).astype(np.uint8)).save(folder / f"image_{number:05}.jpg", quality=90)


def bare(folder: Path, planned: BucketPlan, codec: Codec, threads: int) -> float:
    """Images a second of the slower of the two loops, side by side."""
    paths = sorted(folder.iterdir())
    ready = torch.randn(BATCH, 3, planned.shapes[0].height, planned.shapes[0].width)
    took = {}

    def decoding() -> None:
        started = time.perf_counter()
        geometries = [planned.geometry(index) for index in range(len(planned))]
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda path, geometry: cut(decode(path.read_bytes()), geometry), paths, geometries))
        took["decoding"] = time.perf_counter() - started

    def encoding() -> None:
        started = time.perf_counter()
        for _ in range(0, len(paths), BATCH):
            codec.encode(ready)
        took["encoding"] = time.perf_counter() - started

    loops = [threading.Thread(target=decoding), threading.Thread(target=encoding)]
    for loop in loops:
        loop.start()
    for loop in loops:
        loop.join()
    return len(paths) / max(took.values())


def ours(folder: Path, planned: BucketPlan, catalogue: Catalogue, codec: Codec, threads: int) -> float:
    """Images a second into an empty cache."""
    with tempfile.TemporaryDirectory() as place:
        cache = Cache(Path(place))
        started = time.perf_counter()
        filler = LatentFiller(planned, 0, LocalSource(folder), catalogue, cache, codec)
        options = FillOptions(batch_size=BATCH, threads=threads)
        filled = filler.encode(filler.pending(np.zeros(len(planned), LOCATION), options), options)
        rate = filled.encoded / (time.perf_counter() - started)
        cache.close()
    return rate


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--images", type=int, default=96)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--threads", type=int, default=available_threads())
    chosen = options.parse_args()
    codec = Codec()
    with tempfile.TemporaryDirectory() as place, Catalogue(Path(place) / "catalogue.sqlite") as catalogue:
        folder = Path(place) / "images"
        folder.mkdir()
        make_images(folder, chosen.images)
        scan(LocalSource(folder), DatasetRules("benchmark", RULE, CaptionRule()), catalogue)
        columns = catalogue.columns("benchmark")
        planned = plan([DatasetColumns("benchmark", RULE, columns.rows, columns.width, columns.height)])
        rounds = [
            (bare(folder, planned, codec, chosen.threads), ours(folder, planned, catalogue, codec, chosen.threads))
            for _ in range(chosen.rounds)
        ]
    loops, cached = (statistics.median(rates) for rates in zip(*rounds, strict=True))
    share = statistics.median(mine / theirs for theirs, mine in rounds)
    kept = share >= LEAST_SHARE
    print(f"two bare loops side by side  {loops:>7.1f} images/s, {chosen.threads} threads decode")
    print(f"cached                       {cached:>7.1f} images/s, the same threads")
    print(f"share                        {share:>7.2f}, at least {LEAST_SHARE}: {'kept' if kept else 'MISSED'}; medians of {chosen.rounds}")
    sys.exit(not kept)


if __name__ == "__main__":
    main()
