"""Hunyuan-DiT (Li et al., 2024), versions 1.0, 1.1 and 1.2."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.config.declare import option
from helpers.config.facts import FamilyFacts, Miniature, Settings
from helpers.data.ports import CaptionLengths, ImageCodec, TextEncoders, TextTensors
from helpers.families.loading.base_model import BaseModel
from helpers.families.lora import peft_lora
from helpers.families.networks import sdxl_inputs
from helpers.families.networks.export import Component, modelspec, trained_edge, write_pipeline
from helpers.families.networks.recompute import recompute
from helpers.families.original.transformer_names import HUNYUAN_DIT, kohya_transformer_name, transformer_names
from helpers.protocols import KohyaName, Parts

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from helpers.config.options import CacheOptions, ModelOptions
    from helpers.data.batches import Batch

BERT = ("text_encoder", "tokenizer")
T5 = ("text_encoder_2", "tokenizer_2")
BASE_EDGE = 512  # pixels: position embeddings are scaled to a square of this edge, whatever the image's size
OLD_TOKENIZERS = {"MT5Tokenizer": "T5Tokenizer"}  # a class that transformers has removed => the one that reads the same files


def _judge(settings: Settings) -> Iterable[str]:
    if settings["aspect_bucket_alignment"] == 8:
        yield "--aspect_bucket_alignment=8 gives sizes that Hunyuan-DiT's 16-pixel patches do not divide; use 64."


@dataclass(frozen=True)
class HunyuanOptions:
    """Hunyuan-DiT: its switch."""

    hunyuan_dit: bool = option(False, "Same as --model_family=hunyuan_dit.", alias_of=("model_family", "hunyuan_dit"))


class HunyuanDiT:
    """BERT and mT5, and a transformer with long skip connections on latents of 4 channels with 1/8 of the image's width and height.

    Up to version 1.1 the network also has size and style conditioning, according to its config. The base model's schedule ends with
    beta 0.03 up to 1.1, and with 0.018 in 1.2. The output has 8 channels: the velocity and a variance. The variance is not trained,
    because our samplers do not use it.
    """

    facts = FamilyFacts(
        name="hunyuan_dit",
        title="Hunyuan-DiT",
        defaults={"aspect_bucket_alignment": 64},
        wrapper="./train_sdxl.sh",
        setting="HUNYUAN_DIT='true'",
        pipelines=("HunyuanDiTPipeline",),
        miniatures=(
            Miniature("hunyuan_dit", "helpers.families.miniatures.hunyuan_dit:write_hunyuan_dit", kohya=True),
            Miniature("hunyuan_dit_11", "helpers.families.miniatures.hunyuan_dit:write_hunyuan_dit_11", kohya=True, rate=0.5),
        ),
        section=HunyuanOptions,
        options=frozenset({"sdxl_original_size", "pretrained_t5_model_name_or_path"}),
        judge=_judge,
    )
    refines = False
    notes = ()
    loads_lora = False
    lora_targets = ("to_k", "to_q", "to_v", "to_out.0")

    def __init__(self, options: ModelOptions, cache: CacheOptions) -> None:
        from helpers.families.loading.vae import Vae
        from helpers.families.text.t5_source import T5Source

        self.base = BaseModel.open(self.facts, ("transformer", "vae", *BERT, "scheduler"), options, cache)
        self.vae = Vae.open(self.base, self.base.config("transformer")["in_channels"], options, cache)
        self.network = self.base.config("transformer")
        self.original_names = transformer_names(HUNYUAN_DIT, self.network)
        self.t5 = T5Source.open(self.base, "_2", options, width=self.network["cross_attention_dim_t5"])
        self.name, self.identity = self.base.name, self.base.hash_of("transformer")
        self.latents = dataclasses.replace(self.vae.latents, patch=self.network["patch_size"])
        self.scheduler_config = self.base.config("scheduler")
        self.size_conditioning: bool = self.network.get("use_style_cond_and_image_meta_size", True)
        self.original_size = options.section(sdxl_inputs.SDXLOptions).sdxl_original_size

    def image_codec(self, device: torch.device) -> AbstractContextManager[ImageCodec]:
        return self.vae.codec(device)

    @contextmanager
    def text_encoders(self, device: torch.device) -> Iterator[TextEncoders]:
        from helpers.families.loading.vae import released
        from helpers.families.text.hunyuan_text import HunyuanText

        text = HunyuanText(self.base, self.t5, self.network["text_len"], self.network["text_len_t5"], device)
        with released(text, device) as encoders:
            yield encoders

    def caption_lengths(self) -> CaptionLengths:
        """In tokens of mT5, which reads further than BERT."""
        from helpers.families.text.t5 import T5CaptionLengths

        return T5CaptionLengths(self.t5, self.network["text_len_t5"])

    def unconditional(self, encoders: TextEncoders) -> TextTensors:
        """The empty caption, encoded like any other."""
        return {name: tensor[0] for name, tensor in encoders.encode([""]).items()}

    def load(self, dtype: torch.dtype | None) -> Parts:
        from diffusers import HunyuanDiT2DModel

        denoiser = self.base.load(HunyuanDiT2DModel, "transformer", dtype)
        denoiser.enable_gradient_checkpointing = functools.partial(recompute, denoiser.blocks)  # the class has none
        return Parts(denoiser, "transformer")

    def conditioning(self, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        """Text with its masks. Up to version 1.1 also style 0 and `image_meta_size`, in the order of the authors' training:

        width and height of the image, width and height of its crop, left and top of the crop.
        """
        import torch

        from helpers.families.text.hunyuan_text import at_full_length

        text = {name: tensor.to(device) for name, tensor in batch.text.items()}
        floats = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in text.items()}
        conditioning = at_full_length(floats, self.network["text_len"])
        if self.size_conditioning:
            numbers = []
            for geometry in batch.geometry:
                height, width, top, left = sdxl_inputs.size_and_crop(geometry, self.original_size)
                numbers.append([width, height, geometry.target.width, geometry.target.height, left, top])
            conditioning["image_meta_size"] = torch.tensor(numbers, dtype=torch.float32, device=device)
            conditioning["style"] = torch.zeros(len(numbers), dtype=torch.long, device=device)
        return conditioning

    def predict(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        height, width = noisy.shape[2:]
        output: Tensor = denoiser(
            noisy,
            timesteps.to(noisy.dtype),  # the network computes its embeddings in the precision of the timesteps
            encoder_hidden_states=conditioning["prompt_embeds"],
            text_embedding_mask=conditioning["prompt_embeds_mask"],
            encoder_hidden_states_t5=conditioning["prompt_embeds_2"],
            text_embedding_mask_t5=conditioning["prompt_attention_mask_2"],
            image_meta_size=conditioning.get("image_meta_size"),
            style=conditioning.get("style"),
            image_rotary_emb=self._positions(height, width, noisy.device),
        ).sample
        return output[:, : noisy.shape[1]]

    def pipeline(self, denoiser: nn.Module, sampler: Any) -> Any:
        from diffusers import HunyuanDiTPipeline

        absent: Any = None  # from embeddings to latents: the caller encodes and decodes
        others = dict.fromkeys(("vae", *BERT, *T5, "safety_checker", "feature_extractor"), absent)
        return FromEmbeddings(HunyuanDiTPipeline(**others, transformer=denoiser, scheduler=sampler, requires_safety_checker=False))

    def prompt_arguments(self, text: TextTensors, negative: TextTensors) -> dict[str, Any]:
        from helpers.families.text.hunyuan_text import at_full_length

        arguments = {}
        for prefix, tensors in (("", text), ("negative_", negative)):
            full = at_full_length({name: tensor.unsqueeze(0) for name, tensor in tensors.items()}, self.network["text_len"])
            arguments[f"{prefix}prompt_embeds"] = full["prompt_embeds"]
            arguments[f"{prefix}prompt_attention_mask"] = full["prompt_embeds_mask"]
            arguments[f"{prefix}prompt_embeds_2"] = full["prompt_embeds_2"]
            arguments[f"{prefix}prompt_attention_mask_2"] = full["prompt_attention_mask_2"]
        return arguments

    def kohya_name(self, module: str) -> KohyaName | None:
        return kohya_transformer_name(self.original_names, module)

    def read_lora(self, path: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
        return peft_lora.read(path, self.original_names)

    def modelspec(self, kind: str) -> dict[str, str]:
        edge = trained_edge(self.base, "transformer", self.latents.downsampling)
        version = "1.1" if self.size_conditioning else "1.2"  # the files of 1.0 and 1.1 look the same
        implementation = "https://github.com/Tencent/HunyuanDiT"
        return modelspec(self.base, f"hunyuan-dit-v{version}/{kind}", implementation, f"hunyuan_dit_{version}", edge)

    def export_pipeline(self, denoiser_folder: Path, scheduler_config: Mapping[str, Any], target: Path) -> None:
        parts: dict[str, Component] = {"transformer": denoiser_folder, "vae": self.vae.folder, **self.t5.parts}
        write_pipeline(self.base, parts, scheduler_config, target, self.t5.classes or self._own_tokenizer())

    def _own_tokenizer(self) -> dict[str, list[str]]:
        library, kind = self.base.index["tokenizer_2"]
        return {"tokenizer_2": [library, OLD_TOKENIZERS.get(kind, kind)]}

    def _positions(self, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the rotary embedding for latents of this size, as diffusers' pipeline computes them."""
        from diffusers.models.embeddings import get_2d_rotary_pos_embed
        from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

        patch = self.latents.patch
        grid = (height // patch, width // patch)
        region = get_resize_crop_region_for_grid(grid, BASE_EDGE // self.latents.downsampling // patch)
        head = self.network["attention_head_dim"]
        cosines, sines = get_2d_rotary_pos_embed(head, region, grid, device=device, output_type="pt")
        return cosines, sines


class FromEmbeddings:
    """A Hunyuan-DiT pipeline that generates images of exactly the requested size, with size conditioning in the order of the training."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    def set_progress_bar_config(self, **settings: Any) -> None:
        self.pipeline.set_progress_bar_config(**settings)

    def __call__(self, *, width: int, height: int, **arguments: Any) -> Any:
        # By default the pipeline passes (height, width), and an original size of 1024 x 1024.
        sizes = {"original_size": (width, height), "target_size": (width, height)}
        return self.pipeline(width=width, height=height, use_resolution_binning=False, **sizes, **arguments)
