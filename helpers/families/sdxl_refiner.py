"""The refiner of Stable Diffusion XL: a second model for the low-noise end of the schedule."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.config.declare import option
from helpers.config.facts import FamilyFacts, Miniature
from helpers.data.ports import CaptionLengths, ImageCodec, TextEncoders, TextTensors
from helpers.families.loading.base_model import BaseModel
from helpers.families.lora import unet_lora
from helpers.families.networks import img2img, sdxl_inputs
from helpers.families.networks.export import modelspec, trained_edge, write_pipeline
from helpers.families.networks.unet import UNET_OPTIONS, load_unet
from helpers.protocols import Parts

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from helpers.config.options import CacheOptions, ModelOptions
    from helpers.data.batches import Batch

TEXT = ("text_encoder_2", "tokenizer_2")
ENCODERS = ("_2",)  # suffixes of their folders


@dataclass(frozen=True)
class RefinerOptions:
    """SDXL refiner: its aesthetic score, and the timesteps that it is trained on."""

    data_aesthetic_score: float = option(
        7.0, "Aesthetic score of the training images that the refiner gets; validation asks for 6.", at_least=0, at_most=10
    )
    sdxl_refiner_uses_full_range: bool = option(
        False, "Train the refiner on the whole schedule; same as --no-refiner_training.", alias_of=("refiner_training", False)
    )


class SDXLRefiner:
    """Like SDXL, but with only the second text encoder, and with an aesthetic score in place of the target size.

    It continues where the base model has left little noise. So it is trained on those timesteps, unless the whole schedule is asked for,
    and validation starts from images of the datasets, not from noise.
    """

    facts = FamilyFacts(
        name="sdxl_refiner",
        title="SDXL refiner",
        defaults={"refiner_training": True},
        wrapper="./train_sdxl.sh",
        pipelines=("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"),
        accepts=lambda index: not sdxl_inputs.has_first_encoder(index),
        selectable=False,
        section=RefinerOptions,
        miniatures=(Miniature("sdxl_refiner", "helpers.families.miniatures.sd:write_sdxl_refiner", kohya=True),),
        options=UNET_OPTIONS | {"sdxl_original_size", "long_captions", "export_single_file"},
        img2img=True,
    )
    refines = True
    notes = ()
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
        self.aesthetic_score = options.section(RefinerOptions).data_aesthetic_score

    def image_codec(self, device: torch.device) -> AbstractContextManager[ImageCodec]:
        return self.vae.codec(device)

    def text_encoders(self, device: torch.device) -> AbstractContextManager[TextEncoders]:
        """The input states of the last layer, and the pooled projection."""
        from helpers.families.text.clip import clip_encoders, states_and_pooled

        return clip_encoders(self.base, ENCODERS, "penultimate", states_and_pooled, device, self.chunked)

    def caption_lengths(self) -> CaptionLengths:
        from helpers.families.text.clip import clip_caption_lengths

        return clip_caption_lengths(self.base, ENCODERS, self.chunked)

    def unconditional(self, encoders: TextEncoders) -> TextTensors:
        """What the model's pipeline uses for an absent negative prompt: zeros, or the encoded empty caption if model_index.json says so."""
        from helpers.families.text.clip import zeros

        if self.base.index.get("force_zeros_for_empty_prompt", True):
            return zeros(self.base, ENCODERS, self.chunked)
        return {name: tensor[0] for name, tensor in encoders.encode([""]).items()}

    def load(self, dtype: torch.dtype | None) -> Parts:
        return load_unet(self.base, dtype)

    def conditioning(self, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        """Text, and (original height, width, top, left, aesthetic score)."""
        numbers = [[*sdxl_inputs.size_and_crop(crop, self.original_size), self.aesthetic_score] for crop in batch.geometry]
        return sdxl_inputs.text_and_numbers(batch, numbers, device)

    predict = staticmethod(sdxl_inputs.predict)
    prompt_arguments = staticmethod(sdxl_inputs.prompt_arguments)
    img2img_arguments = staticmethod(img2img.img2img_arguments)

    def pipeline(self, denoiser: nn.Module, sampler: Any) -> Any:
        """From latents and embeddings to latents."""
        from diffusers import StableDiffusionXLImg2ImgPipeline

        from helpers.families.loading.vae import VaeSettings

        absent: Any = None  # the caller encodes and decodes images
        return StableDiffusionXLImg2ImgPipeline(
            vae=VaeSettings(self.vae.config),
            **dict.fromkeys(("text_encoder", "tokenizer", *TEXT), absent),
            unet=denoiser,
            scheduler=sampler,
            requires_aesthetics_score=True,
            add_watermarker=False,
        )

    img2img_pipeline = pipeline

    def kohya_name(self, module: str) -> str | None:
        """Built from diffusers' names. Of the original names, diffusers misreads those of a four-level network (block 1 for block 10)."""
        return unet_lora.kohya_name(module)

    def read_lora(self, path: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
        from diffusers import StableDiffusionXLImg2ImgPipeline

        return unet_lora.read_lora(StableDiffusionXLImg2ImgPipeline, path, self.base.config("unet"))

    def modelspec(self, kind: str) -> dict[str, str]:
        edge = trained_edge(self.base, "unet", self.latents.downsampling)
        implementation = "https://github.com/Stability-AI/generative-models"
        return modelspec(self.base, f"stable-diffusion-xl-v1-refiner/{kind}", implementation, "sdxl_refiner_v1-0", edge)

    def export_pipeline(self, denoiser_folder: Path, scheduler_config: Mapping[str, Any], target: Path) -> None:
        write_pipeline(self.base, {"unet": denoiser_folder, "vae": self.vae.folder}, scheduler_config, target)
