"""DeepFloyd IF (DeepFloyd Lab, 2023), stage I and II: a cascade on pixels, after Imagen (Saharia et al., 2022)."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from helpers.config.facts import FamilyFacts, Miniature, Settings
from helpers.data.ports import CaptionLengths, ImageCodec, LatentSpec, TextEncoders, TextTensors
from helpers.families.loading.base_model import BaseModel
from helpers.families.lora import unet_lora
from helpers.families.networks import img2img
from helpers.families.networks.export import modelspec, trained_edge, write_pipeline
from helpers.families.networks.recompute import recompute
from helpers.families.networks.unet import UNET_OPTIONS, load_unet
from helpers.protocols import Parts

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from helpers.config.options import CacheOptions, ModelOptions
    from helpers.data.batches import Batch

TOKENS = 77  # of a caption that T5 reads; fixed in diffusers' pipelines
PATCH = 8  # image sides are multiples of it: stage I halves them three times, and stage II starts from a quarter of them
EDGE = 64  # pixels: the edge of the images of stage I
QUARTER = 4  # the factor by which stage II enlarges an image
NOISE_LEVEL_OF_SAMPLING = 250  # of 1000: the noise that IFSuperResolutionPipeline adds to the smaller image by default
OF_BOTH: Settings = {"resolution_type": "pixel", "aspect_bucket_alignment": 8, "validation_noise_scheduler": "ddpm"}
OPTIONS = UNET_OPTIONS | {"pretrained_t5_model_name_or_path"}


def _model_types(full: str, lora: str, family: str) -> dict[str, dict[str, str]]:
    """The values of --model_type by which the June 2024 release chose a stage."""
    return {name: {"model_family": family, "model_type": kind} for name, kind in ((full, "full"), (lora, "lora"))}


def _judge(settings: Settings) -> Iterable[str]:
    if settings["latent_sampling"] == "sample":
        yield "--latent_sampling=sample samples from a VAE's distribution, and DeepFloyd, which is trained on pixels, has no VAE: use mean."
    for name, usual in (
        ("pretrained_vae_model_name_or_path", None),
        ("vae_dtype", "default"),
        ("vae_tiling", False),
        ("vae_slicing", False),
    ):
        if settings[name] != usual:
            yield f"--{name} is for a VAE, and DeepFloyd, which is trained on pixels, has none. Remove it."
    if settings["tokenizer_max_length"] not in (None, TOKENS):
        yield f"--tokenizer_max_length: DeepFloyd's pipelines always read {TOKENS} tokens. Remove it."
    if settings["validation_guidance_rescale"]:
        yield "--validation_guidance_rescale is not for DeepFloyd, whose pipelines cannot rescale guidance. Remove it."
    if settings["validation_noise_scheduler"] in ("euler", "euler-a"):
        yield (
            f"--validation_noise_scheduler={settings['validation_noise_scheduler']} cannot sample DeepFloyd: it also scales the smaller "
            "image that stage II enlarges, and does not clip pixels to their range. Use ddpm, ddim or unipc."
        )


class DeepFloyd:
    """A T5 text encoder, and a U-Net on pixels instead of latents. The subclasses state what differs between the stages.

    The network's output has 6 channels: the noise, and a variance between the bounds of its schedule (`learned_range`). The variance is not
    trained, and no longer fits after training. So validation and exported pipelines sample with the lower bound instead (`fixed_small`).
    The betas are those of the base model, a cosine schedule.
    """

    facts: ClassVar[FamilyFacts]
    pipeline_class: ClassVar[str]  # of diffusers
    parts: ClassVar[tuple[str, ...]] = ("unet", "scheduler")  # beside T5
    stage: ClassVar[str]
    refines: ClassVar[bool]
    notes = ()

    latents = LatentSpec(channels=3, downsampling=1, patch=PATCH)
    loads_lora = True
    lora_targets = (*unet_lora.ATTENTION, "add_k_proj", "add_v_proj")  # the last two read the text

    def __init__(self, options: ModelOptions, cache: CacheOptions) -> None:
        from helpers.families.text.t5_source import T5Source

        self.base = BaseModel.open(self.facts, self.parts, options, cache)
        self.t5 = T5Source.open(self.base, "", options, width=self.base.config("unet")["encoder_hid_dim"])
        self.name, self.identity = self.base.name, self.base.hash_of("unet")
        self.scheduler_config: Mapping[str, Any] = {**self.base.config("scheduler"), "variance_type": "fixed_small"}

    def image_codec(self, device: torch.device) -> AbstractContextManager[ImageCodec]:
        from helpers.families.loading.pixels import Pixels

        return nullcontext(Pixels())

    def text_encoders(self, device: torch.device) -> AbstractContextManager[TextEncoders]:
        """Without the mask, because the network also attends to padding."""
        from helpers.families.text.t5 import normalized_text

        return normalized_text(self.t5, TOKENS, with_mask=False, device=device)

    def caption_lengths(self) -> CaptionLengths:
        from helpers.families.text.t5 import NormalizedLengths

        return NormalizedLengths(self.t5, TOKENS)

    def unconditional(self, encoders: TextEncoders) -> TextTensors:
        """The empty caption, encoded like any other."""
        return {name: tensor[0] for name, tensor in encoders.encode([""]).items()}

    def load(self, dtype: torch.dtype | None) -> Parts:
        parts = load_unet(self.base, dtype)
        network = parts.denoiser  # diffusers' own checkpointing would keep all activations of attention in these blocks
        blocks = [*network.down_blocks, network.mid_block, *network.up_blocks]
        network.enable_gradient_checkpointing = functools.partial(recompute, blocks)
        return parts

    def conditioning(self, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        import torch

        return {"prompt_embeds": batch.text["prompt_embeds"].to(device, torch.float32)}

    def predict(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        output: Tensor = denoiser(noisy, timesteps, encoder_hidden_states=_as_weights(conditioning["prompt_embeds"], denoiser)).sample
        return output[:, : noisy.shape[1]]

    def pipeline(self, denoiser: nn.Module, sampler: Any) -> Any:
        return FromEmbeddings(self._pipeline(denoiser, self.pipeline_class, scheduler=sampler))

    def prompt_arguments(self, text: TextTensors, negative: TextTensors) -> dict[str, Any]:
        return {
            "prompt_embeds": text["prompt_embeds"].unsqueeze(0),
            "negative_prompt_embeds": negative["prompt_embeds"].unsqueeze(0),
        }

    def kohya_name(self, module: str) -> str | None:
        return None

    def read_lora(self, path: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
        import diffusers

        return unet_lora.read_lora(getattr(diffusers, self.pipeline_class), path, self.base.config("unet"))

    def modelspec(self, kind: str) -> dict[str, str]:
        edge = trained_edge(self.base, "unet", self.latents.downsampling)
        version = f"deepfloyd-if-{self.stage}"
        return modelspec(self.base, f"{version}/{kind}", "https://github.com/deep-floyd/IF", version, edge)

    def export_pipeline(self, denoiser_folder: Path, scheduler_config: Mapping[str, Any], target: Path) -> None:
        write_pipeline(self.base, {"unet": denoiser_folder, **self.t5.parts}, scheduler_config, target, self.t5.classes)

    def _pipeline(self, denoiser: nn.Module, kind: str, **schedulers: Any) -> Any:
        import diffusers

        absent: Any = None  # from embeddings to pixels
        others = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "watermarker"), absent)
        return getattr(diffusers, kind)(unet=denoiser, **others, **schedulers, requires_safety_checker=False)


class StageOne(DeepFloyd):
    """Images of 64 pixels from noise."""

    facts = FamilyFacts(
        name="deepfloyd_1",
        title="DeepFloyd IF stage I",
        wrapper="./train_sd2x.sh",
        setting="MODEL_TYPE='deepfloyd-lora' or 'deepfloyd-full'",
        pipelines=("IFPipeline",),
        miniatures=(Miniature("deepfloyd_1", "helpers.families.miniatures.deepfloyd:write_deepfloyd_1"),),
        defaults={
            **OF_BOTH,
            "resolution": float(EDGE),
            # The pipeline's defaults; those of stage II below likewise.
            "validation_guidance": 7.0,
            "validation_num_inference_steps": 100,
        },
        options=OPTIONS,
        model_types=_model_types("deepfloyd-full", "deepfloyd-lora", "deepfloyd_1"),
        img2img=True,
        edge=EDGE,
        judge=_judge,
    )
    pipeline_class = "IFPipeline"
    stage = "i"
    refines = False

    img2img_arguments = staticmethod(img2img.img2img_arguments)

    def img2img_pipeline(self, denoiser: nn.Module, sampler: Any) -> Any:
        return FromEmbeddings(self._pipeline(denoiser, "IFImg2ImgPipeline", scheduler=sampler))


class StageTwo(DeepFloyd):
    """Images of 256 pixels from images of 64 pixels.

    Besides the noisy image, the network gets the smaller image, enlarged and with noise of its own, and the level of that noise. This makes
    it tolerant of faults of stage I (Ho et al., 2021, cascaded diffusion models). In training, all levels of the schedule are equally
    likely, as in Imagen; sampling uses NOISE_LEVEL_OF_SAMPLING.
    """

    facts = FamilyFacts(
        name="deepfloyd_2",
        title="DeepFloyd IF stage II",
        wrapper="./train_sd2x.sh",
        setting="MODEL_TYPE='deepfloyd-stage2-lora' or 'deepfloyd-stage2'",
        pipelines=("IFSuperResolutionPipeline",),
        miniatures=(Miniature("deepfloyd_2", "helpers.families.miniatures.deepfloyd:write_deepfloyd_2"),),
        defaults={**OF_BOTH, "resolution": float(QUARTER * EDGE), "validation_guidance": 4.0, "validation_num_inference_steps": 50},
        options=OPTIONS,
        model_types=_model_types("deepfloyd-stage2", "deepfloyd-stage2-lora", "deepfloyd_2"),
        img2img=True,
        edge=QUARTER * EDGE,
        judge=_judge,
    )
    pipeline_class = "IFSuperResolutionPipeline"
    parts = (*DeepFloyd.parts, "image_noising_scheduler")
    stage = "ii"
    refines = True

    def __init__(self, options: ModelOptions, cache: CacheOptions) -> None:
        super().__init__(options, cache)
        self.identity = self.base.hash_of("unet", "image_noising_scheduler")

    def conditioning(self, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        """Text, the noisy smaller image enlarged to the size of the larger one, and the level of its noise, integers (B,)."""
        noising = self._image_noising()
        total = noising.config.num_train_timesteps
        levels = (batch.draws.strata("image_noise_level") * total).long().clamp(max=total - 1).to(device)
        pixels = batch.latents.to(device)
        noise = batch.draws.normal("image_noise", *pixels.shape[1:]).to(device)
        small = enlarged(quarter(pixels), pixels.shape[2], pixels.shape[3])
        return {
            **super().conditioning(batch, device),
            "image": noising.add_noise(small, noise, levels),
            "image_noise_level": levels,
        }

    def predict(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        import torch

        output: Tensor = denoiser(
            torch.cat((noisy, conditioning["image"]), dim=1),
            timesteps,
            encoder_hidden_states=_as_weights(conditioning["prompt_embeds"], denoiser),
            class_labels=conditioning["image_noise_level"],
        ).sample
        return output[:, : noisy.shape[1]]

    def pipeline(self, denoiser: nn.Module, sampler: Any) -> Any:
        schedulers = {"scheduler": sampler, "image_noising_scheduler": self._image_noising()}
        return FromEmbeddings(self._pipeline(denoiser, self.pipeline_class, **schedulers))

    img2img_pipeline = pipeline

    def img2img_arguments(self, latents: Tensor, steps: int, strength: float) -> dict[str, Any]:
        """The image at a quarter of its size, to be enlarged again. The larger image starts from pure noise, whatever `strength` is."""
        height, width = latents.shape[2:]
        level = {"noise_level": NOISE_LEVEL_OF_SAMPLING}
        return {"image": quarter(latents), "height": height, "width": width, "num_inference_steps": steps, **level}

    def _image_noising(self) -> Any:
        from diffusers import DDPMScheduler

        return DDPMScheduler.from_config(self.base.config("image_noising_scheduler"))


class FromEmbeddings:
    """A DeepFloyd pipeline that returns pixels (B, 3, H, W) in [-1, 1], where the pipelines of other families return latents."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    def set_progress_bar_config(self, **settings: Any) -> None:
        self.pipeline.set_progress_bar_config(**settings)

    def __call__(self, *, output_type: str, **arguments: Any) -> Any:
        return self.pipeline(output_type="pt", **arguments)


def _as_weights(text: Tensor, denoiser: nn.Module) -> Tensor:
    """Text in the precision of the network's weights. Its first layer is a layer norm, to which autocast on a CPU does not apply."""
    return text.to(next(denoiser.parameters()).dtype)


def quarter(pixels: Tensor) -> Tensor:
    """pixels (B, 3, H, W) in [-1, 1], edges multiples of 4 => (B, 3, H / 4, W / 4) in the same range; bicubic with antialiasing."""
    from torch.nn.functional import interpolate

    small = [side // QUARTER for side in pixels.shape[2:]]
    return interpolate(pixels, small, mode="bicubic", align_corners=False, antialias=True).clamp(-1, 1)


def enlarged(pixels: Tensor, height: int, width: int) -> Tensor:
    """pixels (B, 3, h, w) => (B, 3, height, width), as IFSuperResolutionPipeline enlarges its input."""
    from torch.nn.functional import interpolate

    return interpolate(pixels, (height, width), mode="bilinear", align_corners=True)
