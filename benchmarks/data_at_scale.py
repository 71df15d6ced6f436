"""How the costs of the data grow with the number of images: memory of the index, a warm start, the state in a checkpoint.

    python -m benchmarks.data_at_scale [--images 10000] [--images 1000000]

The images are synthetic: the source draws each image when it is opened, so a million need no disk. Everything above the source, from the
scan to the batch, is the code that training uses. Each start is a process of its own, without the time for imports. `--rounds` counts warm
starts; the cold start, which encodes everything, is done once. The limit for a start that lists the dataset is the listing alone. "Memory
of the index" is what a start needs beyond a start with a hundred images, whose memory (late-loaded libraries, buffers) is printed first.
"""

from __future__ import annotations

import dataclasses
import io
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from benchmarks.measure import Figure, conclude, parser
from helpers.storage.backend import Entry

ROOT = Path(__file__).resolve().parent.parent
SIDES = (24, 32, 40, 48)  # sizes of the synthetic images, in pixels
CAPTIONS = 1000  # different captions; the index is measured, not the text
FEW = 100  # so few images that their index needs almost no memory


class MadeUpSource:
    """`count` different images of plain colors in a dozen sizes, each with a caption; drawn when they are opened."""

    name = "made up"

    def __init__(self, count: int) -> None:
        self.count = count

    def list(self) -> Iterator[Entry]:
        for number in range(self.count):
            yield Entry(f"{number // 1000:05}/picture_{number:09}.bmp", 1, 1)
            yield Entry(f"{number // 1000:05}/picture_{number:09}.txt", 1, 1)

    def open(self, key: str) -> BinaryIO:
        return io.BytesIO(self.read(key))

    def read(self, key: str) -> bytes:
        number = int(key[-13:-4])
        if key.endswith(".txt"):
            return b"caption number %d" % (number % CAPTIONS)
        width, height = SIDES[number % 4], SIDES[number // 4 % 3]
        return bitmap(width, height, number)


def bitmap(width: int, height: int, color: int) -> bytes:
    """A BMP of one color (24 bits): a header and rows, cheaper than any encoder."""
    row = color.to_bytes(4, "little")[:3] * width
    row += bytes(-len(row) % 4)
    size = 54 + len(row) * height
    header = b"BM" + size.to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little")
    header += (40).to_bytes(4, "little") + width.to_bytes(4, "little") + height.to_bytes(4, "little")
    header += (1).to_bytes(2, "little") + (24).to_bytes(2, "little") + bytes(24)
    return header + row * height


class PlainCodec:
    """The cheapest possible image codec: the mean of each 8 x 8 pixels."""

    fingerprint = "mean of 8x8"

    def encode(self, pixels: Any) -> dict[str, Any]:
        import torch

        means = torch.nn.functional.avg_pool2d(pixels, 8)
        return {"mean": torch.cat([means, means[:, :1]], dim=1)}


class PlainEncoders:
    """The cheapest possible text encoders."""

    fingerprint = "length"
    truncated = 0
    limit = 77

    def token_counts(self, captions: Sequence[str]) -> list[int]:
        return [len(caption) for caption in captions]

    def encode(self, captions: Sequence[str]) -> dict[str, Any]:
        import torch

        return {"states": torch.tensor([[float(len(caption)) / 100] * 8 for caption in captions])}


class PlainFamily:
    """The part of a model family that data needs."""

    @contextmanager
    def image_codec(self, device: Any) -> Iterator[PlainCodec]:
        yield PlainCodec()

    @contextmanager
    def text_encoders(self, device: Any) -> Iterator[PlainEncoders]:
        yield PlainEncoders()

    def caption_lengths(self) -> PlainEncoders:
        return PlainEncoders()

    def unconditional(self, encoders: Any) -> dict[str, Any]:
        import torch

        return {"states": torch.zeros(8)}


def resident() -> int:
    """Resident bytes of this process, without pages of mapped files."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def start(folder: Path, images: int, trust: bool) -> dict[str, float]:
    """One start in this process, from the listing to the first batch; imports are done before."""
    import gc

    import torch

    from helpers.config.datasets import DatasetConfig
    from helpers.data import prepare, scanning
    from helpers.data.base.workers import Workers
    from helpers.reporting.html_report import HtmlReport

    source: Any = MadeUpSource(images)
    scanning.open_source = lambda dataset: source  # a dataloader file cannot name this source
    dataset = DatasetConfig(
        id="made_up",
        instance_data_dir=folder,
        cache_dir_vae=folder / "cache" / "latents",
        text_cache_dir=folder / "cache" / "text",
        resolution=32,
        resolution_type="pixel",
        aspect_bucket_alignment=8,
        caption_strategy="textfile",
        minimum_image_size=None,
        instance_prompt=None,
        prepend_instance_prompt=False,
        only_instance_prompt=False,
        preserve_data_backend_cache=trust,
        skip_file_discovery="",
    )
    settings = prepare.DataSettings(
        folder, folder / "cache", folder / "cache" / "text", torch.device("cpu"), seed=1, batch_size=8, vae_batch_size=64
    )
    gc.freeze()
    before, began = resident(), time.perf_counter()
    family: Any = PlainFamily()
    data = prepare.prepare_data([dataset], settings, family, Workers(), HtmlReport(folder))
    steps = data.steps(0, 10**6)
    next(steps)
    seconds = time.perf_counter() - began
    index = resident() - before
    steps.close()
    kept = json.dumps({"data": data.fingerprint(), "undecodable": data.undecodable, "order": dataclasses.asdict(settings.order)})
    return {"seconds": seconds, "index": index, "state": len(kept), "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def started(folder: Path, images: int, trust: bool = False) -> dict[str, float]:
    """A start in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.data_at_scale", "--start", str(folder), "--images", str(images), *["--trust"] * trust]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return json.loads(done.stdout.splitlines()[-1])


def middle(starts: Sequence[dict[str, float]], name: str) -> float:
    return statistics.median(start[name] for start in starts)


def bare_start(folder: Path, rounds: int) -> float:
    """The bytes that a warm start needs for any number of images."""
    started(folder, FEW)
    return middle([started(folder, FEW, trust=True) for _ in range(rounds)], "index")


def bare_listing(images: int) -> float:
    """Seconds to only list the source."""
    began = time.perf_counter()
    for _ in MadeUpSource(images).list():
        pass
    return time.perf_counter() - began


def grown(folder: Path, images: int, rounds: int, bare: float) -> list[Figure]:
    """The costs of `images` images. Memory is counted beyond `bare`, the bytes of any start."""
    cold = started(folder, images)
    warm = [started(folder, images) for _ in range(rounds)]
    trusting = [started(folder, images, trust=True) for _ in range(rounds)]
    files = sum(1 for path in (folder / "cache").rglob("*") if path.is_file())
    most_seconds, most_memory = (0.5, 5.0) if images <= 10_000 else (2.0, 80.0)
    listing = statistics.median(bare_listing(images) for _ in range(rounds))
    return [
        Figure(f"{images:,} images: encoded, per image", cold["seconds"] / images * 1e6, "us"),
        Figure("  memory while encoding", (cold["index"] - bare) / 1e6, "MB"),
        Figure("  a warm start to the first batch", middle(warm, "seconds"), "s", listing),
        Figure("  without a listing", middle(trusting, "seconds"), "s", at_most=most_seconds),
        Figure("  memory of the index", (middle(trusting, "index") - bare) / 1e6, "MB", at_most=most_memory),
        Figure("  data state in a checkpoint", middle(trusting, "state"), "bytes", at_most=1_000),
        Figure("  files in the cache", files, "", at_most=20 if images <= 10_000 else 2_500),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--images", type=int, action="append", help="number of synthetic images (default 10000 and 1000000)")
    options.add_argument("--start", type=Path, help="measure one start with the cache in this folder, and print it as JSON")
    options.add_argument("--trust", action="store_true", help="with --start: do not list the dataset again")
    chosen = options.parse_args(arguments)
    if chosen.start:
        print(json.dumps(start(chosen.start, chosen.images[0], chosen.trust)))
        return 0
    with tempfile.TemporaryDirectory() as place:
        bare = bare_start(Path(place), chosen.rounds)
    figures = [Figure("memory of a start with a hundred images", bare / 1e6, "MB")]
    for images in chosen.images or (10_000, 1_000_000):
        with tempfile.TemporaryDirectory() as place:
            figures += grown(Path(place), images, chosen.rounds, bare)
    return conclude(figures, chosen.rounds)


if __name__ == "__main__":
    sys.exit(main())
