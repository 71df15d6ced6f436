"""BitFit (Ben Zaken et al., 2022): only the parameters with "bias" in their names are trained."""

from __future__ import annotations

from collections.abc import Iterator

from helpers.config.facts import Facts, Settings
from helpers.errors import ConfigError
from helpers.methods.full import FullFineTune
from helpers.protocols import Parts, Trainable


def refusals(settings: Settings) -> Iterator[str]:
    if settings["train_text_encoder"]:
        yield "--freeze_unet_strategy=bitfit trains only biases of the network: it cannot be used with --train_text_encoder; remove one."


class BitFit(FullFineTune):
    """Full fine-tuning with everything but the biases frozen. Saved and exported like a full fine-tune."""

    facts = Facts(name="bitfit", title="BitFit", judge=refusals)

    def default_optimizer(self, mixed_precision: str) -> str:
        return "adamw"  # with float32 weights: the biases need little memory, and bfloat16 would lose most of their updates

    def check(self, outline: Parts) -> None:
        import torch

        with torch.device("meta"):
            self.attach(outline)

    def attach(self, parts: Parts) -> Trainable:
        """Raises ConfigError where the network has no bias."""
        parts.denoiser.requires_grad_(False).train()
        named = dict(parts.denoiser.named_parameters())
        parameters = {name: parameter.requires_grad_(True) for name, parameter in named.items() if "bias" in name}
        if not parameters:
            raise ConfigError("--freeze_unet_strategy=bitfit trains biases, and this network has none; choose --freeze_unet_strategy=none.")
        count, total = (sum(parameter.numel() for parameter in some.values()) for some in (parameters, named))
        description = f"BitFit, {count / 1e6:,.2f} M of {total / 1e6:,.1f} M parameters"
        return Trainable(parts.denoiser, parameters, description, parts.denoiser_folder)
