"""Frozen networks with a ControlNet beside them (Zhang et al., 2023, arXiv 2302.05543).

A ControlNet is a copy of the network's encoder that also sees a picture, the condition. What its layers give goes through convolutions
that begin as zeros, and is added to what the network's own layers give: before the first step the two together answer exactly as the
network alone. The copies are diffusers' own classes, so that its pipelines load what was trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from helpers.errors import ModelError
from helpers.families.loading import components, folder
from helpers.families.loading.vae import Vae, normalisation

if TYPE_CHECKING:
    from helpers.config.options import ModelOptions

OPTION = "--controlnet_model_name_or_path"
WIDTHS = (16, 32, 96)  # of the layers that make a picture small enough to be added to latents; each but the first halves its edges
LAST_WIDTH = 256
# Entries of a U-Net's config that its ControlNet must share.
OF_A_UNET = (
    "in_channels",
    "down_block_types",
    "block_out_channels",
    "layers_per_block",
    "transformer_layers_per_block",
    "mid_block_type",
    "attention_head_dim",
    "num_attention_heads",
    "cross_attention_dim",
    "use_linear_projection",
    "norm_num_groups",
    "addition_embed_type",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
)
OF_A_TRANSFORMER = (
    "in_channels",
    "patch_size",
    "attention_head_dim",
    "num_attention_heads",
    "joint_attention_dim",
    "caption_projection_dim",
    "pooled_projection_dim",
    "pos_embed_max_size",
    "qk_norm",
)


class ControlledUNet(nn.Module):
    """A U-Net and its ControlNet, asked as the U-Net alone is, with the condition beside the rest: pixels (B, 3, H, W) in [0, 1]."""

    argument = "image"  # by which the pipelines of diffusers take the condition

    def __init__(self, denoiser: Any, controlnet: Any) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.controlnet = controlnet
        self.unused: tuple[str, ...] = ()

    def forward(self, noisy: Tensor, timesteps: Tensor, *, condition: Tensor, **told: Any) -> Any:
        down, middle = self.controlnet(noisy, timesteps, controlnet_cond=self.prepared(condition), return_dict=False, **told)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return self.denoiser(noisy, timesteps, **residuals, **told)

    def prepared(self, condition: Tensor) -> Tensor:
        """A condition of a batch => as the ControlNet reads it."""
        return condition

    def enable_gradient_checkpointing(self) -> None:
        self.denoiser.enable_gradient_checkpointing()
        self.controlnet.enable_gradient_checkpointing()

    def set_attention_slice(self, size: str) -> None:
        self.denoiser.set_attention_slice(size)
        self.controlnet.set_attention_slice(size)


class ControlledTransformer(nn.Module):
    """The transformer of Stable Diffusion 3 and its ControlNet, whose condition is encoded by the VAE: latents (B, C, h, w).

    `shift` is the VAE's, times its scale. Where a ControlNet's config says `force_zeros_for_pooled_projection`, as those of InstantX do,
    it is told zeros for the pooled text, and latents from which that shift was not taken: so the pipeline does it too.
    """

    argument = "control_image"

    def __init__(self, denoiser: Any, controlnet: Any, shift: float) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.controlnet = controlnet
        self.tells_pooled = not controlnet.config.force_zeros_for_pooled_projection
        self.shift = 0.0 if self.tells_pooled else shift
        last = f"transformer_blocks.{len(controlnet.transformer_blocks) - 1}"
        # What the last block makes of the text is read by nothing, so these have no gradient.
        self.unused = (f"{last}.ff_context.", f"{last}.attn.to_add_out.")

    def forward(
        self, noisy: Tensor, *, condition: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor
    ) -> Any:
        told = {"timestep": timestep, "encoder_hidden_states": encoder_hidden_states}
        pooled = pooled_projections if self.tells_pooled else torch.zeros_like(pooled_projections)
        seen = {"controlnet_cond": self.prepared(condition), "pooled_projections": pooled}
        residuals = self.controlnet(noisy, return_dict=False, **seen, **told)[0]
        return self.denoiser(noisy, pooled_projections=pooled_projections, block_controlnet_hidden_states=residuals, **told)

    def prepared(self, condition: Tensor) -> Tensor:
        return condition + self.shift

    def enable_gradient_checkpointing(self) -> None:
        self.denoiser.enable_gradient_checkpointing()
        self.controlnet.enable_gradient_checkpointing()


class LatentsAsPixels:
    """Stands where a pipeline of Stable Diffusion 3 encodes the condition by its VAE, when it is handed latents already."""

    def __init__(self) -> None:
        from diffusers.configuration_utils import FrozenDict

        self.config = FrozenDict({"block_out_channels": (1,), "shift_factor": 0.0, "scaling_factor": 1.0})  # edges stay as they are

    def encode(self, latents: Tensor) -> Any:
        return SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda: latents))


def find_start(options: ModelOptions, kind: str, network: Mapping[str, Any], shared: tuple[str, ...]) -> Path | None:
    """The folder of the ControlNet to start from; None where none is named. Raises ModelError, with the reason, for one that does not fit.

    `kind` is its class in diffusers, `network` the config of the network it goes beside, whose entries `shared` it must have.
    """
    if not options.controlnet or not options.controlnet_model_name_or_path:
        return None
    found = folder.locate_component(OPTION, options.controlnet_model_name_or_path, "controlnet")
    if problem := components.component_problem(found, None, options.needs_weights):
        raise ModelError(f"{OPTION}: {problem}")
    config = folder.read_settings(found / "config.json")
    if (held := config.get("_class_name")) != kind:
        raise ModelError(f"{OPTION}: {found} holds a {held or 'model of no kind'}, and this base model needs a {kind}.")
    for name in shared:
        if name in config and name in network and _plain(config[name]) != _plain(network[name]):
            is_for = f"{name} is {_plain(config[name])} in it, and {_plain(network[name])} in the base model"
            raise ModelError(f"{OPTION}: {found} is for another base model: {is_for}. Choose one for this model, or leave it out.")
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


def controlled_unet(denoiser: Any, start: Path | None, downsampling: int) -> ControlledUNet:
    """A U-Net with a copy of its encoder, or with the ControlNet that it starts from; `downsampling` is that of its latents."""
    from diffusers import ControlNetModel

    if start is None:
        halvings = downsampling.bit_length() - 1
        widths = (*(*WIDTHS, *[LAST_WIDTH] * halvings)[:halvings], LAST_WIDTH)
        controlnet = ControlNetModel.from_unet(denoiser, conditioning_embedding_out_channels=widths)
    else:
        controlnet = _loaded(ControlNetModel, start, denoiser.dtype)
        if controlnet.config.conditioning_channels != 3 or controlnet.config.controlnet_conditioning_channel_order != "rgb":
            raise ModelError(f"{OPTION}: {start} does not read RGB pictures of three channels; choose one that does.")
    return ControlledUNet(denoiser, nn.Module.to(controlnet, denoiser.dtype))  # diffusers' own `to` warns, of nothing


def controlled_transformer(denoiser: Any, start: Path | None, vae: Vae) -> ControlledTransformer:
    """The transformer with a copy of the first half of its layers, or with the ControlNet that it starts from."""
    from diffusers import SD3ControlNetModel

    if start is None:
        # `from_transformer` writes into the config that it is given, which would be saved with the transformer.
        config = {**denoiser.config, "force_zeros_for_pooled_projection": False}
        parts = ("pos_embed", "time_text_embed", "context_embedder", "transformer_blocks")
        source: Any = SimpleNamespace(config=config, **{name: getattr(denoiser, name) for name in parts})
        layers = max(1, denoiser.config.num_layers // 2)
        controlnet = SD3ControlNetModel.from_transformer(source, num_layers=layers, num_extra_conditioning_channels=0)
    else:
        controlnet = _loaded(SD3ControlNetModel, start, denoiser.dtype)
        if controlnet.config.extra_conditioning_channels or controlnet.pos_embed is None or controlnet.context_embedder is None:
            raise ModelError(f"{OPTION}: {start} reads more than a picture, or no text; only plain ControlNets can be trained further.")
    (shift,), (scale,) = normalisation(vae.config)
    return ControlledTransformer(denoiser, nn.Module.to(controlnet, denoiser.dtype), shift * scale)


def _loaded(kind: Any, start: Path, dtype: torch.dtype) -> Any:
    """The ControlNet in a folder. Raises ModelError, naming the option, where the folder has not just its weights."""
    from safetensors import safe_open

    try:
        controlnet = components.load_component(kind, start, "", dtype, None)
    except ModelError as error:
        raise ModelError(f"{OPTION}: {error}") from error
    stored: set[str] = set()
    for path in start.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            stored |= set(file.keys())
    if foreign := stored - controlnet.state_dict().keys():
        raise ModelError(f"{OPTION}: the weights in {start} are not those of its config.json, such as {min(foreign)}.")
    return controlnet
