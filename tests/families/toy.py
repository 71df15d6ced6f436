"""A family that no release has, in one file: pixels made eight times smaller, captions that are their length."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from helpers.config.facts import FamilyFacts
from helpers.config.options import CacheOptions, ModelOptions
from helpers.data.batches import Batch
from helpers.data.ports import CaptionLengths, ImageCodec, LatentSpec, TextEncoders, TextTensors
from helpers.protocols import Parts


class Pixels:
    fingerprint = "toy pixels"

    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        return {"mean": nn.functional.avg_pool2d(pixels, 8)}

    def decode(self, latents: Tensor) -> Tensor:
        return nn.functional.interpolate(latents, scale_factor=8)


class Lengths:
    fingerprint = "toy lengths"
    truncated = 0

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        return {"length": torch.tensor([[float(len(caption))] for caption in captions])}


class Characters:
    fingerprint = "toy characters"
    limit = 77

    def token_counts(self, captions: Sequence[str]) -> list[int]:
        return [len(caption) for caption in captions]


class Toy:
    facts = FamilyFacts(name="toy", title="Toy", defaults={"learning_rate": 2e-3})
    latents = LatentSpec(channels=3, downsampling=8)
    refines = False
    notes = ("a toy of one convolution",)
    name = identity = "toy"
    loads_lora = True
    lora_targets = ("conv1",)
    scheduler_config: Mapping[str, Any] = {"num_train_timesteps": 50, "beta_schedule": "linear", "prediction_type": "epsilon"}

    def __init__(self, options: ModelOptions, cache: CacheOptions) -> None:
        pass

    def image_codec(self, device: torch.device) -> AbstractContextManager[ImageCodec]:
        return nullcontext(Pixels())

    def text_encoders(self, device: torch.device) -> AbstractContextManager[TextEncoders]:
        return nullcontext(Lengths())

    def caption_lengths(self) -> CaptionLengths:
        return Characters()

    def unconditional(self, encoders: TextEncoders) -> TextTensors:
        return {"length": torch.zeros(1)}

    def load(self, dtype: torch.dtype) -> Parts:
        from diffusers import UNet2DConditionModel

        shape: dict[str, Any] = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
        network = UNet2DConditionModel(8, 3, 3, norm_num_groups=4, layers_per_block=1, mid_block_type=None, **shape)
        return Parts(network.to(dtype), "unet")

    def conditioning(self, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        return {"length": batch.text["length"].to(device, torch.float32)}

    def predict(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        return denoiser(noisy + 0.01 * conditioning["length"].view(-1, 1, 1, 1), timesteps, encoder_hidden_states=None).sample

    def pipeline(self, denoiser: nn.Module, sampler: Any) -> Any:
        raise NotImplementedError

    def prompt_arguments(self, text: TextTensors, negative: TextTensors) -> dict[str, Any]:
        raise NotImplementedError

    def kohya_name(self, module: str) -> str | None:
        return None

    def read_lora(self, path: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
        from safetensors.torch import load_file

        matrices = {name.removeprefix("unet."): tensor for name, tensor in load_file(path).items()}
        end = ".lora_A.weight"
        return matrices, {name.removesuffix(end): 16.0 / len(tensor) for name, tensor in matrices.items() if name.endswith(end)}

    def modelspec(self, kind: str) -> dict[str, str]:
        return {}

    def export_pipeline(self, denoiser_folder: Path, scheduler_config: Mapping[str, Any], target: Path) -> None:
        shutil.copytree(denoiser_folder, target / "unet")
