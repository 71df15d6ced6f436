"""Small real things for the tests of data: pictures on disk, a codec and text encoders that compute, a family that holds them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from helpers.config.datasets import DatasetConfig
from helpers.data.ports import CaptionLengths, ImageCodec, LatentSpec, TextEncoders, TextTensors
from helpers.data.settings import DataSettings
from helpers.protocols import Reporter


class ConvCodec:
    """An eightfold downsampling convolution. Like a real VAE's, its answer for an image depends a little on its batch-mates."""

    def __init__(self, seed: int = 0, deviations: bool = False) -> None:
        torch.manual_seed(seed)
        self.net = nn.Conv2d(3, 4, 8, stride=8).requires_grad_(False)
        self.fingerprint = f"conv {seed} {deviations}"
        self.deviations = deviations
        self.batches: list[int] = []  # sizes of what was encoded

    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        self.batches.append(len(pixels))
        mean = self.net(pixels) + 1e-2 * pixels.mean()
        return {"mean": mean, "std": torch.full_like(mean, 0.5)} if self.deviations else {"mean": mean}

    def decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError("the tests of data never decode")


class HashEncoders:
    """Text tensors that are a function of the caption."""

    def __init__(self, version: int = 0) -> None:
        self.fingerprint = f"hash {version}"
        self.version = version
        self.encoded: list[str] = []
        self.truncated = 0

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        self.encoded += captions
        digests = [hashlib.sha256(f"{self.version} {caption}".encode()).digest() for caption in captions]
        values = torch.tensor([list(digest) for digest in digests], dtype=torch.float32) / 255
        return {"states": values.reshape(len(captions), 4, 8), "pooled": values[:, :8]}


class WordLengths:
    """Counts words."""

    fingerprint = "words"
    limit = 8

    def token_counts(self, captions: Sequence[str]) -> list[int]:
        return [len(caption.split()) for caption in captions]


class ToyFamily:
    """As much of a `ModelFamily` as data needs. `opened` tells which encoders were asked for."""

    def __init__(self, codec: ConvCodec | None = None, encoders: HashEncoders | None = None) -> None:
        self.codec = codec or ConvCodec()
        self.encoders = encoders or HashEncoders()

    latents = LatentSpec(channels=4, downsampling=8)

    @contextmanager
    def image_codec(self, device: torch.device) -> Iterator[ImageCodec]:
        yield self.codec

    @contextmanager
    def text_encoders(self, device: torch.device) -> Iterator[TextEncoders]:
        yield self.encoders

    def caption_lengths(self) -> CaptionLengths:
        return WordLengths()

    def unconditional(self, encoders: TextEncoders) -> TextTensors:
        return {"states": torch.zeros(4, 8), "pooled": torch.zeros(8)}


class Story(Reporter):
    """Keeps the lines of a run's story."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def chapter(self, title: str, text: str) -> None:
        self.lines.append(f"{title}: {text}")


def picture(path: Path, seed: int, size: tuple[int, int] = (96, 64), caption: str | None = None) -> Path:
    """A picture of soft noise that is different for each seed, with its caption beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def pictures(folder: Path, count: int = 10) -> Path:
    """A folder of captioned pictures in two shapes."""
    for index in range(count):
        picture(folder / f"picture_{index:02}.png", index, (96, 64) if index % 3 else (64, 96), f"caption number {index}")
    return folder


def dataset(folder: Path, caches: Path, **changed: Any) -> DatasetConfig:
    """A dataset of small pictures, as the dataloader JSON would give it."""
    values: dict[str, Any] = {
        "id": "toys",
        "instance_data_dir": folder,
        "cache_dir_vae": caches / "latents",
        "text_cache_dir": caches / "text",
        "resolution": 64,
        "resolution_type": "pixel",
        "aspect_bucket_alignment": 8,
        "caption_strategy": "textfile",
        "minimum_image_size": None,
        "instance_prompt": None,
        "prepend_instance_prompt": False,
        "only_instance_prompt": False,
    }
    return DatasetConfig(**{**values, **changed})


def settings(output: Path, **changed: Any) -> DataSettings:
    values: dict[str, Any] = {
        "output_dir": output,
        "cache_dir": output / "cache",
        "text_cache_dir": output / "cache" / "text",
        "device": torch.device("cpu"),
        "seed": 7,
        "batch_size": 2,
        "cache_dtype": "fp32",
    }
    return DataSettings(**{**values, **changed})


def tree_hash(folder: Path) -> str:
    """Names, bytes and modification times of everything below a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_mtime_ns}".encode())
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()
