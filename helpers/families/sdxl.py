"""Stable Diffusion XL (Podell et al., 2023), the base model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.config.facts import Facts
from helpers.errors import ModelError
from helpers.protocols import CaptionLengths, ImageCodec, LatentSpec, Parts, TextEncoders, TextTensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from helpers.config.options import CacheOptions, DataOptions, ModelOptions
    from helpers.data.batches import Batch

COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
TEXT_COMPONENTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


class SDXL:
    """SDXL base: two CLIP encoders, size and crop conditioning, a U-Net on latents of 4 channels at an eighth of the pixels."""

    facts = Facts(name="sdxl", title="SDXL")
    lora_targets = ("to_k", "to_q", "to_v", "to_out.0")

    def __init__(self, options: ModelOptions, data: DataOptions, cache: CacheOptions) -> None:
        from helpers.families import folder

        self.options = options
        self.original_size = data.sdxl_original_size
        self.vae_dtype = cache.vae_dtype
        self.name = options.pretrained_model_name_or_path
        self.folder = folder.locate(self.name, options.revision, options.variant)
        kind = folder.model_index(self.folder).get("_class_name")
        if kind != "StableDiffusionXLPipeline":
            raise ModelError(f"The model in {self.folder} is a {kind}, not SDXL (StableDiffusionXLPipeline).")
        folder.require_components(self.folder, COMPONENTS)
        self.latent_deviations = cache.latent_sampling == "sample"
        self.scheduler_config = folder.read_json(self.folder / "scheduler" / "scheduler_config.json")
        self.unet_config = folder.read_json(self.folder / "unet" / "config.json")
        self.vae_folder = self._locate_vae()
        self.vae_config = folder.read_json(self.vae_folder / "config.json")
        self.hashes = folder.WeightsHashes(cache.cache_dir / "weights_hashes.json")
        self.identity = self.hashes.of(self.folder / "unet")
        downsampling = 2 ** (len(self.vae_config["block_out_channels"]) - 1)
        self.latents = LatentSpec(channels=self.vae_config["latent_channels"], downsampling=downsampling)

    # -- encoders: lazy, so that a warm start loads none of them --------------------------------------------------------

    @contextmanager
    def image_codec(self, device: torch.device) -> Iterator[ImageCodec]:
        from diffusers import AutoencoderKL

        from helpers.families import folder
        from helpers.families.vae import VaeCodec, released

        dtype = self._vae_dtype(device)
        facts = {"weights": self.hashes.of(self.vae_folder), "dtype": str(dtype), "deviations": self.latent_deviations}

        def load() -> Any:
            return folder.load_component(AutoencoderKL, self.vae_folder, "", dtype, self.options.variant)

        codec = VaeCodec(load, self.vae_config, folder.fingerprint(facts), device, self.latent_deviations)
        with released(codec, device):
            yield codec

    @contextmanager
    def text_encoders(self, device: torch.device) -> Iterator[TextEncoders]:
        from helpers.families.vae import released

        encoders = SdxlTextEncoders(self, device)
        with released(encoders, device):
            yield encoders

    def caption_lengths(self) -> CaptionLengths:
        from helpers.families.clip import ClipCaptionLengths

        folders = [self.folder / "tokenizer", self.folder / "tokenizer_2"]
        return ClipCaptionLengths(folders, self.hashes.of(*folders))

    def unconditional(self, encoders: TextEncoders) -> TextTensors:
        """Zeros: the pipeline does the same for an empty negative prompt (`force_zeros_for_empty_prompt`)."""
        import torch

        from helpers.families import folder

        widths = [folder.read_json(self.folder / name / "config.json") for name in ("text_encoder", "text_encoder_2")]
        states = torch.zeros(77, sum(width["hidden_size"] for width in widths))
        return {"prompt_embeds": states, "pooled": torch.zeros(widths[1]["projection_dim"])}

    # -- the network ----------------------------------------------------------------------------------------------------

    def load(self, dtype: torch.dtype) -> Parts:
        from diffusers import UNet2DConditionModel

        from helpers.families import folder

        return Parts(folder.load_component(UNet2DConditionModel, self.folder, "unet", dtype, self.options.variant), "unet")

    def conditioning(self, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        """Text states, pooled text, and the six size numbers of section 2.2 of the paper, in float32.

        The numbers stay float32 up to the sinusoid: in bfloat16 1157 becomes 1160, a different embedding.
        """
        import torch

        time_ids = []
        for geometry in batch.geometry:
            original = geometry.original if self.original_size == "file" else geometry.resized
            target = geometry.target
            time_ids.append([original.height, original.width, geometry.top, geometry.left, target.height, target.width])
        return {
            "prompt_embeds": batch.text["prompt_embeds"].to(device, torch.float32),
            "pooled": batch.text["pooled"].to(device, torch.float32),
            "time_ids": torch.tensor(time_ids, dtype=torch.float32, device=device),
        }

    def predict(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        added = {"text_embeds": conditioning["pooled"], "time_ids": conditioning["time_ids"]}
        return denoiser(noisy, timesteps, encoder_hidden_states=conditioning["prompt_embeds"], added_cond_kwargs=added).sample

    # -- pictures and files ---------------------------------------------------------------------------------------------

    def pipeline(self, denoiser: nn.Module, sampler: Any) -> Any:
        from diffusers import StableDiffusionXLPipeline

        absent: Any = None  # from embeddings to latents: the caller encodes and decodes
        encoders = dict.fromkeys(("vae", *TEXT_COMPONENTS), absent)
        return StableDiffusionXLPipeline(**encoders, unet=denoiser, scheduler=sampler, add_watermarker=False)

    def prompt_arguments(self, text: TextTensors, negative: TextTensors) -> dict[str, Any]:
        return {
            "prompt_embeds": text["prompt_embeds"].unsqueeze(0),
            "pooled_prompt_embeds": text["pooled"].unsqueeze(0),
            "negative_prompt_embeds": negative["prompt_embeds"].unsqueeze(0),
            "negative_pooled_prompt_embeds": negative["pooled"].unsqueeze(0),
        }

    def export_pipeline(self, denoiser_folder: Path, scheduler_config: Mapping[str, Any], target: Path) -> None:
        """A complete diffusers folder: the base model with this U-Net and this noise schedule, sampled as its `_class_name` does."""
        import diffusers

        from helpers.families import folder
        from helpers.families.tokenizer_files import complete_clip_tokenizer
        from helpers.storage.atomic import write_json

        for component in COMPONENTS:
            source = {"unet": denoiser_folder, "vae": self.vae_folder}.get(component, self.folder / component)
            shutil.copytree(source, target / component, ignore=shutil.ignore_patterns("*.bin", "*.msgpack", "*.onnx*"))
        for tokenizer in ("tokenizer", "tokenizer_2"):
            complete_clip_tokenizer(target / tokenizer)
        shutil.rmtree(target / "scheduler")
        kind = scheduler_config.get("_class_name", "EulerDiscreteScheduler")
        getattr(diffusers, kind).from_config(dict(scheduler_config)).save_pretrained(target / "scheduler")
        write_json(target / "model_index.json", {**folder.model_index(self.folder), "scheduler": ["diffusers", kind]})

    def kohya_name(self, module: str) -> str | None:
        from helpers.families.unet_names import original_name

        attention_levels = tuple("CrossAttn" in kind for kind in self.unet_config["up_block_types"])
        name = original_name(module, self.unet_config["layers_per_block"], attention_levels)
        return "lora_unet_" + name.replace(".", "_")

    def read_lora(self, path: Path) -> tuple[dict[str, Tensor], list[float]]:
        from diffusers import StableDiffusionXLPipeline
        from diffusers.configuration_utils import FrozenDict
        from diffusers.utils import convert_unet_state_dict_to_peft

        stored, alphas, metadata = StableDiffusionXLPipeline.lora_state_dict(
            path.parent, weight_name=path.name, unet_config=FrozenDict(self.unet_config), return_lora_metadata=True, local_files_only=True
        )
        matrices = convert_unet_state_dict_to_peft({name.removeprefix("unet."): matrix for name, matrix in stored.items()})
        found = list((alphas or {}).values()) or [metadata["unet.lora_alpha"]]
        return matrices, [float(alpha) for alpha in found]

    def modelspec(self, kind: str) -> dict[str, str]:
        return {
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": f"stable-diffusion-xl-v1-base/{kind}",
            "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
            "modelspec.title": Path(self.name).name,
            "modelspec.resolution": f"{self.unet_config.get('sample_size', 128) * self.latents.downsampling}x"
            f"{self.unet_config.get('sample_size', 128) * self.latents.downsampling}",
            "ss_base_model_version": "sdxl_base_v1-0",
        }

    # -- details --------------------------------------------------------------------------------------------------------

    def _locate_vae(self) -> Path:
        name = self.options.pretrained_vae_model_name_or_path
        if not name:
            return self.folder / "vae"
        vae = Path(name).expanduser()
        if vae.is_dir():
            return vae / "vae" if (vae / "vae").is_dir() else vae
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

        try:
            return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
            raise ModelError(f"--pretrained_vae_model_name_or_path: {name!r} is neither a folder here nor a model of the hub.") from error

    def _vae_dtype(self, device: torch.device) -> torch.dtype:
        import torch

        if self.vae_dtype == "fp16" and self.vae_config.get("force_upcast", True):
            raise ModelError(
                "--vae_dtype=fp16: this VAE overflows in fp16 and would give black images (its config says force_upcast); "
                "use bf16 or fp32, or a VAE made for fp16 with --pretrained_vae_model_name_or_path."
            )
        usual = torch.float32 if device.type == "cpu" else torch.bfloat16
        return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}.get(self.vae_dtype, usual)


class SdxlTextEncoders:
    """Captions => penultimate states of both encoders side by side, and the second one's pooled projection."""

    def __init__(self, family: SDXL, device: torch.device) -> None:
        import torch

        from helpers.families import folder

        self.family = family
        self.device = device
        self.dtype = torch.float32 if device.type == "cpu" else torch.float16
        weights = family.hashes.of(*(family.folder / name for name in TEXT_COMPONENTS))
        self.fingerprint = folder.fingerprint({"weights": weights, "dtype": str(self.dtype), "layer": "penultimate"})
        self.truncated = 0
        self._loaded: list[tuple[Any, Any]] = []

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """B captions => {"prompt_embeds": (B, 77, D1 + D2), "pooled": (B, P)}, float32 on the CPU."""
        import torch

        from helpers.families.clip import penultimate, tokenize

        states, pooled, longest = [], None, 0
        for tokenizer, encoder in self._encoders():
            ids, too_long = tokenize(tokenizer, captions)
            hidden, pooled = penultimate(encoder, ids)
            states.append(hidden)
            longest = max(longest, too_long)
        self.truncated += longest
        assert pooled is not None
        return {"prompt_embeds": torch.cat(states, dim=-1).float().cpu(), "pooled": pooled.float().cpu()}

    def unload(self) -> None:
        self._loaded.clear()

    def _encoders(self) -> list[tuple[Any, Any]]:
        if not self._loaded:
            from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

            from helpers.families import folder

            root, variant = self.family.folder, self.family.options.variant
            for suffix, kind in (("", CLIPTextModel), ("_2", CLIPTextModelWithProjection)):
                tokenizer = CLIPTokenizer.from_pretrained(root, subfolder=f"tokenizer{suffix}", local_files_only=True)
                encoder = folder.load_component(kind, root, f"text_encoder{suffix}", self.dtype, variant)
                self._loaded.append((tokenizer, encoder.to(self.device).eval().requires_grad_(False)))
        return self._loaded
