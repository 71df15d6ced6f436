"""ControlNet (Zhang et al., 2023): a copy of the network's encoder learns to follow a second picture, and the network stays as it is."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.config.facts import Facts, Settings
from helpers.methods.full import FullFineTune, check
from helpers.protocols import Parts, Trainable, can_controlnet
from helpers.storage.atomic import atomic_folder, scratch_folder

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "controlnet"
LEARNING_RATE = 1e-5  # of the paper; the declared default is for networks that have learnt already what they are to do


def refusals(settings: Settings) -> Iterator[str]:
    """What cannot be trained or used together with a ControlNet."""
    if "lora" in str(settings["model_type"]):
        yield f"--controlnet trains a network of its own, and --model_type={settings['model_type']} an adapter; leave out one of them."
    if settings["freeze_unet_strategy"] == "bitfit":
        yield "--freeze_unet_strategy=bitfit trains biases of the network, which --controlnet leaves as they are; leave out one of them."
    if settings["validation_using_datasets"]:
        yield "--validation_using_datasets begins with pictures, and with --controlnet they follow pictures of the data anyway. Remove it."
    if settings["validation_torch_compile"]:
        yield "--validation_torch_compile is for one network, and with --controlnet pictures are made with two. Remove it."
    if settings["validation_guidance_rescale"]:
        yield "--validation_guidance_rescale is not for --controlnet: the pipelines with a ControlNet cannot rescale. Remove it."


class ControlNet(FullFineTune):
    """Trains the ControlNet in the precision of a full fine-tune, beside the network in that of frozen weights.

    Both are loaded in the former: the ControlNet begins as a copy, and the network is made smaller after.
    """

    facts = Facts(name="controlnet", title="ControlNet", defaults={"learning_rate": LEARNING_RATE}, judge=refusals)

    def attach(self, parts: Parts) -> Trainable:
        from torch import nn

        assert can_controlnet(self.family), "the settings refuse --controlnet for other families"
        both = self.family.controlnet(parts.denoiser)
        both.requires_grad_(False).train()
        nn.Module.to(both.denoiser, parts.frozen_dtype)  # diffusers' own `to` warns, of nothing
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
        """Write `controlnet/`, of the average if there is one, with the live weights beside it as `controlnet_live/`."""
        wanted = {"": average, **({"_live": None} if average is not None else {})}
        for label, weights in wanted.items():
            with scratch_folder(folder, "export") as aside, atomic_folder(folder / f"{FOLDER}{label}") as target:
                [written] = self.save(trainable, aside, weights)
                shutil.copytree(written, target, dirs_exist_ok=True)
                check(target, self.network(trainable), weights)
        return [folder / f"{FOLDER}{label}" for label in wanted]
