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
from helpers.protocols import Parts

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from helpers.config.options import CacheOptions, ModelOptions
    from helpers.data.batches import Batch

NETWORK = "PixArtTransformer2DModel"
PATCH = 2  # latent pixels on the edge of what is one token to the network
SIZED = 128  # the sample_size of the networks that are told sizes, where their config does not say
# The authors clip the gradient to this; the pictures all come from patches that are at least two latent pixels wide and high.
DEFAULTS: Settings = {"max_grad_norm": 0.01, "aspect_bucket_alignment": 64}
OPTIONS = frozenset({"tokenizer_max_length", "pretrained_t5_model_name_or_path"})


def _judge(settings: Settings) -> Iterable[str]:
    if settings["aspect_bucket_alignment"] == 8:
        yield "--aspect_bucket_alignment=8 gives sides that PixArt's patches of 16 pixels do not divide; leave it at 64."
    if settings["validation_guidance_rescale"]:
        yield "--validation_guidance_rescale is not known to PixArt's pipeline; leave it at 0."


@dataclass(frozen=True)
class PixArtOptions:
    """PixArt: its switches."""

    pixart_sigma: bool = option(False, "Same as --model_family=pixart_sigma.", alias_of=("model_family", "pixart_sigma"))
    pixart_alpha: bool = option(False, "Same as --model_family=pixart_alpha.", alias_of=("model_family", "pixart_alpha"))


class PixArt:
    """A T5 encoder, and a transformer on latents of 4 channels at an eighth of the pixels. The versions below say what differs.

    The network answers with 8 channels: the noise, and a variance that the samplers in use have no need of and that is not trained.
    """

    facts: ClassVar[FamilyFacts]
    pipeline_class: ClassVar[str]  # of diffusers
    tokens: ClassVar[int]  # read of a caption unless --tokenizer_max_length says otherwise
    code: ClassVar[str]  # where the authors' is

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
        self.t5 = T5Source.open(self.base, "", options, width=network["caption_channels"])
        told = network.get("use_additional_conditions")
        self.told_sizes: bool = network["sample_size"] == SIZED if told is None else told

    def image_codec(self, device: torch.device) -> AbstractContextManager[ImageCodec]:
        return self.vae.codec(device)

    def text_encoders(self, device: torch.device) -> AbstractContextManager[TextEncoders]:
        from helpers.families.text.t5 import normalised_text

        return normalised_text(self.t5, self.length, with_mask=True, device=device)

    def caption_lengths(self) -> CaptionLengths:
        from helpers.families.text.t5 import NormalisedLengths

        return NormalisedLengths(self.t5, self.length)

    def unconditional(self, encoders: TextEncoders) -> TextTensors:
        """The empty caption, encoded like any other."""
        return {name: tensor[0] for name, tensor in encoders.encode([""]).items()}

    def load(self, dtype: torch.dtype | None) -> Parts:
        from diffusers import PixArtTransformer2DModel

        return Parts(self.base.load(PixArtTransformer2DModel, "transformer", dtype), "transformer")

    def conditioning(self, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        """Text with its mask and, to a network that is told sizes, those that its pipeline would tell for such a picture."""
        import torch

        conditioning = {
            "prompt_embeds": batch.text["prompt_embeds"].to(device, torch.float32),
            "prompt_embeds_mask": batch.text["prompt_embeds_mask"].to(device),
        }
        if self.told_sizes:
            targets = [cut.target for cut in batch.geometry]
            conditioning["resolution"] = torch.tensor([[target.height, target.width] for target in targets], dtype=torch.float32).to(device)
            conditioning["aspect_ratio"] = torch.tensor([[target.height / target.width] for target in targets]).to(device)
        return conditioning

    def predict(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        sizes = {name: conditioning[name] for name in ("resolution", "aspect_ratio")} if self.told_sizes else None
        answer: Tensor = denoiser(
            noisy,
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_attention_mask=conditioning["prompt_embeds_mask"],
            timestep=timesteps,
            added_cond_kwargs=sizes,
        ).sample
        return answer[:, : noisy.shape[1]]

    def pipeline(self, denoiser: nn.Module, sampler: Any) -> Any:
        import diffusers

        absent: Any = None  # from embeddings to latents: the caller encodes and decodes
        encoders = dict.fromkeys(("vae", "text_encoder", "tokenizer"), absent)
        return FromEmbeddings(getattr(diffusers, self.pipeline_class)(**encoders, transformer=denoiser, scheduler=sampler))

    def prompt_arguments(self, text: TextTensors, negative: TextTensors) -> dict[str, Any]:
        """Both are filled up to the longer one: the pipeline joins them."""
        from helpers.data.base.padding import stacked

        both = stacked([text, negative])
        embeds, mask = both["prompt_embeds"], both["prompt_embeds_mask"]
        return {
            "prompt_embeds": embeds[:1],
            "prompt_attention_mask": mask[:1],
            "negative_prompt_embeds": embeds[1:],
            "negative_prompt_attention_mask": mask[1:],
        }

    def kohya_name(self, module: str) -> str | None:
        return None

    def read_lora(self, path: Path) -> tuple[dict[str, Tensor], list[float]]:
        return peft_lora.read(path, "transformer")

    def modelspec(self, kind: str) -> dict[str, str]:
        edge = trained_edge(self.base, "transformer", self.latents.downsampling)
        return modelspec(self.base, f"{self.facts.name.replace('_', '-')}/{kind}", self.code, self.facts.name, edge)

    def export_pipeline(self, denoiser_folder: Path, scheduler_config: Mapping[str, Any], target: Path) -> None:
        parts: dict[str, Component] = {"transformer": denoiser_folder, "vae": self.vae.folder, **self.t5.parts}
        # Early copies of Alpha name the class that this one was split from.
        classes = {"transformer": ["diffusers", NETWORK], **self.t5.classes}
        write_pipeline(self.base, parts, scheduler_config, target, classes)


class FromEmbeddings:
    """A pipeline of PixArt that is called with embeddings, and makes pictures of just the size that is asked for."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    def set_progress_bar_config(self, **settings: Any) -> None:
        self.pipeline.set_progress_bar_config(**settings)

    def __call__(self, **arguments: Any) -> Any:
        # Left alone, the negative prompt is "", which contradicts embeddings; and sizes are rounded to those of the authors' buckets.
        return self.pipeline(negative_prompt=None, use_resolution_binning=False, **arguments)


class PixArtAlpha(PixArt):
    """The network for 1024 pixels is told height, width and aspect of the picture; those for less are not."""

    facts = FamilyFacts(
        name="pixart_alpha",
        title="PixArt Alpha",
        defaults=DEFAULTS,
        wrapper="./train_sdxl.sh",
        setting="PIXART_ALPHA='true'",
        pipelines=("PixArtAlphaPipeline",),
        miniatures=(Miniature("pixart_alpha", "helpers.families.miniatures.pixart:write_pixart_alpha"),),
        section=PixArtOptions,
        options=OPTIONS,
        judge=_judge,
    )
    pipeline_class = "PixArtAlphaPipeline"
    tokens = 120
    code = "https://github.com/PixArt-alpha/PixArt-alpha"


class PixArtSigma(PixArt):
    """Reads longer captions, has SDXL's VAE, and is not told sizes."""

    facts = FamilyFacts(
        name="pixart_sigma",
        title="PixArt Sigma",
        defaults=DEFAULTS,
        wrapper="./train_sdxl.sh",
        setting="PIXART_SIGMA='true'",
        pipelines=("PixArtSigmaPipeline",),
        miniatures=(Miniature("pixart_sigma", "helpers.families.miniatures.pixart:write_pixart_sigma"),),
        section=PixArtOptions,
        options=OPTIONS,
        judge=_judge,
    )
    pipeline_class = "PixArtSigmaPipeline"
    tokens = 300
    code = "https://github.com/PixArt-alpha/PixArt-sigma"
