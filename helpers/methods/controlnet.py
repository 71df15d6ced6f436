"""ControlNet (Zhang et al., 2023): a copy of the network's encoder learns to follow a conditioning image; the network itself is frozen."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.config.facts import Facts, Settings
from helpers.methods.full import FullFineTune, check
from helpers.protocols import LIVE, Parts, Trainable, can_controlnet
from helpers.storage.atomic import atomic_folder, scratch_folder

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "controlnet"
LEARNING_RATE = 1e-5  # of the paper; the declared default suits fine-tuning


def refusals(settings: Settings) -> Iterator[str]:
    """Settings that cannot be used with a ControlNet."""
    if "lora" in str(settings["model_type"]):
        yield f"--controlnet trains a ControlNet, and --model_type={settings['model_type']} an adapter; leave out one of them."
    if settings["freeze_unet_strategy"] == "bitfit":
        yield "--freeze_unet_strategy=bitfit trains the network's biases, and --controlnet freezes the network; leave out one of them."
    if settings["export_single_file"]:
        yield "--export_single_file writes a fine-tuned model, and --controlnet leaves the model as it is. Remove it."
    if settings["validation_using_datasets"]:
        yield "--validation_using_datasets is not for --controlnet, whose validation uses images of the datasets anyway. Remove it."
    if settings["validation_torch_compile"]:
        yield "--validation_torch_compile cannot compile a network together with its ControlNet. Remove it, or --controlnet."
    if settings["validation_guidance_rescale"]:
        yield "--validation_guidance_rescale is not for --controlnet: ControlNet pipelines cannot rescale guidance. Remove it."


class ControlNet(FullFineTune):
    """Trains the ControlNet in the precision of a full fine-tune, with the frozen network in that of frozen weights.

    The network is loaded in the higher precision and converted after the ControlNet has copied its weights.
    """

    facts = Facts(name="controlnet", title="ControlNet", defaults={"learning_rate": LEARNING_RATE}, judge=refusals)

    def attach(self, parts: Parts) -> Trainable:
        from torch import nn

        assert can_controlnet(self.family), "the settings refuse --controlnet for other families"
        both = self.family.controlnet(parts.denoiser)
        both.requires_grad_(False)
        both.train()
        nn.Module.to(both.denoiser, parts.frozen_dtype)  # diffusers' own `to` prints a needless warning
        parameters = {
            name: parameter.requires_grad_(True)
            for name, parameter in both.controlnet.named_parameters()
            if not name.startswith(both.unused)
        }
        count, total = (sum(weights.numel() for weights in some) for some in (parameters.values(), both.parameters()))
        description = f"ControlNet, {count / 1e6:,.1f} M of {total / 1e6:,.1f} M parameters"
        return Trainable(both, parameters, description, FOLDER)

    def network(self, trainable: Trainable) -> Any:
        return trainable.denoiser.controlnet

    def export(self, trainable: Trainable, folder: Path, schedule: Mapping[str, Any], average: Mapping[str, Tensor] | None) -> list[Path]:
        """Write `controlnet/`. With an average it holds the average, and `controlnet_live/` holds the live weights."""
        wanted = {"": average, **({LIVE: None} if average is not None else {})}
        for label, weights in wanted.items():
            with scratch_folder(folder, "export") as aside, atomic_folder(folder / f"{FOLDER}{label}") as target:
                [written] = self.save(trainable, aside, weights)
                shutil.copytree(written, target, dirs_exist_ok=True)
                check(target, self.network(trainable), weights)
        return [folder / f"{FOLDER}{label}" for label in wanted]
