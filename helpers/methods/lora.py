"""LoRA by the PEFT library: LoRA (Hu et al., 2021), LoCon (LoRA on convolutions too) and DoRA (Liu et al., 2024).

Small matrices A and B are trained beside frozen layers: a layer computes W x + factor B A x. Usually B starts at 0, so that step 0 changes
nothing. Where B A starts at another value (PiSSA, OLoRA), a second, constant pair of matrices subtracts that start, so that step 0 changes
nothing either, and the base model keeps its weights. The exported LoRA holds both pairs, with twice the rank. LoftQ needs a second
pair in files only (helpers/methods/loftq.py).
"""

from __future__ import annotations

import json
import math
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.config.facts import Facts, Settings
from helpers.config.lora_layers import read_lora_layers
from helpers.config.suggest import did_you_mean
from helpers.data.base.progress import bar
from helpers.errors import ConfigError
from helpers.methods import loftq
from helpers.methods.layer_settings import LayerSettings, LayerTable, patterns
from helpers.methods.lora_init import FROM_WEIGHTS, INITIALIZATIONS, first_matrices, read_lora, require_same_layers
from helpers.methods.lora_layouts import kohya_metadata, split_name, to_kohya
from helpers.methods.peft_layout import write_adapter
from helpers.methods.text_encoders import name_in_files, projections
from helpers.protocols import LIVE, Parts, Trainable
from helpers.storage.atomic import atomic_folder, scratch_folder, write_file
from helpers.storage.tensors import save_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from helpers.config.options import AdapterOptions
    from helpers.protocols import ModelFamily, Reporter

ADAPTER = "default"  # PEFT's name of the trained pair of matrices
ORIGIN = "origin"  # and of the constant pair that subtracts the start
WEIGHTS_NAME = "pytorch_lora_weights"
TEXT_ENCODER = "text_encoder"  # prefix of the roles of text encoders, and of their weights' names
METADATA_KEY = "lora_adapter_metadata"  # where diffusers looks for rank and alpha
LARGEST_DIFFERENCE = 1e-5  # of the norm of a layer's change, where a reader applies the scale to the matrices
MATRICES = ("lora_A", "lora_B")
LEARNING_RATE = 1e-4  # the declared default is for full fine-tuning


def refusals(settings: Settings) -> Iterator[str]:
    """Settings that LoRA and DoRA cannot use."""
    kind, rank = settings["lora_init_type"], settings["lora_rank"]
    yield from refused_by_adapters(settings)
    if kind in (*FROM_WEIGHTS, loftq.NAME) and settings["use_dora"]:
        yield f"--lora_init_type={kind} changes the weights whose magnitudes --use_dora trains; leave out one of them."
    if kind in FROM_WEIGHTS and settings["lora_dropout"]:
        yield f"--lora_init_type={kind} starts with large matrices, which --lora_dropout would turn into noise; set --lora_dropout=0."
    if kind == loftq.NAME:
        yield from loftq.refusals(settings)
    if kind == "orthogonal" and isinstance(rank, int) and rank % 2:
        yield f"--lora_init_type=orthogonal needs an even rank; --lora_rank={rank} is odd."
    yield from _refused_layers(settings)
    if kind != "default" and settings["init_lora"]:
        yield f"--init_lora and --lora_init_type={kind} both set the initial matrices; leave out one of them."


def _refused_layers(settings: Settings) -> Iterator[str]:
    """What is wrong with the file of --lora_layers."""
    path = settings["lora_layers"]
    if not isinstance(path, Path):
        return
    try:
        rules = read_lora_layers(path)
    except ValueError as error:
        yield f"--lora_layers: {error}"
        return
    if settings["init_lora"] and (rule := next((rule for rule in rules if rule.rank or rule.alpha), None)):
        yield f"--lora_layers: {rule.pattern!r} sets rank or alpha, which --init_lora takes from its file; leave lr_scale alone in {path}."
    if settings["adafactor_relative_step"] and any(rule.lr_scale != 1 for rule in rules):
        yield "--adafactor_relative_step sets the learning rate itself, against lr_scale in --lora_layers; leave out one of them."


def refused_by_adapters(settings: Settings) -> Iterator[str]:
    """Settings that no kind of adapter can use."""
    if settings["freeze_unet_strategy"] == "bitfit":
        yield "--freeze_unet_strategy=bitfit trains the network's biases, and an adapter has none; use --model_type=full, or leave it out."
    targets = settings["lora_targets"]
    if isinstance(targets, tuple) and is_expression(targets):
        try:
            re.compile(targets[0])
        except re.error as error:
            yield f"--lora_targets={targets[0]} is not a valid regular expression ({error}); correct it, or list endings of module names."


class Lora:
    """Trains float32 LoRA matrices beside frozen weights, and writes them in the formats that other tools load."""

    facts = Facts(name="lora", title="LoRA", defaults={"learning_rate": LEARNING_RATE}, judge=refusals)

    def __init__(self, options: AdapterOptions, family: ModelFamily) -> None:
        self.options = options
        self.family = family
        self.initial = read_lora(options.init_lora, family) if options.init_lora else None
        self.layers = LayerTable(options, self.initial)

    def weights_dtype(self, mixed_precision: str, optimizer: str) -> torch.dtype:
        return frozen_dtype(mixed_precision)

    def default_optimizer(self, mixed_precision: str) -> str:
        return "adamw"  # the adapter's weights are float32 in every precision

    def check(self, outline: Parts) -> None:
        import torch

        with torch.device("meta"):
            self.attach(outline)

    def attach(self, parts: Parts) -> Trainable:
        from helpers.methods.quantized_base import count_weights

        networks = {"": parts.denoiser, **{f"{role}.": encoder for role, encoder in parts.text_encoders.items()}}
        total = sum(count_weights(network) for network in networks.values())
        parameters: dict[str, nn.Parameter] = {}
        fixed: dict[str, Tensor] = {}
        for prefix, network in networks.items():
            role = prefix.removesuffix(".")
            targets = self._text_targets(parts, role) if role else self._targets(network)
            trained, constant = self._adapt(network, role, targets, parts.report)
            parameters |= {prefix + name: parameter for name, parameter in trained.items()}
            fixed |= {prefix + name: tensor for name, tensor in constant.items()}
        if self.options.lora_init_type == loftq.NAME:
            loftq.initialize(parts.denoiser, self.family, ADAPTER, lambda layers: self._with_progress(layers, parts.report))
            fixed = loftq.subtracted(parameters, lambda name: name.replace(f".{ADAPTER}.", f".{ORIGIN}."))
        count = sum(parameter.numel() for parameter in parameters.values())
        trainable = Trainable(parts.denoiser, parameters, "", parts.denoiser_folder, fixed, parts.text_encoders)
        adapters = _adapters(trainable)
        ranks = _range(adapter.rank for adapter in adapters.values())
        trainable.description = f"{self._title()} rank {ranks}, {count / 1e6:,.2f} M of {total / 1e6:,.1f} M parameters"
        self.layers.require_use(adapters)
        trainable.lr_scales = self._lr_scales(trainable)
        self._set_initial_weights(trainable, {name: adapter.scale for name, adapter in adapters.items()})
        return trainable

    def _lr_scales(self, trainable: Trainable) -> dict[str, float]:
        """The factor on the learning rate of each weight, where it is not 1."""
        factors = {name: self.layers.of(split_name(_name_of(trainable, name))[0]).lr_scale for name in trainable.parameters}
        return {name: factor for name, factor in factors.items() if factor != 1.0}

    def _set_initial_weights(self, trainable: Trainable, scales: Mapping[str, float]) -> None:
        """Copy the weights of --init_lora, for the scale of each layer. Raises ConfigError where they do not fit."""
        if self.initial is None or self.options.init_lora is None:
            return
        # `check` attaches the network alone, and the file may hold weights of text encoders too.
        weights = self.initial.trained_at(scales)
        held = {name: tensor for name, tensor in weights.items() if trainable.text_encoders or not name.startswith(TEXT_ENCODER)}
        named = {_name_of(trainable, name): parameter for name, parameter in trainable.parameters.items()}
        require_same_layers(self.options.init_lora, held, named)
        for name, parameter in named.items():
            parameter.data.copy_(held[name].reshape(parameter.shape))

    def _adapt(self, network: Any, role: str, targets: list[str], report: Reporter) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
        """Add the adapter to the target layers of a network. => the trained weights, and the constant ones

        `role` is that of a text encoder, empty for the denoiser.
        """
        network.requires_grad_(False)
        settings = self._layer_settings(network, role, targets)
        self._inject(network, ADAPTER, targets, settings, self.options.lora_dropout)
        if self.options.lora_init_type in FROM_WEIGHTS:
            self._inject(network, ORIGIN, targets, settings, dropout=0.0)
            _use_both(network)
        network.train()
        parameters, fixed = self._adapter_parameters(network)
        if self.options.lora_init_type in INITIALIZATIONS:
            self._initialize_from_weights(network, report)
        return parameters, fixed

    def save(self, trainable: Trainable, folder: Path, weights: Mapping[str, Tensor] | None = None, label: str = "") -> list[Path]:
        """Write the diffusers file and beside it a kohya file, and a PEFT folder where diffusers cannot load LoRAs of the family.

        Each file is read back and compared; a difference raises RuntimeError.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tensors = self._adapter_tensors(trainable, weights or trainable.parameters)
        scales = {name: adapter.scale for name, adapter in _adapters(trainable).items()}
        metadata = {
            f"{role}.{key}": value
            for role, network in trainable.modules.items()
            for key, value in self._metadata(trainable, network).items()
        }
        path = folder / f"{WEIGHTS_NAME}{label}.safetensors"
        header = {"format": "pt", METADATA_KEY: json.dumps(metadata, indent=2, sort_keys=True)}
        save_tensors({_name_in_file(trainable, name): tensor for name, tensor in tensors.items()}, path, header)
        self._compare(path, tensors, scales)
        written = [path]
        if kohya := to_kohya(tensors, scales, self.family.kohya_name):
            written.append(folder / f"{WEIGHTS_NAME}{label}.kohya.safetensors")
            save_tensors(kohya, written[-1], self._kohya_metadata(tensors, scales))
            self._check_kohya(written[-1], tensors, scales, kohya)
        if not self.family.loads_lora:
            config = self._metadata(trainable, trainable.denoiser)
            written.append(write_adapter(folder / f"{WEIGHTS_NAME}{label}.peft", tensors, config, self.family.name))
        return written

    def read(self, trainable: Trainable, folder: Path, label: str = "") -> dict[str, Tensor]:
        from safetensors.torch import load_file

        stored = load_file(folder / f"{WEIGHTS_NAME}{label}.safetensors")
        weights: dict[str, Tensor] = {}
        for name in [*trainable.parameters, *trainable.fixed]:
            both = stored[_name_in_file(trainable, _name_of(trainable, name))]
            if trainable.fixed:
                along = 0 if ".lora_A." in name else 1
                rank = both.shape[along] // 2
                both = both.narrow(along, 0 if f".{ADAPTER}." in name else rank, rank).contiguous()
            weights[name] = both
        return weights

    def export(self, trainable: Trainable, folder: Path, schedule: Mapping[str, Any], average: Mapping[str, Tensor] | None) -> list[Path]:
        """Write the LoRA files. With an average they hold the average, and `..._live` files hold the live weights."""
        with scratch_folder(folder, "lora") as aside:
            files = self.save(trainable, aside, average)
            if average is not None:
                files += self.save(trainable, aside, label=LIVE)
            for file in files:
                _publish(file, folder / file.name)
        return [folder / file.name for file in files]

    def _title(self) -> str:
        kind = "LoCon" if self.options.lora_algorithm == "locon" else "LoRA"
        return f"DoRA ({kind})" if self.options.use_dora else kind

    def _targets(self, denoiser: nn.Module) -> list[str]:
        """Endings of module names, or one regular expression: from --lora_targets, else the layers of --init_lora, else the defaults."""
        if self.options.lora_targets:
            require_each_to_fit(self.options.lora_targets, denoiser)
            return list(self.options.lora_targets)
        if self.initial is None:
            return default_targets(self.options.lora_algorithm, self.family, denoiser)
        modules = sorted({split_name(name)[0] for name in self.initial.matrices if not name.startswith(TEXT_ENCODER)})
        if absent := [module for module in modules if module not in dict(denoiser.named_modules())]:
            raise ConfigError(
                f"--init_lora: {self.options.init_lora} has {len(absent)} layers that {self.family.facts.title} does not have, "
                f"such as {absent[0]}; use a LoRA of the same kind of model."
            )
        return modules

    def _text_targets(self, parts: Parts, role: str) -> list[str]:
        """The target modules of a text encoder: the defaults, or the layers of --init_lora. ConfigError where that has none of them."""
        if self.initial is None:
            return projections(parts, role, every_linear=self.options.lora_algorithm == "locon")
        held = {split_name(name)[0] for name in self.initial.matrices}
        chosen = [module for module in projections(parts, role, every_linear=True) if f"{role}.{name_in_files(module)}" in held]
        if not chosen:
            raise ConfigError(
                f"--init_lora: {self.options.init_lora} has no weights for the {role}; leave out --train_text_encoder, or use another file."
            )
        return chosen

    def _layer_settings(self, network: nn.Module, role: str, targets: list[str]) -> dict[str, LayerSettings]:
        """The settings of every module of a network that fits the targets, by the module's name in it."""
        modules = [name for name, module in network.named_modules() if fits(name, targets)]
        return {name: self.layers.of(f"{role}.{name_in_files(name)}" if role else name) for name in modules}

    def _inject(self, denoiser: Any, name: str, targets: list[str], settings: Mapping[str, LayerSettings], dropout: float) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        options = self.options
        config = LoraConfig(
            r=options.lora_rank,
            lora_alpha=options.lora_alpha,
            rank_pattern=patterns({layer: own.rank for layer, own in settings.items() if own.rank != options.lora_rank}),
            alpha_pattern=patterns({layer: own.alpha for layer, own in settings.items() if own.alpha != options.lora_alpha}),
            lora_dropout=dropout,
            init_lora_weights="gaussian" if options.lora_init_type == "gaussian" else True,
            target_modules=targets[0] if is_expression(targets) else targets,  # PEFT matches a string against the whole name
            use_rslora=options.use_rslora,
            use_dora=options.use_dora,
        )
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # the second pair
                inject_adapter_in_model(config, denoiser, name)  # works for every network; `add_adapter` of diffusers does not
        except ValueError as error:
            raise ConfigError(f"--lora_targets={','.join(targets)} matches no layer of this model: {error}") from error

    def _adapter_parameters(self, denoiser: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
        """The trained and the constant weights, both in float32: half precision would lose updates of 1e-6 to weights of 1e-2."""
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

    def _initialize_from_weights(self, denoiser: nn.Module, report: Reporter) -> None:
        from peft.tuners.lora import LoraLayer

        adapted = {name: layer for name, layer in denoiser.named_modules() if isinstance(layer, LoraLayer)}
        for name, layer in self._with_progress(adapted, report):
            weight = layer.get_base_layer().weight
            a, b = first_matrices(self.options.lora_init_type, name, weight, layer.r[ADAPTER], layer.scaling[ADAPTER])
            signs = {ADAPTER: 1, ORIGIN: -1} if self.options.lora_init_type in FROM_WEIGHTS else {ADAPTER: 1}
            for adapter, sign in signs.items():
                layer.lora_A[adapter].weight.data.copy_(a)
                layer.lora_B[adapter].weight.data.copy_(sign * b)

    def _with_progress(self, layers: Mapping[str, Any], report: Reporter) -> Iterator[tuple[str, Any]]:
        """Each layer, with a progress bar: initializing a large network takes minutes on a CPU."""
        with bar(report, f"{self.options.lora_init_type} initialization", len(layers), "layers") as advance:
            for name, layer in layers.items():
                yield name, layer
                advance(1)

    def _adapter_tensors(self, trainable: Trainable, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights for files, by their PEFT names. A constant pair is appended to the trained one, along the rank."""
        import torch

        tensors = {_name_of(trainable, name): weights[name].detach().float() for name in trainable.parameters}
        for name, constant in trainable.fixed.items():
            public = _name_of(trainable, name)
            tensors[public] = torch.cat((tensors[public], constant.detach().to(tensors[public].device)), 0 if ".lora_A." in name else 1)
        return tensors

    def _metadata(self, trainable: Trainable, network: Any) -> dict[str, object]:
        """PEFT's config for files: rank, alpha, targets. Without it diffusers assumes that alpha is the rank.

        Dropout is set to 0, since diffusers would apply it for users who load the file into a network in training mode. The initialization
        is set to the default, since PEFT would run it again when the file is loaded.
        """
        described = network.peft_config[ADAPTER].to_dict()
        if network is not trainable.denoiser:  # names without a level that only some versions of transformers have
            described["target_modules"] = {name.removeprefix("text_model.") for name in described["target_modules"]}
        described |= {"lora_dropout": 0.0, "inference_mode": True, "init_lora_weights": True}
        described |= self._ranks_in_files(network, 2 if trainable.fixed else 1)
        return {key: sorted(value) if isinstance(value, set) else value for key, value in described.items() if _plain(value)}

    def _ranks_in_files(self, network: Any, pairs: int) -> dict[str, object]:
        """PEFT's settings of rank and alpha for files. With two pairs of matrices a layer has twice the rank."""
        rank, rank_stabilized = self.options.lora_rank * pairs, self.options.use_rslora and pairs == 1
        layers = {name.removeprefix("text_model."): adapter for name, adapter in _adapters_of(network).items()}
        ranks = {name: adapter.rank * pairs for name, adapter in layers.items()}
        alphas = {name: adapter.scale * (math.sqrt(ranks[name]) if rank_stabilized else ranks[name]) for name, adapter in layers.items()}
        usual = self.factor * (math.sqrt(rank) if rank_stabilized else rank)
        alpha = self.options.lora_alpha if pairs == 1 else usual
        return {
            "r": rank,
            "lora_alpha": alpha,
            "use_rslora": rank_stabilized,
            "rank_pattern": patterns({name: own for name, own in ranks.items() if own != rank}),
            "alpha_pattern": patterns({name: own for name, own in alphas.items() if not math.isclose(own, alpha, rel_tol=1e-6)}),
        }

    @property
    def factor(self) -> float:
        """The scale of layers for which nothing else is set: alpha / rank, or alpha / sqrt(rank) for rsLoRA (Kalajdzievski, 2023)."""
        rank = self.options.lora_rank
        return self.options.lora_alpha / (math.sqrt(rank) if self.options.use_rslora else rank)

    def _check_kohya(self, path: Path, tensors: Mapping[str, Tensor], scales: Mapping[str, float], kohya: Mapping[str, Tensor]) -> None:
        """The same for the kohya file. diffusers ignores DoRA's magnitudes in it, so a DoRA file is compared tensor by tensor."""
        import torch
        from safetensors.torch import load_file

        if self.options.use_dora:
            stored = load_file(path)
            if stored.keys() != kohya.keys() or not all(torch.equal(stored[name], kohya[name].cpu()) for name in kohya):
                raise RuntimeError(f"{path} does not hold the trained weights.")
            return
        self._compare(path, tensors, scales)

    def _compare(self, path: Path, tensors: Mapping[str, Tensor], scales: Mapping[str, float]) -> None:
        """Raises RuntimeError unless a reader makes the trained change of every layer, scale x B A, within 1e-5 of its norm.

        Other tensors (DoRA's magnitudes) must be equal.
        """
        import torch

        found, found_scales = self.family.read_lora(path)
        wrong = []
        for module in sorted({split_name(name)[0] for name in (*tensors, *found)}):
            if _same(tensors, found, module) and math.isclose(scales[module], found_scales.get(module, 1.0), rel_tol=1e-6):
                continue
            ours, theirs = _change(tensors, module, scales), _change(found, module, found_scales)
            if (theirs - ours).norm() > LARGEST_DIFFERENCE * ours.norm():
                wrong.append(module)
        others = [name for name in tensors if "magnitude" in name]
        wrong += [name for name in others if name not in found or not torch.equal(found[name], tensors[name].cpu())]
        if wrong:
            raise RuntimeError(f"{path} does not hold the trained weights: {len(wrong)} layers differ ({', '.join(wrong[:3])}).")

    def _kohya_metadata(self, tensors: Mapping[str, Tensor], scales: Mapping[str, float]) -> dict[str, str]:
        ranks = {name: len(tensors[f"{name}.lora_A.weight"]) for name in scales}
        alphas = {round(scale * ranks[name], 6) for name, scale in scales.items()}
        rank = next(iter(ranks.values())) if len(set(ranks.values())) == 1 else None
        return {
            **kohya_metadata(rank, alphas.pop() if len(alphas) == 1 else None, self.options.lora_algorithm),
            **self.family.modelspec("lora"),
        }


@dataclass(frozen=True)
class Adapter:
    """A layer's LoRA as PEFT has it."""

    rank: int
    scale: float  # of B A


def _adapters_of(network: nn.Module) -> dict[str, Adapter]:
    """The adapted layers of a network, by their names in it."""
    from peft.tuners.lora import LoraLayer

    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, LoraLayer)}
    return {name: Adapter(layer.r[ADAPTER], layer.scaling[ADAPTER]) for name, layer in layers.items()}


def _adapters(trainable: Trainable) -> dict[str, Adapter]:
    """The adapted layers of all networks, by their public names (`_name_of`)."""
    found = _adapters_of(trainable.denoiser)
    for role, encoder in trainable.text_encoders.items():
        found |= {f"{role}.{name_in_files(name)}": adapter for name, adapter in _adapters_of(encoder).items()}
    return found


def _range(ranks: Iterable[int]) -> str:
    lowest, highest = min(numbers := sorted(ranks)), max(numbers)
    return f"{lowest}" if lowest == highest else f"{lowest} to {highest}"


def frozen_dtype(mixed_precision: str) -> torch.dtype:
    """The precision of a frozen base model."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision, torch.float32)


def default_targets(algorithm: str, family: ModelFamily, denoiser: nn.Module) -> list[str]:
    """The family's attention projections, or for LoCon every linear layer and convolution of the network."""
    from torch import nn

    if algorithm != "locon":
        return list(family.lora_targets)
    return [name for name, module in denoiser.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]


def is_expression(targets: Sequence[str]) -> bool:
    """Whether --lora_targets is one regular expression rather than a list of name endings."""
    return len(targets) == 1 and any(mark in targets[0] for mark in "*+?[(|^$\\")


def fits(name: str, targets: Sequence[str]) -> bool:
    """Whether PEFT takes a module for one of the targets."""
    if is_expression(targets):
        return re.fullmatch(targets[0], name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def require_each_to_fit(targets: Sequence[str], network: nn.Module) -> None:
    """Raises ConfigError for an ending that matches no module; PEFT only objects where none of the endings matches."""
    if is_expression(targets):
        return
    names = [name for name, _ in network.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            near = did_you_mean(target, {name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()})
            raise ConfigError(f"--lora_targets: no module name of this model ends with {target}{near}; correct it.")


def _same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], module: str) -> bool:
    """Whether both have the same A and B of a module, bit for bit."""
    import torch

    names = [f"{module}.{name}.weight" for name in MATRICES]
    return all(name in ours and name in theirs and torch.equal(ours[name].cpu(), theirs[name]) for name in names)


def _change(weights: Mapping[str, Tensor], module: str, scales: Mapping[str, float]) -> Tensor:
    """scale x B A of a module (linear layers have matrices, convolutions kernels), 0 without one."""
    import torch

    if f"{module}.lora_A.weight" not in weights:
        return torch.zeros(())
    down, up = (weights[f"{module}.{name}.weight"].float().cpu() for name in MATRICES)  # a GPU may round products to TF32
    return scales.get(module, 1.0) * (up.flatten(1) @ down.flatten(1))


def _public_name(parameter: str) -> str:
    """PEFT's name of a weight without the adapter's name: `to_q.lora_A.default.weight` => `to_q.lora_A.weight`.

    In files DoRA's magnitudes have no ending: `to_q.lora_magnitude_vector`.
    """
    module, ending = split_name(parameter)
    kind = ending.partition(".")[0]
    return f"{module}.{kind}" if kind == "lora_magnitude_vector" else f"{module}.{kind}.weight"


def _name_of(trainable: Trainable, parameter: str) -> str:
    """`_public_name` of a weight; for a text encoder with its role in front, and with the `text_model` level that files have.

    A text encoder's DoRA magnitudes end with `.weight` in files: transformers finds them only by that name.
    """
    public = _public_name(parameter)
    if not parameter.startswith(tuple(f"{role}." for role in trainable.text_encoders)):
        return public
    role, _, name = public.partition(".")
    return f"{role}.{name_in_files(name)}" + (".weight" if name.endswith("lora_magnitude_vector") else "")


def _name_in_file(trainable: Trainable, name: str) -> str:
    """In the diffusers file every name begins with a role."""
    return name if name.startswith(tuple(f"{role}." for role in trainable.text_encoders)) else f"{trainable.role}.{name}"


def _use_both(denoiser: nn.Module) -> None:
    """Let the trained and the constant pair of every layer add to its output."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in denoiser.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter([ADAPTER, ORIGIN])


def _publish(made: Path, target: Path) -> None:
    """Copy a file or a folder to its final place, atomically."""
    if made.is_file():
        return write_file(target, made.read_bytes())
    with atomic_folder(target) as aside:
        shutil.copytree(made, aside, dirs_exist_ok=True)


def _plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, list, set, dict))
