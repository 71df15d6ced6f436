"""The image codec of latent models: diffusers' AutoencoderKL, loaded when first needed and released afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from helpers.data.ports import LatentSpec
from helpers.errors import ModelError
from helpers.families.loading import components, folder
from helpers.families.loading.base_model import BaseModel
from helpers.families.loading.hashes import fingerprint

if TYPE_CHECKING:
    from helpers.config.options import CacheOptions, ModelOptions


OPTION = "--pretrained_vae_model_name_or_path"
CLASS = "AutoencoderKL"


@dataclass(frozen=True)
class Vae:
    """The VAE of a run and how it is used: the base model's own, or the one that the user named."""

    folder: Path
    config: Mapping[str, Any]
    base: BaseModel
    dtype: str  # --vae_dtype
    deviations: bool  # whether each step draws from the posterior
    tiling: bool
    slicing: bool

    @classmethod
    def open(cls, base: BaseModel, channels: int, options: ModelOptions, cache: CacheOptions) -> Vae:
        """The VAE for a network that reads latents of so many channels. Raises ModelError where there is none, or another one."""
        named = options.pretrained_vae_model_name_or_path
        found = locate(named, base)
        if named and (problem := components.component_problem(found, base.variant, options.needs_weights)):
            raise ModelError(f"{OPTION}: {problem}")
        if named and options.needs_weights:
            base.require_finite(found)
        config, deviations = folder.read_settings(found / "config.json"), cache.latent_sampling == "sample"
        if (kind := config.get("_class_name", CLASS)) not in (CLASS, f"Flax{CLASS}"):
            raise ModelError(f"{f'{OPTION}: ' if named else ''}{found} holds an {kind}, and only an {CLASS} can be used here.")
        vae = cls(found, config, base, cache.vae_dtype, deviations, cache.vae_tiling, cache.vae_slicing)
        if channels != (made := vae.latents.channels):
            if named:
                raise ModelError(f"{OPTION}: latents of {found} have {made} channels, and {base.name} reads {channels}: leave it out.")
            raise ModelError(
                f"{base.name} reads {channels} channels, and its VAE makes {made}: a model that gets more than noisy latents, such as one "
                "for inpainting, cannot be trained. Name the text-to-image model that it was made of."
            )
        return vae

    @property
    def latents(self) -> LatentSpec:
        levels = len(self.config["block_out_channels"])  # each but the last halves the edges
        return LatentSpec(channels=self.config["latent_channels"], downsampling=2 ** (levels - 1))

    @contextmanager
    def codec(self, device: torch.device) -> Iterator[VaeCodec]:
        """Encodes and decodes on a device. Raises ModelError for fp16 with a VAE that overflows there."""
        dtype = self._dtype()
        facts = {"weights": self.base.hashes.hash_folders(self.folder), "dtype": str(dtype), "deviations": self.deviations}
        facts["shift"], facts["scale"] = normalization(self.config)
        if self.tiling:
            facts["tiling"] = True  # latents of large pictures differ a little

        def load() -> Any:
            from diffusers import AutoencoderKL

            vae = components.load_component(AutoencoderKL, self.folder, "", dtype, self.base.variant)
            vae.use_tiling, vae.use_slicing = self.tiling, self.slicing
            return vae

        codec = VaeCodec(load, dict(self.config), fingerprint(facts), device, self.deviations)
        with released(codec, device):
            yield codec

    def _dtype(self) -> torch.dtype:
        if self.dtype == "fp16" and self.config.get("force_upcast", True):
            raise ModelError(
                "--vae_dtype=fp16: this VAE overflows in fp16 and would give black images (its config says force_upcast); "
                f"use bf16 or fp32, or a VAE made for fp16 with {OPTION}."
            )
        return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.dtype, torch.float32)


class VaeSettings:
    """Takes the place of the VAE in a pipeline that gets latents, and so only reads the VAE's settings."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        from diffusers.configuration_utils import FrozenDict

        self.config = FrozenDict(config)


def locate(name: str | None, base: BaseModel) -> Path:
    """The folder of the VAE with this name, or of the base model's own."""
    if not name:
        return base.folder / "vae"
    return folder.locate_component(OPTION, name, "vae")


def normalization(config: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Shift and scale of a VAE's latents from its config, one number for all channels or one for each.

    A mean and standard deviation of each channel in the config take precedence, as in diffusers' SDXL pipelines.
    """
    scale = float(config.get("scaling_factor") or 1.0)
    shift = config.get("latents_mean") or [float(config.get("shift_factor") or 0.0)]
    return list(shift), [scale / deviation for deviation in config.get("latents_std") or [1.0]]


class VaeCodec:
    """Pixels to scaled latents and back: latents = (z - shift) * scale, of unit variance for the network.

    `load` loads the VAE in its precision; `fingerprint` is known without loading it. With `deviations`, the standard deviation
    of the posterior is encoded too, so that each step can sample from it.
    """

    def __init__(self, load: Callable[[], Any], config: dict[str, Any], fingerprint: str, device: torch.device, deviations: bool) -> None:
        self._load = load
        self._vae: Any = None
        self.shift, self.scale = (torch.tensor(values, device=device).view(-1, 1, 1) for values in normalization(config))
        self.fingerprint = fingerprint
        self.device = device
        self.deviations = deviations

    @property
    def vae(self) -> Any:
        if self._vae is None:
            self._vae = self._load().to(self.device).eval().requires_grad_(False)
        return self._vae

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        """pixels (B, 3, H, W) in [-1, 1] => {"mean": (B, C, h, w)[, "std": the same]}, float32 on the CPU."""
        posterior = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist
        latents = {"mean": (posterior.mean.float() - self.shift) * self.scale}
        if self.deviations:
            latents["std"] = posterior.std.float() * self.scale
        return {name: tensor.cpu() for name, tensor in latents.items()}

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, C, h, w) => pixels (B, 3, H, W) in [-1, 1], float32 on the CPU."""
        z = latents.to(self.device, torch.float32) / self.scale + self.shift
        return self.vae.decode(z.to(self.vae.dtype)).sample.float().clamp(-1, 1).cpu()

    def unload(self) -> None:
        self._vae = None


@contextmanager
def released(holder: Any, device: torch.device) -> Iterator[Any]:
    """Release the weights of a lazily loaded encoder at the end, also after an error."""
    try:
        yield holder
    finally:
        holder.unload()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        elif device.type == "mps":
            torch.mps.empty_cache()
