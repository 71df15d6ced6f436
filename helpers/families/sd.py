"""Stable Diffusion 1 and 2 (Rombach et al., 2022)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.config.facts import FamilyFacts, Miniature, Settings
from helpers.data.ports import CaptionLengths, ImageCodec, TextEncoders, TextTensors
from helpers.families.loading.base_model import BaseModel
from helpers.families.lora import unet_lora
from helpers.families.networks import condition, img2img
from helpers.families.networks.export import modelspec, trained_edge, write_pipeline
from helpers.families.networks.unet import UNET_OPTIONS, controlnet_start, load_unet, unet_and_controlnet
from helpers.families.text import clip_states
from helpers.protocols import Parts

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from helpers.config.options import CacheOptions, ModelOptions
    from helpers.data.batches import Batch
    from helpers.families.networks.controlnet import ControlledUNet
    from helpers.families.text.clip import TrainedClip

ACTIVATION_OF_VERSION_1 = "quick_gelu"  # of OpenAI's CLIP; version 2 has OpenCLIP's text encoder, which uses the exact GELU


def _judge(settings: Settings) -> Iterable[str]:
    if settings["validation_using_datasets"] and settings["validation_guidance_rescale"]:
        yield (
            "--validation_using_datasets cannot be combined with --validation_guidance_rescale: the image-to-image pipeline of Stable "
            "Diffusion cannot rescale guidance. Remove one of them."
        )


class StableDiffusion:
    """One CLIP text encoder, and a U-Net on latents of 4 channels with 1/8 of the image's width and height.

    The base model's own files tell version 1 from version 2: the tokenizer pads with the end-of-text token or with "!", the text encoder
    ends with the layer whose states are used (version 2 uses the last but one, so its last layer is not in the file), and the scheduler
    names the prediction type.
    """

    facts = FamilyFacts(
        name="sd2x",
        title="Stable Diffusion 1 and 2",
        wrapper="./train_sd2x.sh",
        pipelines=("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"),
        miniatures=(
            Miniature("sd1", "helpers.families.miniatures.sd:write_sd1", kohya=True),
            Miniature("sd2", "helpers.families.miniatures.sd:write_sd2", kohya=True),
        ),
        options=UNET_OPTIONS | {"long_captions", "export_single_file"},
        zero_snr=True,
        img2img=True,
        controlnet=True,
        judge=_judge,
        trains_text_encoders=frozenset({"full", "lora"}),
    )
    refines = False
    notes = ()
    condition_as_latents = False
    loads_lora = True
    lora_targets = unet_lora.ATTENTION

    def __init__(self, options: ModelOptions, cache: CacheOptions) -> None:
        from helpers.families.loading.vae import Vae

        self.base = BaseModel.open(self.facts, ("unet", "vae", "text_encoder", "tokenizer", "scheduler"), options, cache)
        self.vae = Vae.open(self.base, self.base.config("unet")["in_channels"], options, cache)
        self.name, self.identity = self.base.name, self.base.hash_of("unet")
        self.latents, self.scheduler_config = self.vae.latents, self.base.config("scheduler")
        self.chunked = options.long_captions == "chunk"
        self.controlnet_start = controlnet_start(self.base, options)

    def image_codec(self, device: torch.device) -> AbstractContextManager[ImageCodec]:
        return self.vae.codec(device)

    def text_encoders(self, device: torch.device) -> AbstractContextManager[TextEncoders]:
        from helpers.families.text.clip import clip_encoders, states_of_one

        return clip_encoders(self.base, ("",), "last", states_of_one, device, self.chunked)

    def caption_lengths(self) -> CaptionLengths:
        from helpers.families.text.clip import clip_caption_lengths

        return clip_caption_lengths(self.base, ("",), self.chunked)

    def unconditional(self, encoders: TextEncoders) -> TextTensors:
        """The empty caption, encoded like any other."""
        return {name: tensor[0] for name, tensor in encoders.encode([""]).items()}

    def load(self, dtype: torch.dtype | None) -> Parts:
        return load_unet(self.base, dtype)

    def load_text_encoders(self, dtype: torch.dtype) -> dict[str, Any]:
        from helpers.families.text.clip import load_encoders

        return load_encoders(self.base, ("",), dtype)

    def text_layers_read(self, role: str) -> int:
        return int(self.base.config(role)["num_hidden_layers"])

    @cached_property
    def _trained_clip(self) -> TrainedClip:
        from helpers.families.text.clip import TrainedClip, states_of_one

        return TrainedClip(self.base, ("",), "last", states_of_one)

    def embed(self, encoders: Mapping[str, nn.Module], captions: Sequence[str | None], device: torch.device) -> dict[str, Tensor]:
        return self._trained_clip.embed(encoders, [caption or "" for caption in captions], device)

    def conditioning(self, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        return {**clip_states.of_batch(batch, device), **condition.of_batch(batch, device)}

    def predict(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        arguments = {**clip_states.arguments(conditioning), **condition.keyword(conditioning)}
        return denoiser(noisy, timesteps, **arguments).sample

    def controlnet(self, denoiser: nn.Module) -> ControlledUNet:
        from helpers.families.networks.controlnet import controlled_unet

        return controlled_unet(denoiser, self.controlnet_start, self.latents.downsampling)

    def pipeline(self, denoiser: nn.Module, sampler: Any) -> Any:
        from diffusers import StableDiffusionControlNetPipeline, StableDiffusionPipeline

        absent: Any = None  # from embeddings to latents: the caller encodes and decodes
        others = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"), absent)
        networks = unet_and_controlnet(denoiser)
        kind = StableDiffusionControlNetPipeline if "controlnet" in networks else StableDiffusionPipeline
        return kind(**others, **networks, scheduler=sampler, requires_safety_checker=False)

    img2img_arguments = staticmethod(img2img.img2img_arguments)

    def img2img_pipeline(self, denoiser: nn.Module, sampler: Any) -> Any:
        from diffusers import StableDiffusionImg2ImgPipeline

        from helpers.families.loading.vae import VaeSettings

        absent: Any = None
        others = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"), absent)
        vae: Any = VaeSettings(self.vae.config)
        return StableDiffusionImg2ImgPipeline(vae=vae, **others, unet=denoiser, scheduler=sampler, requires_safety_checker=False)

    prompt_arguments = staticmethod(clip_states.prompt_arguments)

    def kohya_name(self, module: str) -> str | None:
        return unet_lora.kohya_name(module)

    def read_lora(self, path: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
        from diffusers import StableDiffusionPipeline

        return unet_lora.read_lora(StableDiffusionPipeline, path, self.base.config("unet"))

    def modelspec(self, kind: str) -> dict[str, str]:
        edge = trained_edge(self.base, "unet", self.latents.downsampling)
        if self.base.config("text_encoder").get("hidden_act", ACTIVATION_OF_VERSION_1) == ACTIVATION_OF_VERSION_1:
            metadata = modelspec(self.base, f"stable-diffusion-v1/{kind}", "https://github.com/CompVis/stable-diffusion", "sd_v1", edge)
            return {**metadata, "ss_v2": "False"}  # kohya and the tools that read its files tell the versions apart by this key
        velocity = self.scheduler_config.get("prediction_type") == "v_prediction"
        architecture, version = ("stable-diffusion-v2-768-v", "sd_v2_v") if velocity else ("stable-diffusion-v2-512", "sd_v2")
        metadata = modelspec(self.base, f"{architecture}/{kind}", "https://github.com/Stability-AI/stablediffusion", version, edge)
        return {**metadata, "ss_v2": "True"}

    def export_pipeline(self, denoiser_folder: Path, scheduler_config: Mapping[str, Any], target: Path) -> None:
        write_pipeline(self.base, {"unet": denoiser_folder, "vae": self.vae.folder}, scheduler_config, target)
