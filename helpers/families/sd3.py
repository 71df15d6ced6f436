"""Stable Diffusion 3 and 3.5 (Esser et al., 2024)."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.config.declare import option
from helpers.config.facts import FamilyFacts, Miniature, Settings
from helpers.data.ports import CaptionLengths, ImageCodec, TextEncoders, TextTensors
from helpers.errors import ModelError
from helpers.families.loading.base_model import BaseModel
from helpers.families.lora import transformer_lora
from helpers.families.networks import condition, img2img
from helpers.families.networks.export import Component, modelspec, trained_edge, write_pipeline
from helpers.families.original.transformer_names import SD3, kohya_transformer_name, transformer_names
from helpers.protocols import KohyaName, Parts

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from helpers.config.options import CacheOptions, ModelOptions
    from helpers.data.batches import Batch
    from helpers.families.networks.controlnet import ControlledTransformer
    from helpers.families.text.t5_source import T5Source

CLIPS = ("", "_2")  # suffixes of their folders
T5 = "_3"
CLIP_FOLDERS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
T5_FOLDERS = ("text_encoder_3", "tokenizer_3")
T5_LENGTH = 256  # tokens, as the pipeline of diffusers
LONGEST_T5 = 512  # tokens, the most that the pipeline accepts
# For --sd3_uses_diffusion: SDXL's schedule with zero terminal SNR, so that it ends in pure noise, as that of flow matching does.
DIFFUSION_SCHEDULE: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "clip_sample": False,
}
SCALE_NOTHING = ("ddim", "ddpm", "unipc")  # samplers that need no scale_model_input, which the pipeline of SD3 never calls


def _judge(settings: Settings) -> Iterable[str]:
    if settings["sd3_uses_diffusion"]:
        yield from _judge_diffusion(settings)
    if settings["aspect_bucket_alignment"] == 8:
        yield "--aspect_bucket_alignment=8 gives sizes that the 16-pixel patches of Stable Diffusion 3 do not divide; use 64."
    if settings["validation_guidance_rescale"]:
        yield "--validation_guidance_rescale is not for Stable Diffusion 3, whose pipeline cannot rescale guidance. Remove it."
    length = settings["tokenizer_max_length"]
    if length is not None and length > LONGEST_T5:  # type: ignore[operator]  # a number
        yield f"--tokenizer_max_length={length} is more than the {LONGEST_T5} tokens that pipelines of Stable Diffusion 3 take; lower it."


def _judge_diffusion(settings: Settings) -> Iterable[str]:
    sampler = settings["validation_noise_scheduler"]
    if sampler not in SCALE_NOTHING:
        yield (
            f"--validation_noise_scheduler={sampler} cannot be used with --sd3_uses_diffusion: it needs scaled network inputs, and the "
            f"pipeline of Stable Diffusion 3 does not scale them. Use {', '.join(SCALE_NOTHING)}."
        )
    if settings["validation_using_datasets"]:
        yield (
            "--validation_using_datasets cannot be used with --sd3_uses_diffusion: the image-to-image pipeline of Stable Diffusion 3 "
            "supports flow matching only. Remove it."
        )


@dataclass(frozen=True)
class SD3Options:
    """Stable Diffusion 3: options of this family only."""

    sd3: bool = option(False, "Same as --model_family=sd3.", env="STABLE_DIFFUSION_3", alias_of=("model_family", "sd3"))
    sd3_uses_diffusion: bool = option(
        False,
        "Train by diffusion with v-prediction instead of flow matching. This takes a long training. See documentation/OBJECTIVES.md.",
    )
    sd3_caption_dropout: str = option(
        "apart",
        "Drop a caption for each of the three text encoders independently, with the cube root of --caption_dropout_probability (two"
        " encoders without T5: the square root), as in the training of the base models; or for all of them together.",
        choices=("apart", "together"),
    )


class StableDiffusion3:
    """Two CLIP text encoders, an optional T5, and a transformer on latents of 16 channels with 1/8 of the image's width and height.

    The transformer's config tells 3.5 from 3: 3.5 normalizes queries and keys, and some of its layers have a second attention.
    """

    facts = FamilyFacts(
        name="sd3",
        title="Stable Diffusion 3",
        defaults={"aspect_bucket_alignment": 64},
        wrapper="./train_sd3.sh",
        pipelines=("StableDiffusion3Pipeline",),
        miniatures=(
            Miniature("sd3", "helpers.families.miniatures.sd3:write_sd3", kohya=True, learns_in=90, learns_to=0.1, drops_to_zeros=True),
            Miniature("sd35", "helpers.families.miniatures.sd3:write_sd35", kohya=True, learns_in=90, learns_to=0.1, drops_to_zeros=True),
        ),
        section=SD3Options,
        options=frozenset({"tokenizer_max_length", "pretrained_t5_model_name_or_path", "export_single_file"}),
        objective="flow",
        switched={"sd3_uses_diffusion": "diffusion"},
        img2img=True,
        encoders_apart=True,
        controlnet=True,
        judge=_judge,
    )
    refines = False
    condition_as_latents = True
    loads_lora = True
    lora_targets = transformer_lora.JOINT_ATTENTION

    def __init__(self, options: ModelOptions, cache: CacheOptions) -> None:
        from helpers.families.loading.vae import Vae

        self.base = BaseModel.open(self.facts, ("transformer", "vae", *CLIP_FOLDERS, "scheduler"), options, cache)
        self.vae = Vae.open(self.base, self.base.config("transformer")["in_channels"], options, cache)
        self.transformer = self.base.config("transformer")
        self.original_names = transformer_names(SD3, self.transformer)
        self.name, self.identity = self.base.name, self.base.hash_of("transformer")
        self.latents = dataclasses.replace(self.vae.latents, patch=self.transformer["patch_size"])
        self.scheduler_config = _schedule(self.base, options.section(SD3Options).sd3_uses_diffusion)
        self.t5_length = options.tokenizer_max_length or T5_LENGTH
        self.clips = {f"text_encoder{suffix}": self.base.config(f"text_encoder{suffix}") for suffix in CLIPS}
        self.t5 = self._t5(options)
        self.encoders_apart = self._encoders() if options.section(SD3Options).sd3_caption_dropout == "apart" else ()
        self.controlnet_start = self._controlnet_start(options)

    @property
    def notes(self) -> Sequence[str]:
        if self.t5:
            return ()
        return (
            "the base model has no T5 (name one with --pretrained_t5_model_name_or_path): the CLIP text encoders read the first 77 tokens "
            "of a caption, and zeros replace the states of T5",
        )

    def image_codec(self, device: torch.device) -> AbstractContextManager[ImageCodec]:
        return self.vae.codec(device)

    def text_encoders(self, device: torch.device) -> AbstractContextManager[TextEncoders]:
        from helpers.families.text.sd3_text import text_encoders

        return text_encoders(self.base, self.t5, self.t5_length, device)

    def caption_lengths(self) -> CaptionLengths:
        """In tokens of T5 if the model has one, because it reads further than CLIP."""
        from helpers.families.text.clip import clip_caption_lengths
        from helpers.families.text.t5 import T5CaptionLengths

        return T5CaptionLengths(self.t5, self.t5_length) if self.t5 else clip_caption_lengths(self.base, CLIPS)

    def unconditional(self, encoders: TextEncoders) -> TextTensors:
        """Zeros for all encoders."""
        from helpers.families.text.sd3_text import zeros

        return zeros(self.clips, self.t5, self.t5_length)

    def without(self, text: TextTensors, encoders: Collection[str]) -> TextTensors:
        """With zeros for these encoders. The base models were trained with each encoder dropped independently (Esser et al., 2024, B.3)."""
        from helpers.families.text.sd3_text import without

        return without(self.clips, text, encoders)

    def load(self, dtype: torch.dtype | None) -> Parts:
        from diffusers import SD3Transformer2DModel

        return Parts(self.base.load(SD3Transformer2DModel, "transformer", dtype), "transformer")

    def conditioning(self, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        text = self._joined({name: tensor.to(device) for name, tensor in batch.text.items()})
        return {**text, **condition.of_batch(batch, device)}

    def predict(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        return denoiser(
            noisy,
            timestep=timesteps,
            encoder_hidden_states=conditioning["prompt_embeds"],
            pooled_projections=conditioning["pooled"],
            **condition.keyword(conditioning),
        ).sample

    def controlnet(self, denoiser: nn.Module) -> ControlledTransformer:
        from helpers.families.networks.controlnet import controlled_transformer

        return controlled_transformer(denoiser, self.controlnet_start, self.vae)

    def pipeline(self, denoiser: Any, sampler: Any) -> Any:
        from diffusers import StableDiffusion3ControlNetPipeline, StableDiffusion3Pipeline

        absent: Any = None  # from embeddings to latents: the caller encodes and decodes
        others = dict.fromkeys(("vae", *CLIP_FOLDERS, *T5_FOLDERS), absent)
        if not hasattr(denoiser, "controlnet"):
            return StableDiffusion3Pipeline(**others, transformer=denoiser, scheduler=sampler)
        from helpers.families.networks.controlnet import LatentsAsPixels

        networks: dict[str, Any] = {"transformer": denoiser.denoiser, "controlnet": denoiser.controlnet, "vae": LatentsAsPixels()}
        return StableDiffusion3ControlNetPipeline(**{**others, **networks}, scheduler=sampler)

    def img2img_pipeline(self, denoiser: nn.Module, sampler: Any) -> Any:
        from diffusers import StableDiffusion3Img2ImgPipeline

        from helpers.families.loading.vae import VaeSettings

        absent: Any = None
        vae: Any = VaeSettings(self.vae.config)
        encoders = dict.fromkeys((*CLIP_FOLDERS, *T5_FOLDERS), absent)
        return StableDiffusion3Img2ImgPipeline(vae=vae, **encoders, transformer=denoiser, scheduler=sampler)

    def img2img_arguments(self, latents: Tensor, steps: int, strength: float) -> dict[str, Any]:
        """With the size in pixels; without it, the pipeline assumes the size that the model was trained at."""
        height, width = (side * self.latents.downsampling for side in latents.shape[2:])
        return {**img2img.img2img_arguments(latents, steps, strength), "height": height, "width": width}

    def prompt_arguments(self, text: TextTensors, negative: TextTensors) -> dict[str, Any]:
        arguments = {}
        for prefix, tensors in (("", text), ("negative_", negative)):
            joined = self._joined({name: tensor.unsqueeze(0) for name, tensor in tensors.items()})
            arguments[f"{prefix}prompt_embeds"] = joined["prompt_embeds"]
            arguments[f"{prefix}pooled_prompt_embeds"] = joined["pooled"]
        return arguments

    def kohya_name(self, module: str) -> KohyaName | None:
        return kohya_transformer_name(self.original_names, module)

    def read_lora(self, path: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
        from diffusers import StableDiffusion3Pipeline

        return transformer_lora.read_lora(StableDiffusion3Pipeline, path, self.original_names)

    def modelspec(self, kind: str) -> dict[str, str]:
        edge = trained_edge(self.base, "transformer", self.latents.downsampling)
        return modelspec(self.base, f"stable-diffusion-3/{kind}", "https://github.com/Stability-AI/sd3-ref", "sd3", edge)

    def export_pipeline(self, denoiser_folder: Path, scheduler_config: Mapping[str, Any], target: Path) -> None:
        parts: dict[str, Component] = {"transformer": denoiser_folder, "vae": self.vae.folder}
        if self.t5 is None:
            return write_pipeline(self.base, parts, scheduler_config, target)
        write_pipeline(self.base, {**parts, **self.t5.parts}, scheduler_config, target, self.t5.classes)

    def _t5(self, options: ModelOptions) -> T5Source | None:
        """None if neither the user nor the base model has one: model_index.json does not name it, or its folder is absent."""
        from helpers.families.text.t5_source import T5Source

        named = all((self.base.index.get(part) or [None])[0] is not None for part in T5_FOLDERS)
        brought = named and all((self.base.folder / part).is_dir() for part in T5_FOLDERS)
        if not (options.pretrained_t5_model_name_or_path or brought):
            return None
        return T5Source.open(self.base, T5, options, width=self.transformer["joint_attention_dim"])

    def _encoders(self) -> tuple[str, ...]:
        return tuple(f"text_encoder{suffix}" for suffix in (*CLIPS, T5)[: 3 if self.t5 else 2])

    def _controlnet_start(self, options: ModelOptions) -> Path | None:
        if not options.controlnet:
            return None
        from helpers.families.networks.controlnet import OF_A_TRANSFORMER, find_start

        return find_start(self.base, options, "SD3ControlNetModel", "transformer", OF_A_TRANSFORMER)

    def _joined(self, text: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from helpers.families.text.sd3_text import joined

        return joined(text, self.transformer["joint_attention_dim"], self.t5_length)


def _schedule(base: BaseModel, by_diffusion: bool) -> Mapping[str, Any]:
    """The base model's own schedule, or DIFFUSION_SCHEDULE to train a flow-matching model by diffusion.

    Raises ModelError for a model that was trained by diffusion if --sd3_uses_diffusion is not set.
    """
    own = base.config("scheduler")
    if "beta_schedule" in own and not by_diffusion:
        raise ModelError(f"{base.name} was trained by diffusion, according to its scheduler: set --sd3_uses_diffusion.")
    return DIFFUSION_SCHEDULE if by_diffusion and "beta_schedule" not in own else own
