"""How fast photographs become cached latents, compared with two bare loops, decoding and encoding, that run side by side.

    python -m benchmarks.latent_caching [--images 96] [--threads 2] [--rounds 5] [--profile]

One bare loop decodes and resizes with Pillow in a thread pool, the other encodes prepared pixels with the VAE. They run at the same time,
as in caching, and the slower one is the limit for caching. Our code also reads, hashes, checks, seals and indexes. The VAE has SDXL's
architecture and random weights, and is so narrow that both loops are about equally slow on one core each.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from benchmarks.material import write_photographs
from benchmarks.measure import Figure, compared, conclude, in_turns, parser, profile
from helpers.config.datasets import DatasetConfig
from helpers.data.base.sample import Geometry
from helpers.data.cache.cache import Cache
from helpers.data.catalogue.captions import CaptionRule
from helpers.data.catalogue.catalogue import Catalogue
from helpers.data.catalogue.scan import DatasetRules, scan
from helpers.data.encode.codec import SharedCodec
from helpers.data.encode.common import EncodeOptions, available_threads
from helpers.data.encode.pipeline import RecordWriter, encode_units
from helpers.data.encode.store import EVERY_EPOCH, EpochLatents
from helpers.data.plan.buckets import BucketPlan, DatasetColumns, plan
from helpers.data.plan.targets import ResolutionRule
from helpers.data.planned import PlannedData
from helpers.data.settings import DataSettings
from helpers.families.loading.vae import VaeCodec
from helpers.storage.local import LocalSource

LEAST_OF_BARE = 0.85  # rate of caching, relative to the bare loops
BATCH = 4
PHOTOGRAPHS = (1500, 1000)  # just below the size at which our code starts to decode JPEGs at half size, which the bare loop does not do
RULE = ResolutionRule(resolution=256, resolution_type="pixel", alignment=64)


def make_vae() -> Any:
    torch.manual_seed(0)
    blocks = ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4
    return AutoencoderKL(3, 3, *blocks, block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=4).eval()


def resized_by_hand(path: Path, geometry: Geometry) -> Tensor:
    """(3, H, W) in [-1, 1], with Pillow alone."""
    image = Image.open(path).convert("RGB").resize(geometry.resized, Image.Resampling.LANCZOS)
    left, top, (width, height) = geometry.left, geometry.top, geometry.target
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), dtype=np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1).contiguous()


class Bench:
    """Scanned and planned images, and the two ways to turn them into latents."""

    def __init__(self, folder: Path, images: int, threads: int) -> None:
        self.folder, self.threads = folder, threads
        self.images = write_photographs(folder / "images", images, PHOTOGRAPHS)
        self.source = LocalSource(self.images)
        self.catalogue = Catalogue(folder / "catalogue.sqlite")
        scan(self.source, DatasetRules("photographs", RULE, CaptionRule()), self.catalogue)
        columns = self.catalogue.columns("photographs")
        self.planned: BucketPlan = plan([DatasetColumns("photographs", RULE, columns.rows, columns.width, columns.height)])
        self.vae = make_vae()
        sources = {"photographs": self.source}
        self.data = PlannedData([DatasetConfig(id="photographs")], sources, [()], self.catalogue, self.planned, seed=0)
        cpu = torch.device("cpu")
        self.settings = DataSettings(folder, folder, folder, cpu, seed=0, batch_size=1, vae_batch_size=BATCH)
        self.codec = SharedCodec(self, cpu)  # type: ignore[arg-type]  # asks for nothing but `image_codec`
        self.held = self.codec.held()
        self.held.__enter__()  # the codec stays loaded

    @contextmanager
    def image_codec(self, device: torch.device) -> Iterator[VaeCodec]:
        yield VaeCodec(lambda: self.vae, dict(self.vae.config), "benchmark", device, deviations=False)

    def bare(self) -> float:
        """Images per second of the slower of the two loops, running side by side."""
        began = time.perf_counter()
        decoding = threading.Thread(target=self._decode)
        decoding.start()
        self._encode()
        decoding.join()
        return len(self.planned) / (time.perf_counter() - began)

    def _decode(self) -> None:
        geometries = [self.planned.geometry(index) for index in range(len(self.planned))]
        with ThreadPoolExecutor(self.threads) as pool:
            for _ in pool.map(resized_by_hand, sorted(self.images.glob("*.jpg")), geometries):
                pass

    @torch.no_grad()
    def _encode(self) -> None:
        shape = self.planned.shapes[0]
        pixels = torch.randn(BATCH, 3, shape.height, shape.width)
        for _ in range(0, len(self.planned), BATCH):
            self.vae.encode(pixels).latent_dist.mean.half()

    def ours(self) -> float:
        """Images per second into an empty cache."""
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            cache = Cache(Path(place))
            began = time.perf_counter()
            latents = EpochLatents(EVERY_EPOCH, self.data, self.planned, {0: cache}, self.codec, self.settings)
            options = EncodeOptions(BATCH, threads=self.threads)
            totals = encode_units(latents.units, self.codec, RecordWriter(self.catalogue, options), options)
            rate = totals.encoded / (time.perf_counter() - began)
            cache.close()
        return rate


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=96)
    options.add_argument("--threads", type=int, default=available_threads(), help="decoding threads, in both loops")
    chosen = options.parse_args(arguments)
    torch.set_num_threads(1)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(Path(place), chosen.images, chosen.threads)
        bench.bare()  # warm-up: loads the files into the page cache
        figures.append(compared("images cached", "/s", in_turns(chosen.rounds, bench.bare, bench.ours), at_least=LEAST_OF_BARE))
        if chosen.profile:
            profile("the two loops side by side (the VAE's thread)", bench.bare)
            profile("caching (the VAE's thread)", bench.ours)
        bench.catalogue.close()
    return conclude(figures, chosen.rounds)


if __name__ == "__main__":
    sys.exit(main())
