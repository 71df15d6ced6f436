"""Stable Diffusion XL (Podell et al., 2023), the base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.config.facts import FamilyFacts, Miniature
from helpers.data.ports import CaptionLengths, ImageCodec, TextEncoders, TextTensors
from helpers.families.loading.base_model import BaseModel
from helpers.families.lora import unet_lora
from helpers.families.networks import condition, img2img, sdxl_inputs
from helpers.families.networks.export import modelspec, trained_edge, write_pipeline
from helpers.families.networks.unet import UNET_OPTIONS, controlnet_start, load_unet, unet_and_controlnet
from helpers.protocols import Parts

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from helpers.config.options import CacheOptions, ModelOptions
    from helpers.data.batches import Batch
    from helpers.families.networks.controlnet import ControlledUNet
    from helpers.families.text.clip import TrainedClip

TEXT = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
ENCODERS = ("", "_2")  # suffixes of their folders


class SDXL:
    """SDXL base: two CLIP text encoders, size and crop conditioning, a U-Net on latents of 4 channels with 1/8 of the width and height."""

    facts = FamilyFacts(
        name="sdxl",
        title="SDXL",
        wrapper="./train_sdxl.sh",
        pipelines=("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"),
        accepts=sdxl_inputs.has_first_encoder,
        section=sdxl_inputs.SDXLOptions,
        miniatures=(Miniature("sdxl", "helpers.families.miniatures.sdxl:write_sdxl", kohya=True, drops_to_zeros=True),),
        options=UNET_OPTIONS | {"long_captions", "export_single_file"},
        img2img=True,
        controlnet=True,
        trains_text_encoders=frozenset({"lora"}),
    )
    refines = False
    notes = ()
    condition_as_latents = False
    loads_lora = True
    lora_targets = unet_lora.ATTENTION

    def __init__(self, options: ModelOptions, cache: CacheOptions) -> None:
        from helpers.families.loading.vae import Vae

        self.base = BaseModel.open(self.facts, ("unet", "vae", *TEXT, "scheduler"), options, cache)
        self.vae = Vae.open(self.base, self.base.config("unet")["in_channels"], options, cache)
        self.name, self.identity = self.base.name, self.base.hash_of("unet")
        self.latents, self.scheduler_config = self.vae.latents, self.base.config("scheduler")
        self.original_size = options.section(sdxl_inputs.SDXLOptions).sdxl_original_size
        self.chunked = options.long_captions == "chunk"
        self.controlnet_start = controlnet_start(self.base, options)

    def image_codec(self, device: torch.device) -> AbstractContextManager[ImageCodec]:
        return self.vae.codec(device)

    def text_encoders(self, device: torch.device) -> AbstractContextManager[TextEncoders]:
        """The input states of the last layers of both encoders, concatenated, and the pooled projection of the second encoder."""
        from helpers.families.text.clip import clip_encoders, states_and_pooled

        return clip_encoders(self.base, ENCODERS, "penultimate", states_and_pooled, device, self.chunked)

    def caption_lengths(self) -> CaptionLengths:
        from helpers.families.text.clip import clip_caption_lengths

        return clip_caption_lengths(self.base, ENCODERS, self.chunked)

    def unconditional(self, encoders: TextEncoders) -> TextTensors:
        """Zeros, which the pipeline also uses for an absent negative prompt."""
        from helpers.families.text.clip import zeros

        return zeros(self.base, ENCODERS, self.chunked)

    def load(self, dtype: torch.dtype | None) -> Parts:
        return load_unet(self.base, dtype)

    def load_text_encoders(self, dtype: torch.dtype) -> dict[str, Any]:
        from helpers.families.text.clip import load_encoders

        return load_encoders(self.base, ENCODERS, dtype)

    def text_layers_read(self, role: str) -> int:
        """All but the last for the first encoder; all for the second, whose pooled projection also needs its last layer."""
        return int(self.base.config(role)["num_hidden_layers"]) - (role == "text_encoder")

    @cached_property
    def _trained_clip(self) -> TrainedClip:
        from helpers.families.text.clip import TrainedClip, states_and_pooled

        return TrainedClip(self.base, ENCODERS, "penultimate", states_and_pooled)

    def embed(self, encoders: Mapping[str, nn.Module], captions: Sequence[str | None], device: torch.device) -> dict[str, Tensor]:
        """Dropped captions are encoded too, and set to zero afterwards, so that every process has a gradient for every weight."""
        import torch

        states = self._trained_clip.embed(encoders, [caption or "" for caption in captions], device)
        dropped = torch.tensor([caption is None for caption in captions], device=device)
        return {name: tensor.masked_fill(dropped.view(-1, *[1] * (tensor.ndim - 1)), 0.0) for name, tensor in states.items()}

    def conditioning(self, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        """Text, and (original height, width, top, left, target height, width)."""
        numbers = [[*sdxl_inputs.size_and_crop(crop, self.original_size), crop.target.height, crop.target.width] for crop in batch.geometry]
        return {**sdxl_inputs.text_and_numbers(batch, numbers, device), **condition.of_batch(batch, device)}

    predict = staticmethod(sdxl_inputs.predict)
    prompt_arguments = staticmethod(sdxl_inputs.prompt_arguments)
    img2img_arguments = staticmethod(img2img.img2img_arguments)

    def controlnet(self, denoiser: nn.Module) -> ControlledUNet:
        from helpers.families.networks.controlnet import controlled_unet

        return controlled_unet(denoiser, self.controlnet_start, self.latents.downsampling)

    def pipeline(self, denoiser: nn.Module, sampler: Any) -> Any:
        from diffusers import StableDiffusionXLControlNetPipeline, StableDiffusionXLPipeline

        absent: Any = None  # from embeddings to latents: the caller encodes and decodes
        encoders = dict.fromkeys(("vae", *TEXT), absent)
        networks = unet_and_controlnet(denoiser)
        kind = StableDiffusionXLControlNetPipeline if "controlnet" in networks else StableDiffusionXLPipeline
        return kind(**encoders, **networks, scheduler=sampler, add_watermarker=False)

    def img2img_pipeline(self, denoiser: nn.Module, sampler: Any) -> Any:
        from diffusers import StableDiffusionXLImg2ImgPipeline

        from helpers.families.loading.vae import VaeSettings

        absent: Any = None
        vae: Any = VaeSettings(self.vae.config)
        encoders = dict.fromkeys(TEXT, absent)
        return StableDiffusionXLImg2ImgPipeline(vae=vae, **encoders, unet=denoiser, scheduler=sampler, add_watermarker=False)

    def kohya_name(self, module: str) -> str | None:
        return unet_lora.kohya_name_of_original(module, self.base.config("unet"))

    def read_lora(self, path: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
        from diffusers import StableDiffusionXLPipeline

        return unet_lora.read_lora(StableDiffusionXLPipeline, path, self.base.config("unet"))

    def modelspec(self, kind: str) -> dict[str, str]:
        edge = trained_edge(self.base, "unet", self.latents.downsampling)
        implementation = "https://github.com/Stability-AI/generative-models"
        return modelspec(self.base, f"stable-diffusion-xl-v1-base/{kind}", implementation, "sdxl_base_v1-0", edge)

    def export_pipeline(self, denoiser_folder: Path, scheduler_config: Mapping[str, Any], target: Path) -> None:
        write_pipeline(self.base, {"unet": denoiser_folder, "vae": self.vae.folder}, scheduler_config, target)
