"""A frozen network with a ControlNet (Zhang et al., 2023, arXiv 2302.05543).

A ControlNet is a copy of the network's encoder with a conditioning image as an additional input. Its outputs pass through convolutions
that are initialized with zeros, and are added to the outputs of the network's own layers. So before the first step, the two together
predict exactly what the network alone predicts. The ControlNets are diffusers' own classes, so its pipelines load the result.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from helpers.errors import ModelError
from helpers.families.loading import components, folder
from helpers.families.loading.vae import Vae, normalization

if TYPE_CHECKING:
    from helpers.config.options import ModelOptions
    from helpers.families.loading.base_model import BaseModel

OPTION = "--controlnet_model_name_or_path"
WIDTHS = (16, 32, 96)  # channels of the layers that downsample the image to the size of latents; each but the first halves width and height
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
    """A U-Net and its ControlNet. Called like the U-Net, with one more argument, `condition`: pixels (B, 3, H, W) in [0, 1]."""

    argument = "image"  # of diffusers' pipelines, for the conditioning image

    def __init__(self, denoiser: Any, controlnet: Any) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.controlnet = controlnet
        self.unused: tuple[str, ...] = ()

    def forward(self, noisy: Tensor, timesteps: Tensor, *, condition: Tensor, **arguments: Any) -> Any:
        down, middle = self.controlnet(noisy, timesteps, controlnet_cond=self.prepared(condition), return_dict=False, **arguments)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return self.denoiser(noisy, timesteps, **residuals, **arguments)

    def prepared(self, condition: Tensor) -> Tensor:
        return condition

    def enable_gradient_checkpointing(self) -> None:
        self.denoiser.enable_gradient_checkpointing()
        self.controlnet.enable_gradient_checkpointing()

    def set_attention_slice(self, size: str) -> None:
        self.denoiser.set_attention_slice(size)
        self.controlnet.set_attention_slice(size)


class ControlledTransformer(nn.Module):
    """The transformer of Stable Diffusion 3 and its ControlNet, whose conditioning image is encoded by the VAE: latents (B, C, h, w).

    `shift` is the VAE's shift times its scale. If the ControlNet's config says `force_zeros_for_pooled_projection`, as those of InstantX
    do, it gets zeros for the pooled text, and latents without the shift subtracted, as in diffusers' pipeline.
    """

    argument = "control_image"

    def __init__(self, denoiser: Any, controlnet: Any, shift: float) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.controlnet = controlnet
        self.uses_pooled = not controlnet.config.force_zeros_for_pooled_projection
        self.shift = 0.0 if self.uses_pooled else shift
        last = f"transformer_blocks.{len(controlnet.transformer_blocks) - 1}"
        # Nothing reads the text output of the last block, so these weights get no gradient.
        self.unused = (f"{last}.ff_context.", f"{last}.attn.to_add_out.")

    def forward(
        self, noisy: Tensor, *, condition: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor
    ) -> Any:
        arguments = {"timestep": timestep, "encoder_hidden_states": encoder_hidden_states}
        pooled = pooled_projections if self.uses_pooled else torch.zeros_like(pooled_projections)
        own = {"controlnet_cond": self.prepared(condition), "pooled_projections": pooled}
        residuals = self.controlnet(noisy, return_dict=False, **own, **arguments)[0]
        return self.denoiser(noisy, pooled_projections=pooled_projections, block_controlnet_hidden_states=residuals, **arguments)

    def prepared(self, condition: Tensor) -> Tensor:
        return condition + self.shift

    def enable_gradient_checkpointing(self) -> None:
        self.denoiser.enable_gradient_checkpointing()
        self.controlnet.enable_gradient_checkpointing()


class LatentsAsPixels:
    """Takes the place of the VAE in a pipeline of Stable Diffusion 3 whose conditioning image is already encoded."""

    def __init__(self) -> None:
        from diffusers.configuration_utils import FrozenDict

        self.config = FrozenDict({"block_out_channels": (1,), "shift_factor": 0.0, "scaling_factor": 1.0})  # no downsampling

    def encode(self, latents: Tensor) -> Any:
        return SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda: latents))


def find_start(base: BaseModel, options: ModelOptions, kind: str, component: str, shared: tuple[str, ...]) -> Path | None:
    """The folder of the ControlNet to start from, or None if the user named none. Raises ModelError if it does not fit the base model.

    `kind` is its class in diffusers. Its config must have the same `shared` entries as that of `component`, the base model's network.
    """
    if not options.controlnet or not options.controlnet_model_name_or_path:
        return None
    found = folder.locate_component(OPTION, options.controlnet_model_name_or_path, "controlnet")
    if problem := components.component_problem(found, None, options.needs_weights):
        raise ModelError(f"{OPTION}: {problem}")
    if options.needs_weights:
        base.require_finite(found)
    config, network = folder.read_settings(found / "config.json"), base.config(component)
    if (held := config.get("_class_name")) != kind:
        raise ModelError(f"{OPTION}: {found} contains {held or 'a model of unknown class'}, but this base model needs a {kind}.")
    for name in shared:
        if name in config and name in network and _plain(config[name]) != _plain(network[name]):
            differs = f"its {name} is {_plain(config[name])}, and the base model's is {_plain(network[name])}"
            raise ModelError(f"{OPTION}: {found} is for another base model: {differs}. Choose one for this model, or remove the option.")
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


def controlled_unet(denoiser: Any, start: Path | None, downsampling: int) -> ControlledUNet:
    """A U-Net with a copy of its encoder, or with the ControlNet in the folder `start`. `downsampling` is that of the latents."""
    from diffusers import ControlNetModel

    if start is None:
        halvings = downsampling.bit_length() - 1
        widths = (*(*WIDTHS, *[LAST_WIDTH] * halvings)[:halvings], LAST_WIDTH)
        controlnet = ControlNetModel.from_unet(denoiser, conditioning_embedding_out_channels=widths)
    else:
        controlnet = _loaded(ControlNetModel, start, denoiser.dtype)
        if controlnet.config.conditioning_channels != 3 or controlnet.config.controlnet_conditioning_channel_order != "rgb":
            raise ModelError(f"{OPTION}: {start} does not read RGB images of three channels. Choose one that does.")
    return ControlledUNet(denoiser, nn.Module.to(controlnet, denoiser.dtype))  # the `to` of diffusers prints a warning


def controlled_transformer(denoiser: Any, start: Path | None, vae: Vae) -> ControlledTransformer:
    """The transformer with a copy of the first half of its layers, or with the ControlNet in the folder `start`."""
    from diffusers import SD3ControlNetModel

    if start is None:
        # `from_transformer` changes the config that it gets, which would be saved with the transformer.
        config = {**denoiser.config, "force_zeros_for_pooled_projection": False}
        parts = ("pos_embed", "time_text_embed", "context_embedder", "transformer_blocks")
        source: Any = SimpleNamespace(config=config, **{name: getattr(denoiser, name) for name in parts})
        layers = max(1, denoiser.config.num_layers // 2)
        controlnet = SD3ControlNetModel.from_transformer(source, num_layers=layers, num_extra_conditioning_channels=0)
    else:
        controlnet = _loaded(SD3ControlNetModel, start, denoiser.dtype)
        if controlnet.config.extra_conditioning_channels or controlnet.pos_embed is None or controlnet.context_embedder is None:
            raise ModelError(f"{OPTION}: {start} needs other inputs than an image and a caption. Only plain ControlNets can be trained.")
    (shift,), (scale,) = normalization(vae.config)
    return ControlledTransformer(denoiser, nn.Module.to(controlnet, denoiser.dtype), shift * scale)


def _loaded(kind: Any, start: Path, dtype: torch.dtype) -> Any:
    """The ControlNet in a folder. Raises ModelError if its weights are not those of its config."""
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
        raise ModelError(f"{OPTION}: the weights in {start} do not match its config.json: {min(foreign)} is not part of that network.")
    return controlnet
