"""PixArt Alpha (Chen et al., 2023) and PixArt Sigma (Chen et al., 2024)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from helpers.config.declare import option
from helpers.config.facts import FamilyFacts, Miniature, Settings
from helpers.data.ports import CaptionLengths, ImageCodec, TextEncoders, TextTensors
from helpers.families.loading.base_model import BaseModel
from helpers.families.lora import peft_lora
from helpers.families.networks.export import Component, modelspec, trained_edge, write_pipeline
from helpers.families.original.transformer_names import PIXART, kohya_transformer_name, transformer_names
from helpers.protocols import KohyaName, Parts

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from helpers.config.options import CacheOptions, ModelOptions
    from helpers.data.batches import Batch

NETWORK = "PixArtTransformer2DModel"
PATCH = 2  # the edge of a token, in latent pixels
SIZED = 128  # networks of this sample_size have size conditioning, unless their config says otherwise
# The authors clip the gradient norm to 0.01. Image sides must be multiples of 16 pixels: a patch of two latent pixels.
DEFAULTS: Settings = {"max_grad_norm": 0.01, "aspect_bucket_alignment": 64}
OPTIONS = frozenset({"tokenizer_max_length", "pretrained_t5_model_name_or_path"})


def _judge(settings: Settings) -> Iterable[str]:
    if settings["aspect_bucket_alignment"] == 8:
        yield "--aspect_bucket_alignment=8 gives sizes that PixArt's 16-pixel patches do not divide; use 64."
    if settings["validation_guidance_rescale"]:
        yield "--validation_guidance_rescale is not for PixArt, whose pipeline cannot rescale guidance. Remove it."


@dataclass(frozen=True)
class PixArtOptions:
    """PixArt: its switches."""

    pixart_sigma: bool = option(False, "Same as --model_family=pixart_sigma.", alias_of=("model_family", "pixart_sigma"))
    pixart_alpha: bool = option(False, "Same as --model_family=pixart_alpha.", alias_of=("model_family", "pixart_alpha"))


class PixArt:
    """A T5 text encoder, and a transformer on latents of 4 channels with 1/8 of the image's width and height.

    The network's output has 8 channels: the noise and a variance. The variance is not trained, because our samplers do not use it.
    The subclasses state what differs between Alpha and Sigma.
    """

    facts: ClassVar[FamilyFacts]
    pipeline_class: ClassVar[str]  # of diffusers
    tokens: ClassVar[int]  # of a caption that T5 reads, unless --tokenizer_max_length is set
    code: ClassVar[str]  # address of the authors' implementation

    refines = False
    notes = ()
    loads_lora = False
    lora_targets = ("to_k", "to_q", "to_v", "to_out.0")

    def __init__(self, options: ModelOptions, cache: CacheOptions) -> None:
        from helpers.families.loading.vae import Vae
        from helpers.families.text.t5_source import T5Source

        self.base = BaseModel.open(self.facts, ("transformer", "vae", "scheduler"), options, cache)
        self.vae = Vae.open(self.base, self.base.config("transformer")["in_channels"], options, cache)
        self.name, self.identity = self.base.name, self.base.hash_of("transformer")
        self.latents = dataclasses.replace(self.vae.latents, patch=PATCH)
        self.scheduler_config = self.base.config("scheduler")
        self.length = options.tokenizer_max_length or self.tokens
        network = self.base.config("transformer")
        self.original_names = transformer_names(PIXART, network)
        self.t5 = T5Source.open(self.base, "", options, width=network["caption_channels"])
        conditioned = network.get("use_additional_conditions")
        self.size_conditioning: bool = network["sample_size"] == SIZED if conditioned is None else conditioned

    def image_codec(self, device: torch.device) -> AbstractContextManager[ImageCodec]:
        return self.vae.codec(device)

    def text_encoders(self, device: torch.device) -> AbstractContextManager[TextEncoders]:
        from helpers.families.text.t5 import normalized_text

        return normalized_text(self.t5, self.length, with_mask=True, device=device)

    def caption_lengths(self) -> CaptionLengths:
        from helpers.families.text.t5 import NormalizedLengths

        return NormalizedLengths(self.t5, self.length)

    def unconditional(self, encoders: TextEncoders) -> TextTensors:
        """The empty caption, encoded like any other."""
        return {name: tensor[0] for name, tensor in encoders.encode([""]).items()}

    def load(self, dtype: torch.dtype | None) -> Parts:
        from diffusers import PixArtTransformer2DModel

        return Parts(self.base.load(PixArtTransformer2DModel, "transformer", dtype), "transformer")

    def conditioning(self, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        """Text with its mask. With size conditioning also `resolution` (height, width) and `aspect_ratio`, as the pipeline sets them."""
        import torch

        conditioning = {
            "prompt_embeds": batch.text["prompt_embeds"].to(device, torch.float32),
            "prompt_embeds_mask": batch.text["prompt_embeds_mask"].to(device),
        }
        if self.size_conditioning:
            targets = [crop.target for crop in batch.geometry]
            conditioning["resolution"] = torch.tensor([[target.height, target.width] for target in targets], dtype=torch.float32).to(device)
            conditioning["aspect_ratio"] = torch.tensor([[target.height / target.width] for target in targets]).to(device)
        return conditioning

    def predict(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        sizes = {name: conditioning[name] for name in ("resolution", "aspect_ratio")} if self.size_conditioning else None
        output: Tensor = denoiser(
            noisy,
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_attention_mask=conditioning["prompt_embeds_mask"],
            timestep=timesteps,
            added_cond_kwargs=sizes,
        ).sample
        return output[:, : noisy.shape[1]]

    def pipeline(self, denoiser: nn.Module, sampler: Any) -> Any:
        import diffusers

        absent: Any = None  # from embeddings to latents: the caller encodes and decodes
        encoders = dict.fromkeys(("vae", "text_encoder", "tokenizer"), absent)
        return FromEmbeddings(getattr(diffusers, self.pipeline_class)(**encoders, transformer=denoiser, scheduler=sampler))

    def prompt_arguments(self, text: TextTensors, negative: TextTensors) -> dict[str, Any]:
        """Both padded to the longer one, because the pipeline concatenates them."""
        from helpers.data.base.padding import stacked

        both = stacked([text, negative])
        embeds, mask = both["prompt_embeds"], both["prompt_embeds_mask"]
        return {
            "prompt_embeds": embeds[:1],
            "prompt_attention_mask": mask[:1],
            "negative_prompt_embeds": embeds[1:],
            "negative_prompt_attention_mask": mask[1:],
        }

    def kohya_name(self, module: str) -> KohyaName | None:
        return kohya_transformer_name(self.original_names, module)

    def read_lora(self, path: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
        return peft_lora.read(path, self.original_names)

    def modelspec(self, kind: str) -> dict[str, str]:
        edge = trained_edge(self.base, "transformer", self.latents.downsampling)
        return modelspec(self.base, f"{self.facts.name.replace('_', '-')}/{kind}", self.code, self.facts.name, edge)

    def export_pipeline(self, denoiser_folder: Path, scheduler_config: Mapping[str, Any], target: Path) -> None:
        parts: dict[str, Component] = {"transformer": denoiser_folder, "vae": self.vae.folder, **self.t5.parts}
        # model_index.json of early releases of Alpha names an older class, from which NETWORK was split.
        classes = {"transformer": ["diffusers", NETWORK], **self.t5.classes}
        write_pipeline(self.base, parts, scheduler_config, target, classes)


class FromEmbeddings:
    """A PixArt pipeline that is called with embeddings, and generates images of exactly the requested size."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    def set_progress_bar_config(self, **settings: Any) -> None:
        self.pipeline.set_progress_bar_config(**settings)

    def __call__(self, **arguments: Any) -> Any:
        # By default the negative prompt is "", which cannot be combined with embeddings, and sizes are rounded to the authors' buckets.
        return self.pipeline(negative_prompt=None, use_resolution_binning=False, **arguments)


class PixArtAlpha(PixArt):
    """The network for 1024 pixels has size conditioning (height, width, aspect ratio); those for smaller images do not."""

    facts = FamilyFacts(
        name="pixart_alpha",
        title="PixArt Alpha",
        defaults=DEFAULTS,
        wrapper="./train_sdxl.sh",
        setting="PIXART_ALPHA='true'",
        pipelines=("PixArtAlphaPipeline",),
        miniatures=(Miniature("pixart_alpha", "helpers.families.miniatures.pixart:write_pixart_alpha", kohya=True),),
        section=PixArtOptions,
        options=OPTIONS,
        judge=_judge,
    )
    pipeline_class = "PixArtAlphaPipeline"
    tokens = 120
    code = "https://github.com/PixArt-alpha/PixArt-alpha"


class PixArtSigma(PixArt):
    """Reads longer captions, uses SDXL's VAE, and has no size conditioning."""

    facts = FamilyFacts(
        name="pixart_sigma",
        title="PixArt Sigma",
        defaults=DEFAULTS,
        wrapper="./train_sdxl.sh",
        setting="PIXART_SIGMA='true'",
        pipelines=("PixArtSigmaPipeline",),
        miniatures=(Miniature("pixart_sigma", "helpers.families.miniatures.pixart:write_pixart_sigma", kohya=True),),
        section=PixArtOptions,
        options=OPTIONS,
        judge=_judge,
    )
    pipeline_class = "PixArtSigmaPipeline"
    tokens = 300
    code = "https://github.com/PixArt-alpha/PixArt-sigma"
