"""BitFit (Ben Zaken et al., 2022): of the denoiser's parameters only those whose name contains "bias" move."""

from __future__ import annotations

from collections.abc import Iterator

from helpers.config.facts import Facts, Settings
from helpers.errors import ConfigError
from helpers.methods.full import FullFineTune
from helpers.protocols import Parts, Trainable


def refusals(settings: Settings) -> Iterator[str]:
    if settings["train_text_encoder"]:
        yield "--train_text_encoder goes without --freeze_unet_strategy=bitfit, which trains biases of the network alone; remove one."


class BitFit(FullFineTune):
    """A full fine-tune in which the biases are all that moves; it is kept and handed over as one."""

    facts = Facts(name="bitfit", title="BitFit", judge=refusals)

    def default_optimizer(self, mixed_precision: str) -> str:
        return "adamw"  # on float32 weights: few numbers move, and in bfloat16 most of their updates would be lost

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
