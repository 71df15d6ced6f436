"""Low-rank adaptation by peft: LoRA (Hu et al., 2021), the same on convolutions (LoCon), and DoRA (Liu et al., 2024).

Small matrices A and B beside the frozen layers move: W x + factor B A x. Where they start from the base model's weights (PiSSA, OLoRA),
a second pair that stands still takes away what the first begins with, and the base model stays as it is. What is handed over is one LoRA of
both pairs, of twice the rank.

LoftQ starts with what a quantised base model lost: nearly W = Q + factor B A, where Q is the rounded W. The file is for W, so the second
pair takes away what the first began with there, and only there. What W gives with the file then differs from what was trained, Q with the
adapter, by W - Q - factor B A of the start, which LoftQ makes small; without the second pair it would differ by all of W - Q.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.config.facts import Facts, Settings
from helpers.config.suggest import did_you_mean
from helpers.data.base.progress import bar
from helpers.errors import ConfigError
from helpers.methods.lora_layouts import kohya_metadata, split_name, to_kohya
from helpers.methods.lora_start import (
    FROM_ROUNDING,
    FROM_WEIGHTS,
    STARTS,
    first_matrices,
    nearest_to_unrounded,
    read_start,
    require_same_layers,
)
from helpers.methods.peft_layout import write_adapter
from helpers.methods.text_encoders import name_in_files, projections
from helpers.protocols import Parts, Trainable
from helpers.storage.atomic import atomic_folder, scratch_folder, write_file
from helpers.storage.tensors import save_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from helpers.config.options import AdapterOptions
    from helpers.protocols import ModelFamily, Reporter

ADAPTER = "default"
ORIGIN = "origin"  # the pair that stands still
WEIGHTS_NAME = "pytorch_lora_weights"
TEXT_ENCODER = "text_encoder"  # how the roles of text encoders, and with them the names of their weights, begin
METADATA_KEY = "lora_adapter_metadata"  # where diffusers looks for rank and alpha
LEARNING_RATE = 1e-4  # the declared default is for whole networks


def refusals(settings: Settings) -> Iterator[str]:
    """What LoRA and DoRA cannot do together, or with other settings."""
    kind, rank = settings["lora_init_type"], settings["lora_rank"]
    yield from refused_by_adapters(settings)
    if kind in (*FROM_WEIGHTS, FROM_ROUNDING) and settings["use_dora"]:
        yield f"--lora_init_type={kind} moves the weights that DoRA takes the magnitude of; leave out one of it and --use_dora."
    if kind in FROM_WEIGHTS and settings["lora_dropout"]:
        yield f"--lora_init_type={kind} begins with a large B A, which --lora_dropout would turn into noise; set --lora_dropout=0."
    if kind == FROM_ROUNDING and settings["base_quantization"] == "none":
        yield (
            f"--lora_init_type={kind} starts from what a quantised base model lost, and this one is whole; "
            "set --base_quantization to int8, fp8 or nf4, or leave it out."
        )
    if kind == "orthogonal" and isinstance(rank, int) and rank % 2:
        yield f"--lora_init_type=orthogonal splits the rank in two halves; --lora_rank={rank} is odd."
    if kind != "default" and settings["init_lora"]:
        yield f"--init_lora and --lora_init_type={kind} both say what the matrices start from; leave out one of them."


def refused_by_adapters(settings: Settings) -> Iterator[str]:
    """What no kind of adapter can do."""
    if settings["freeze_unet_strategy"] == "bitfit":
        yield "--freeze_unet_strategy=bitfit trains biases of the network, and an adapter none; use --model_type=full, or leave it out."
    targets = settings["lora_targets"]
    if isinstance(targets, tuple) and is_expression(targets):
        try:
            re.compile(targets[0])
        except re.error as error:
            yield f"--lora_targets={targets[0]} is no regular expression ({error}); correct it, or name endings of modules' names."


class Lora:
    """Trains float32 adapter matrices beside frozen weights, and writes them in the layouts other tools load."""

    facts = Facts(name="lora", title="LoRA", defaults={"learning_rate": LEARNING_RATE}, judge=refusals)

    def __init__(self, options: AdapterOptions, family: ModelFamily) -> None:
        self.options = options
        self.family = family
        self.start = read_start(options.init_lora, family) if options.init_lora else None

    def weights_dtype(self, mixed_precision: str, optimizer: str) -> torch.dtype:
        return frozen_dtype(mixed_precision)

    def default_optimizer(self, mixed_precision: str) -> str:
        return "adamw"  # the adapter's weights are float32 in every precision

    def check(self, outline: Parts) -> None:
        import torch

        with torch.device("meta"):
            self.attach(outline)

    def attach(self, parts: Parts) -> Trainable:
        from helpers.methods.quantised_base import size_of

        networks = {"": parts.denoiser, **{f"{role}.": encoder for role, encoder in parts.text_encoders.items()}}
        total = sum(size_of(network) for network in networks.values())
        parameters: dict[str, nn.Parameter] = {}
        fixed: dict[str, Tensor] = {}
        for prefix, network in networks.items():
            role = prefix.removesuffix(".")
            targets = self._text_targets(parts, role) if role else self._targets(network)
            moving, still = self._adapt(network, targets, parts.report)
            parameters |= {prefix + name: parameter for name, parameter in moving.items()}
            fixed |= {prefix + name: tensor for name, tensor in still.items()}
        if self.options.lora_init_type == FROM_ROUNDING:
            self._start_from_rounding(parts)
            fixed = _taken_away(parameters)
        count = sum(parameter.numel() for parameter in parameters.values())
        description = f"{self._title()} rank {self.options.lora_rank}, {count / 1e6:,.2f} M of {total / 1e6:,.1f} M parameters"
        trainable = Trainable(parts.denoiser, parameters, description, parts.denoiser_folder, fixed, parts.text_encoders)
        self._go_on(trainable)
        return trainable

    def _go_on(self, trainable: Trainable) -> None:
        """Put in what the LoRA to start from holds. Raises ConfigError where it does not fit."""
        if self.start is None or self.options.init_lora is None:
            return
        # An outline of the network is tried alone, without the text encoders that the file may be for too.
        held = {name: tensor for name, tensor in self.start.items() if trainable.text_encoders or not name.startswith(TEXT_ENCODER)}
        named = {_name_of(trainable, name): parameter for name, parameter in trainable.parameters.items()}
        require_same_layers(self.options.init_lora, held, named)
        for name, parameter in named.items():
            parameter.data.copy_(held[name].reshape(parameter.shape))

    def _adapt(self, network: Any, targets: list[str], report: Reporter) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
        """Put the adapter beside some layers of a network. => what moves, and what stands still beside it."""
        network.requires_grad_(False)
        self._inject(network, ADAPTER, targets, self.options.lora_dropout)
        if self.options.lora_init_type in FROM_WEIGHTS:
            self._inject(network, ORIGIN, targets, dropout=0.0)
            _use_both(network)
        network.train()
        parameters, fixed = self._adapter_parameters(network)
        if self.options.lora_init_type in STARTS:
            self._start_from_weights(network, report)
        return parameters, fixed

    def save(self, trainable: Trainable, folder: Path, weights: Mapping[str, Tensor] | None = None, label: str = "") -> list[Path]:
        """Write diffusers' layout, beside it kohya's where the family has one, peft's where no pipeline loads it. All are read back."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = self._adapter_tensors(trainable, weights or trainable.parameters)
        metadata = {
            f"{role}.{key}": value
            for role, network in trainable.modules.items()
            for key, value in self._metadata(trainable, network).items()
        }
        path = folder / f"{WEIGHTS_NAME}{label}.safetensors"
        header = {"format": "pt", METADATA_KEY: json.dumps(metadata, indent=2, sort_keys=True)}
        save_tensors({_name_in_file(trainable, name): tensor for name, tensor in tensors.items()}, path, header)
        self._check(path, tensors)
        if kohya := to_kohya(tensors, self.factor, self.family.kohya_name):
            copy = folder / f"{WEIGHTS_NAME}{label}.kohya.safetensors"
            save_tensors(kohya, copy, self._kohya_metadata())
            self._check_kohya(copy, tensors, kohya)
            return [path, copy]
        if not self.family.loads_lora:
            config = self._metadata(trainable, trainable.denoiser)
            return [path, write_adapter(folder / f"{WEIGHTS_NAME}{label}.peft", tensors, config, self.family.name)]
        return [path]

    def read(self, trainable: Trainable, folder: Path, label: str = "") -> dict[str, Tensor]:
        """What moves, and what stands still beside it."""
        from safetensors.torch import load_file

        stored = load_file(folder / f"{WEIGHTS_NAME}{label}.safetensors")
        rank = self.options.lora_rank
        weights: dict[str, Tensor] = {}
        for name in [*trainable.parameters, *trainable.fixed]:
            both = stored[_name_in_file(trainable, _name_of(trainable, name))]
            if trainable.fixed:
                along = 0 if ".lora_A." in name else 1
                both = both.narrow(along, 0 if f".{ADAPTER}." in name else rank, rank).contiguous()
            weights[name] = both
        return weights

    def export(self, trainable: Trainable, folder: Path, schedule: Mapping[str, Any], average: Mapping[str, Tensor] | None) -> list[Path]:
        """Write the LoRA files, of the average if there is one, with the live weights beside them as `..._live`."""
        with scratch_folder(folder, "lora") as aside:
            files = self.save(trainable, aside, average)
            if average is not None:
                files += self.save(trainable, aside, label="_live")
            for file in files:
                _publish(file, folder / file.name)
        return [folder / file.name for file in files]

    @property
    def factor(self) -> float:
        """What B A is multiplied by: alpha / r, or alpha / sqrt(r) when it is rank-stabilised (Kalajdzievski, 2023)."""
        rank = self.options.lora_rank
        return self.options.lora_alpha / (math.sqrt(rank) if self.options.use_rslora else rank)

    @property
    def _rank_in_files(self) -> int:
        """Twice the rank where a second pair stands behind the first."""
        return self.options.lora_rank * (2 if self.options.lora_init_type in (*FROM_WEIGHTS, FROM_ROUNDING) else 1)

    def _title(self) -> str:
        kind = "LoCon" if self.options.lora_algorithm == "locon" else "LoRA"
        return f"DoRA ({kind})" if self.options.use_dora else kind

    def _targets(self, denoiser: nn.Module) -> list[str]:
        """Endings of module names, or one regular expression: the user's, else those of the LoRA to start from, else the method's."""
        if self.options.lora_targets:
            require_each_to_fit(self.options.lora_targets, denoiser)
            return list(self.options.lora_targets)
        if self.start is None:
            return default_targets(self.options.lora_algorithm, self.family, denoiser)
        modules = sorted({split_name(name)[0] for name in self.start if not name.startswith(TEXT_ENCODER)})
        if absent := [module for module in modules if module not in dict(denoiser.named_modules())]:
            raise ConfigError(
                f"--init_lora: {self.options.init_lora} has {len(absent)} layers that {self.family.facts.title} has not, "
                f"such as {absent[0]}; it is a LoRA of another kind of model."
            )
        return modules

    def _text_targets(self, parts: Parts, role: str) -> list[str]:
        """The modules of an encoder: the method's, or those of the LoRA to start from. ConfigError where that has none of them."""
        if self.start is None:
            return projections(parts, role, every_linear=self.options.lora_algorithm == "locon")
        held = {split_name(name)[0] for name in self.start}
        chosen = [module for module in projections(parts, role, every_linear=True) if f"{role}.{name_in_files(module)}" in held]
        if not chosen:
            raise ConfigError(
                f"--init_lora: {self.options.init_lora} has nothing for the {role}; leave out one of it and --train_text_encoder."
            )
        return chosen

    def _inject(self, denoiser: Any, name: str, targets: list[str], dropout: float) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(
            r=self.options.lora_rank,
            lora_alpha=self.options.lora_alpha,
            lora_dropout=dropout,
            init_lora_weights="gaussian" if self.options.lora_init_type == "gaussian" else True,
            target_modules=targets[0] if is_expression(targets) else targets,  # peft reads a string as one over the whole module name
            use_rslora=self.options.use_rslora,
            use_dora=self.options.use_dora,
        )
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # a second adapter is what is meant
                inject_adapter_in_model(config, denoiser, name)  # not every network of diffusers has its `add_adapter`
        except ValueError as error:
            raise ConfigError(f"--lora_targets={','.join(targets)} fits no layer of this model: {error}") from error

    def _adapter_parameters(self, denoiser: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
        """What moves and what stands still, both in float32: updates of 1e-6 to weights of 1e-2 are lost in half precision."""
        import torch

        parameters: dict[str, nn.Parameter] = {}
        fixed: dict[str, Tensor] = {}
        for name, parameter in denoiser.named_parameters():
            if not parameter.requires_grad:
                continue
            parameter.data = parameter.data.to(torch.float32)
            if f".{ORIGIN}." in name:
                fixed[name] = parameter.requires_grad_(False)
            else:
                parameters[name] = parameter
        return parameters, fixed

    def _start_from_weights(self, denoiser: nn.Module, report: Reporter) -> None:
        from peft.tuners.lora import LoraLayer

        adapted = {name: layer for name, layer in denoiser.named_modules() if isinstance(layer, LoraLayer)}
        for name, layer in self._shown(adapted, report):
            weight = layer.get_base_layer().weight
            a, b = first_matrices(self.options.lora_init_type, name, weight, self.options.lora_rank, self.factor)
            signs = {ADAPTER: 1, ORIGIN: -1} if self.options.lora_init_type in FROM_WEIGHTS else {ADAPTER: 1}
            for adapter, sign in signs.items():
                layer.lora_A[adapter].weight.data.copy_(a)
                layer.lora_B[adapter].weight.data.copy_(sign * b)

    def _start_from_rounding(self, parts: Parts) -> None:
        """Layers that are not rounded start as usual. Raises ConfigError where that is all of them."""
        from peft.tuners.lora import LoraLayer

        from helpers.methods.quantised_base import QuantisedLinear, layers_of_blocks

        rounded = {path.removesuffix(".base_layer") for path, _ in layers_of_blocks(parts.denoiser)}
        adapted = {name: layer for name, layer in parts.denoiser.named_modules() if isinstance(layer, LoraLayer) and name in rounded}
        if not adapted:
            raise ConfigError(
                f"--lora_init_type={FROM_ROUNDING} starts from what --base_quantization takes from the layers of the network's blocks, "
                "and --lora_targets has none of those; name others, or leave it out."
            )
        for name, layer in self._shown(adapted, parts.report):
            if isinstance(base := layer.get_base_layer(), QuantisedLinear):  # in an outline of the network it is not
                down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
                a, b = nearest_to_unrounded(base, parts.unrounded[name], down.detach(), self.factor)
                down.data.copy_(a)
                up.data.copy_(b)

    def _shown(self, layers: Mapping[str, Any], report: Reporter) -> Iterator[tuple[str, Any]]:
        """Each layer to put first matrices beside, under a bar: those of a large network are minutes of work on a CPU."""
        with bar(report, f"{self.options.lora_init_type} start", len(layers), "layers") as advance:
            for name, layer in layers.items():
                yield name, layer
                advance(1)

    def _adapter_tensors(self, trainable: Trainable, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By peft's names in files; the pair that stands still stands behind the one that moves."""
        import torch

        tensors = {_name_of(trainable, name): weights[name].detach().float() for name in trainable.parameters}
        for name, still in trainable.fixed.items():
            public = _name_of(trainable, name)
            tensors[public] = torch.cat((tensors[public], still.detach().to(tensors[public].device)), 0 if ".lora_A." in name else 1)
        return tensors

    def _metadata(self, trainable: Trainable, network: Any) -> dict[str, object]:
        """Rank, alpha and targets as peft describes them: without these a loader takes alpha to be the rank.

        Dropout is for training: diffusers would switch it on again for whoever loads the file, in networks left in training mode. So is
        how the matrices began: peft would begin again.
        """
        described = network.peft_config[ADAPTER].to_dict()
        if network is not trainable.denoiser:  # the endings of names that this transformers and older ones share
            described["target_modules"] = {name.removeprefix("text_model.") for name in described["target_modules"]}
        described |= {"lora_dropout": 0.0, "inference_mode": True, "init_lora_weights": True}
        if trainable.fixed:
            rank = self._rank_in_files
            described |= {"r": rank, "lora_alpha": self.factor * rank, "use_rslora": False}
        return {key: sorted(value) if isinstance(value, set) else value for key, value in described.items() if _plain(value)}

    def _check(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Raises RuntimeError unless diffusers reads from the diffusers layout just what was trained, scaled as it was."""
        rank = self._rank_in_files
        self._compare(path, tensors, self.options.lora_alpha if rank == self.options.lora_rank else rank * self.factor)

    def _check_kohya(self, path: Path, tensors: Mapping[str, Tensor], kohya: Mapping[str, Tensor]) -> None:
        """The same for the kohya layout. diffusers leaves DoRA's magnitudes out, so there the file itself is compared."""
        import torch
        from safetensors.torch import load_file

        if self.options.use_dora:
            stored = load_file(path)
            if stored.keys() != kohya.keys() or not all(torch.equal(stored[name], kohya[name].cpu()) for name in kohya):
                raise RuntimeError(f"{path} does not read back as it was trained.")
            return
        self._compare(path, tensors, self.factor * self._rank_in_files)

    def _compare(self, path: Path, tensors: Mapping[str, Tensor], alpha: float) -> None:
        import torch

        found, alphas = self.family.read_lora(path)
        wrong = [
            name
            for name in {**found, **tensors}
            if name not in found or name not in tensors or not torch.equal(found[name], tensors[name].cpu())
        ]
        if wrong or not all(math.isclose(value, alpha, rel_tol=1e-6) for value in alphas):
            raise RuntimeError(
                f"{path} does not read back as it was trained: {len(wrong)} of {len(tensors)} matrices differ "
                f"({', '.join(sorted(wrong)[:3])}), alpha is {sorted(set(alphas))} for {alpha:g}."
            )

    def _kohya_metadata(self) -> dict[str, str]:
        rank = self._rank_in_files
        return {**kohya_metadata(rank, self.factor * rank, self.options.lora_algorithm), **self.family.modelspec("lora")}


def frozen_dtype(mixed_precision: str) -> torch.dtype:
    """The precision of a base model whose weights stay as they are."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision, torch.float32)


def default_targets(algorithm: str, family: ModelFamily, denoiser: nn.Module) -> list[str]:
    """The family's attention projections; for LoCon every linear layer and convolution of the network."""
    from torch import nn

    if algorithm != "locon":
        return list(family.lora_targets)
    return [name for name, module in denoiser.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]


def is_expression(targets: Sequence[str]) -> bool:
    """Whether the targets are one regular expression rather than endings of names."""
    return len(targets) == 1 and any(mark in targets[0] for mark in "*+?[(|^$\\")


def require_each_to_fit(targets: Sequence[str], network: nn.Module) -> None:
    """ConfigError for the ending of no module's name: beside others that fit it would be left out in silence."""
    if is_expression(targets):
        return
    names = [name for name, _ in network.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            near = did_you_mean(target, {name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()})
            raise ConfigError(f"--lora_targets: {target} is not what the name of any module of this model ends with{near}; correct it.")


def _public_name(parameter: str) -> str:
    """peft's name of an adapter weight without the adapter's own name: `to_q.lora_A.default.weight` => `to_q.lora_A.weight`.

    The vector of magnitudes has no ending in files: `to_q.lora_magnitude_vector`.
    """
    module, ending = split_name(parameter)
    kind = ending.partition(".")[0]
    return f"{module}.{kind}" if kind == "lora_magnitude_vector" else f"{module}.{kind}.weight"


def _name_of(trainable: Trainable, parameter: str) -> str:
    """`_public_name`; a text encoder's begins with its role, and has the level that files have.

    Its vector of magnitudes ends with `.weight`: transformers, which loads it for diffusers, finds it by that alone.
    """
    public = _public_name(parameter)
    if not parameter.startswith(tuple(f"{role}." for role in trainable.text_encoders)):
        return public
    role, _, name = public.partition(".")
    return f"{role}.{name_in_files(name)}" + (".weight" if name.endswith("lora_magnitude_vector") else "")


def _name_in_file(trainable: Trainable, name: str) -> str:
    """In diffusers' layout every name begins with a role."""
    return name if name.startswith(tuple(f"{role}." for role in trainable.text_encoders)) else f"{trainable.role}.{name}"


def _taken_away(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """A second pair that undoes what the first is now. It is for files alone, and so no part of the network."""
    return {
        name.replace(f".{ADAPTER}.", f".{ORIGIN}."): (-1 if ".lora_B." in name else 1) * weights.detach()
        for name, weights in parameters.items()
    }


def _use_both(denoiser: nn.Module) -> None:
    """Both pairs of every layer add to its output."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in denoiser.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter([ADAPTER, ORIGIN])


def _publish(made: Path, target: Path) -> None:
    """Copy a file or a folder of files to where the user looks, whole or not at all."""
    if made.is_file():
        return write_file(target, made.read_bytes())
    with atomic_folder(target) as aside:
        shutil.copytree(made, aside, dirs_exist_ok=True)


def _plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, list, set, dict))
