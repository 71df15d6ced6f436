"""FLUX.1 dev and schnell (Black Forest Labs, 2024)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.config.declare import option
from helpers.config.facts import FamilyFacts, Miniature, Settings, SingleFile
from helpers.data.ports import CaptionLengths, ImageCodec, TextEncoders, TextTensors
from helpers.errors import ConfigError
from helpers.families.loading.base_model import BaseModel
from helpers.families.lora import transformer_lora
from helpers.families.networks.export import modelspec, write_pipeline
from helpers.families.original.flux_names import flux_names
from helpers.families.original.transformer_names import kohya_transformer_name
from helpers.protocols import KohyaName, Parts

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from helpers.config.options import CacheOptions, ModelOptions
    from helpers.data.batches import Batch

PATCH = 2  # the network reads squares of 2 x 2 latent pixels as one token
T5 = "_2"  # suffix of its folders
DEV_TOKENS, SCHNELL_TOKENS = 512, 256  # that T5 reads of a caption, in the pipelines and in the training of the base models
TRAINED_GUIDANCE = 1.0  # --flux_guidance: the guidance scale under which a sample is its own target
SCHNELL_STEPS = 4  # of a sampler
EDGE = 1024  # pixels, of the images that the base models are described with


def _judge(settings: Settings) -> Iterable[str]:
    if settings["aspect_bucket_alignment"] == 8:
        yield "--aspect_bucket_alignment=8 cuts through the patches of FLUX.1, which are 16 pixels wide; use 64."
    if settings["validation_guidance_rescale"]:
        yield "--validation_guidance_rescale is not for FLUX.1: its pipeline cannot rescale. Remove it."
    length = settings["tokenizer_max_length"]
    if length is not None and length > DEV_TOKENS:  # type: ignore[operator]  # a number
        yield f"--tokenizer_max_length={length} is more than the {DEV_TOKENS} tokens that pipelines of FLUX.1 take; lower it."


@dataclass(frozen=True)
class FluxOptions:
    """FLUX.1: what only this family has."""

    flux: bool = option(False, "Same as --model_family=flux.", alias_of=("model_family", "flux"))
    flux_guidance: float | None = option(
        None,
        "Guidance scale that the network gets while it is trained. FLUX.1 dev only; --validation_guidance is the one of validation images.",
        at_least=0,
        default_text=f"{TRAINED_GUIDANCE:g}",
    )


class Flux:
    """A transformer on latents of 16 channels in packs of 2 x 2, conditioned on T5's states and CLIP's pooled output.

    The config of the transformer tells dev (`guidance_embeds`), which has an input for the guidance scale, from schnell, which has none.
    """

    facts = FamilyFacts(
        name="flux",
        title="FLUX.1",
        defaults={"aspect_bucket_alignment": 64, "validation_guidance": 3.5},
        wrapper="./train_flux.sh",
        pipelines=("FluxPipeline",),
        miniatures=(
            Miniature("flux", "helpers.families.miniatures.flux:write_dev", kohya=True, learns_in=50, learns_to=0.2),
            Miniature("flux_schnell", "helpers.families.miniatures.flux:write_schnell", kohya=True, learns_in=50, learns_to=0.2),
        ),
        section=FluxOptions,
        options=frozenset({"tokenizer_max_length", "pretrained_t5_model_name_or_path"}),
        objective="flow",
        judge=_judge,
        single_file=SingleFile(
            tensors=("double_blocks.0.img_attn.qkv.weight", "model.diffusion_model.double_blocks.0.img_attn.qkv.weight"),
            convert="helpers.families.original.flux_file:convert",
        ),
    )
    refines = False
    loads_lora = True
    lora_targets = transformer_lora.JOINT_ATTENTION

    def __init__(self, options: ModelOptions, cache: CacheOptions) -> None:
        from helpers.families.loading.vae import Vae
        from helpers.families.text.t5_source import T5Source

        self.base = BaseModel.open(self.facts, ("transformer", "vae", "text_encoder", "tokenizer", "scheduler"), options, cache)
        self.transformer = self.base.config("transformer")
        self.original_names = flux_names(self.transformer)
        self.vae = Vae.open(self.base, self.transformer["in_channels"] // PATCH**2, options, cache)
        self.name, self.identity = self.base.name, self.base.hash_of("transformer")
        self.latents = dataclasses.replace(self.vae.latents, patch=PATCH)
        self.scheduler_config = self.base.config("scheduler")
        self.t5 = T5Source.open(self.base, T5, options, width=self.transformer["joint_attention_dim"])
        self.t5_length = options.tokenizer_max_length or (DEV_TOKENS if self.is_dev else SCHNELL_TOKENS)
        self.guidance = self._guidance(options.section(FluxOptions).flux_guidance)

    @property
    def is_dev(self) -> bool:
        return bool(self.transformer["guidance_embeds"])

    @property
    def notes(self) -> Sequence[str]:
        if self.is_dev:
            return ()
        return (
            f"the base model is FLUX.1 schnell, made for {SCHNELL_STEPS} steps, which training takes away: train beside a training adapter "
            f"(--base_lora), or validate with --validation_num_inference_steps={SCHNELL_STEPS}",
        )

    def image_codec(self, device: torch.device) -> AbstractContextManager[ImageCodec]:
        return self.vae.codec(device)

    def text_encoders(self, device: torch.device) -> AbstractContextManager[TextEncoders]:
        from helpers.families.text.flux_text import text_encoders

        return text_encoders(self.base, self.t5, self.t5_length, device)

    def caption_lengths(self) -> CaptionLengths:
        """By T5's tokens: CLIP, which gives the pooled output alone, reads the first 77."""
        from helpers.families.text.t5 import T5CaptionLengths

        return T5CaptionLengths(self.t5, self.t5_length)

    def unconditional(self, encoders: TextEncoders) -> TextTensors:
        """The empty caption."""
        return {name: tensor[0] for name, tensor in encoders.encode([""]).items()}

    def load(self, dtype: torch.dtype | None) -> Parts:
        from diffusers import FluxTransformer2DModel

        return Parts(self.base.load(FluxTransformer2DModel, "transformer", dtype), "transformer")

    def conditioning(self, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        """Text in float32, and for dev the guidance scale of each sample (B,)."""
        text = {name: tensor.to(device).float() for name, tensor in batch.text.items()}
        return text if self.guidance is None else {**text, "guidance": text["pooled"].new_full((len(text["pooled"]),), self.guidance)}

    def predict(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        """The network gets the noise level in [0, 1], and multiplies it by 1000 itself."""
        from helpers.families.networks import packing

        height, width = noisy.shape[-2:]
        text = conditioning["prompt_embeds"]
        output = denoiser(
            hidden_states=packing.pack(noisy),
            timestep=timesteps / 1000,
            guidance=conditioning.get("guidance"),
            encoder_hidden_states=text,
            pooled_projections=conditioning["pooled"],
            txt_ids=text.new_zeros(text.shape[1], 3),
            img_ids=packing.positions(height // PATCH, width // PATCH, noisy.device),
        ).sample
        return packing.unpack(output, height, width)

    def pipeline(self, denoiser: nn.Module, sampler: Any) -> Any:
        from helpers.families.networks.packing import LatentFluxPipeline

        absent: Any = None  # from embeddings to latents: the caller encodes and decodes
        others = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"), absent)
        network: Any = denoiser
        return LatentFluxPipeline(**others, transformer=network, scheduler=sampler)

    def prompt_arguments(self, text: TextTensors, negative: TextTensors) -> dict[str, Any]:
        """Without the negative prompt: the network of dev gets the guidance scale itself, and schnell has no guidance."""
        return {"prompt_embeds": text["prompt_embeds"].unsqueeze(0), "pooled_prompt_embeds": text["pooled"].unsqueeze(0)}

    def kohya_name(self, module: str) -> KohyaName | None:
        return kohya_transformer_name(self.original_names, module)

    def read_lora(self, path: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
        from diffusers import FluxPipeline

        return transformer_lora.read_lora(FluxPipeline, path, self.original_names)

    def modelspec(self, kind: str) -> dict[str, str]:
        architecture = f"flux-1-{'dev' if self.is_dev else 'schnell'}/{kind}"
        return modelspec(self.base, architecture, "https://github.com/black-forest-labs/flux", "flux1", EDGE)

    def export_pipeline(self, denoiser_folder: Path, scheduler_config: Mapping[str, Any], target: Path) -> None:
        parts = {"transformer": denoiser_folder, "vae": self.vae.folder, **self.t5.parts}
        write_pipeline(self.base, parts, scheduler_config, target, self.t5.classes)

    def _guidance(self, asked: float | None) -> float | None:
        """The guidance scale of training; None for schnell. Raises ConfigError where it is set for schnell."""
        if self.is_dev:
            return TRAINED_GUIDANCE if asked is None else asked
        if asked is not None:
            raise ConfigError(
                f"--flux_guidance={asked:g}: {self.name} is FLUX.1 schnell, whose network has no input for guidance; remove it."
            )
        return None
