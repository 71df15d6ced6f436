"""The architecture on one page: a run = family x method x objective, over data (helpers/data/ports.py), watched by reporters.

Family, method and objective are protocols. Each choice is one file and one line in the registry of its package (`families/__init__.py`);
nothing outside `families/sdxl.py` knows that SDXL exists. What only some families can do is a protocol of its own, with a function that
asks for it: `can_img2img(family)`. mypy compares every choice with its protocols in tests/test_conformance.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

from helpers.config.facts import Facts, FamilyFacts
from helpers.data.ports import ConditionEncoder, ModelEncoders, TextTensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from helpers.config.options import AdapterOptions, CacheOptions, ModelOptions, ObjectiveOptions
    from helpers.data.base.draws import StepDraws
    from helpers.data.batches import Batch
    from helpers.data.report.survey import Survey


@dataclass
class Parts:
    """The loaded modules that a method may train. A role is a module's folder name in a diffusers pipeline: "unet", "text_encoder"."""

    denoiser: Any  # nn.Module with diffusers' ModelMixin
    denoiser_folder: str  # the denoiser's role: "unet" or "transformer"
    text_encoders: dict[str, Any] = field(default_factory=dict)  # by role; empty where no text encoder is trained
    text_weights: frozenset[str] = frozenset()  # parameters of text encoders to train: "text_encoder.encoder.layers.0...."
    frozen_dtype: torch.dtype | None = None  # for a frozen network beside a trained one (ControlNet); None: as it was loaded
    report: Reporter = field(default_factory=lambda: Reporter())  # shows the progress of long work on the weights


@dataclass
class Trainable:
    """The trained weights, and the networks that they are part of."""

    denoiser: Any  # nn.Module with diffusers' ModelMixin, as `attach` left it, or a `ControlledDenoiser`
    parameters: dict[str, nn.Parameter]  # the trained weights, by their names in checkpoints
    description: str  # "LoRA rank 16, 23.2 M of 2,567.5 M parameters"
    role: str  # of the denoiser or ControlNet: "unet", "transformer" or "controlnet"
    fixed: dict[str, Tensor] = field(default_factory=dict)  # constant tensors that checkpoints and files need beside the trained weights
    text_encoders: dict[str, Any] = field(default_factory=dict)  # trained ones, by role; their parameters' names begin with the role
    lr_scales: Mapping[str, float] = field(default_factory=dict)  # factors on the learning rate, by parameter; 1 where there is none

    @property
    def modules(self) -> dict[str, Any]:
        """Every network with trained weights, by role."""
        return {self.role: self.denoiser, **self.text_encoders}

    def weights_of(self, role: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The given weights that belong to one network, by the network's own names."""
        if role in self.text_encoders:
            return {name.removeprefix(f"{role}."): tensor for name, tensor in weights.items() if name.startswith(f"{role}.")}
        others = tuple(f"{other}." for other in self.text_encoders)
        return {name: tensor for name, tensor in weights.items() if not name.startswith(others)}

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Copy weights into all trained weights, and into the constant ones that are given; in place, in their own dtype."""
        for name, parameter in self.parameters.items():
            parameter.data.copy_(weights[name])
        for name in self.fixed.keys() & weights.keys():
            self.fixed[name].data.copy_(weights[name])


class ModelFamily(ModelEncoders, Protocol):
    """A kind of network: how to load it, what it reads, and how it is saved.

    One file a family; importing it imports no torch. A training step with a family and an objective:

        family = FAMILIES["sdxl"](model_options, cache_options)
        denoiser = family.load(torch.float32).denoiser
        corrupted = objective.corrupt(batch.latents, batch.draws)
        output = family.predict(denoiser, corrupted.noisy, corrupted.timesteps, family.conditioning(batch, device))
        loss = objective.loss(output, corrupted, batch.mask).mean()

    tests/families/toy.py is a complete family of one convolution.
    """

    @property
    def facts(self) -> FamilyFacts: ...

    @property
    def name(self) -> str:
        """Model folder or hub name, for messages and model cards."""
        ...

    @property
    def identity(self) -> str:
        """A hash of the denoiser's weights. A run resumes only with the base model it was started with."""
        ...

    @property
    def refines(self) -> bool:
        """True where the network only improves images (img2img) and cannot make one from noise: SDXL's refiner, DeepFloyd stage II."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What a run should print at its start about this base model."""
        ...

    @property
    def loads_lora(self) -> bool:
        """True where the family's diffusers pipeline can load LoRA files."""
        ...

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Endings of module names that get an adapter, unless the user names others."""
        ...

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """The base model's own noise schedule, by diffusers' names."""
        ...

    def load(self, dtype: torch.dtype | None) -> Parts:
        """The network in this precision, on the CPU. With None its layers without weights (meta device)."""
        ...

    def conditioning(self, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        """All inputs of the network except noisy latents and timesteps, each tensor (B, ...), on the device."""
        ...

    def predict(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        """noisy (B, C, h, w), timesteps (B,) in the network's units => the network's output (B, C, h, w)."""
        ...

    def pipeline(self, denoiser: nn.Module, sampler: Any) -> Any:
        """A diffusers pipeline without text encoders and VAE: prompt embeddings to latents (B, C, h, w).

        Takes `prompt_arguments`, and where the family `refines` also `img2img_arguments`.
        """
        ...

    def prompt_arguments(self, text: TextTensors, negative: TextTensors) -> dict[str, Any]:
        """Call arguments of the pipeline for one prompt, each with a batch dimension of 1."""
        ...

    def kohya_name(self, module: str) -> KohyaName | None:
        """The name of a denoiser module in kohya's LoRA format; None where that format has no name for it."""
        ...

    def read_lora(self, path: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
        """A LoRA file as other tools read it: matrices by their PEFT names, and the scale of each layer by its module's name.

        The reader adds scale x B A to the layer's weight. A layer that is not in the mapping has the scale 1: diffusers multiplies the
        matrices of some files by their scale.
        """
        ...

    def modelspec(self, kind: str) -> dict[str, str]:
        """`modelspec.*` metadata (Stability AI's model specification 1.0.0) for a file of this kind ("lora")."""
        ...

    def export_pipeline(self, denoiser_folder: Path, scheduler_config: Mapping[str, Any], target: Path) -> None:
        """Write a complete diffusers folder, with the denoiser from `denoiser_folder`, that other tools load."""
        ...


class Img2ImgFamily(ModelFamily, Protocol):
    """A family with a pipeline that starts from an image."""

    def img2img_pipeline(self, denoiser: nn.Module, sampler: Any) -> Any:
        """As `pipeline`. Takes `prompt_arguments` and `img2img_arguments`."""
        ...

    def img2img_arguments(self, latents: Tensor, steps: int, strength: float) -> dict[str, Any]:
        """Call arguments for one image that starts from latents (1, C, h, w), the number of steps included.

        `strength`, in (0, 1], is the share of the noise schedule that is added to the latents and removed again.
        """
        ...


class TextTrainingFamily(ModelFamily, Protocol):
    """A family whose text encoders can be trained together with the denoiser."""

    def load_text_encoders(self, dtype: torch.dtype) -> dict[str, Any]:
        """The encoders, by role, on the CPU."""
        ...

    def text_layers_read(self, role: str) -> int:
        """How many of an encoder's layers, from the first, affect the network's input. The layers after them get no gradient."""
        ...

    def embed(self, encoders: Mapping[str, nn.Module], captions: Sequence[str | None], device: torch.device) -> dict[str, Tensor]:
        """Encode captions with these encoders, on the device and differentiable, as `text_encoders` does; None is the unconditional."""
        ...


class ControlledDenoiser(Protocol):
    """A denoiser and its ControlNet in one nn.Module, of which some methods are named here. Called like the denoiser, with the conditioning
    images as one more keyword, `condition`.
    """

    @property
    def denoiser(self) -> Any: ...

    @property
    def controlnet(self) -> Any: ...

    @property
    def unused(self) -> tuple[str, ...]:
        """Prefixes of ControlNet weights that never affect the output."""
        ...

    @property
    def argument(self) -> str:
        """The pipeline's argument for the conditioning image."""
        ...

    def prepared(self, condition: Tensor) -> Tensor:
        """The conditions of a batch in the form that the ControlNet and the pipeline read."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def requires_grad_(self, requires_grad: bool) -> Any: ...

    def train(self) -> Any: ...


class ControlNetFamily(ModelFamily, ConditionEncoder, Protocol):
    """A family for whose networks a ControlNet can be trained. Its `pipeline` also accepts a `ControlledDenoiser`."""

    def controlnet(self, denoiser: nn.Module) -> ControlledDenoiser:
        """The network, and a ControlNet with its initial weights."""
        ...


def can_img2img(family: ModelFamily) -> TypeGuard[Img2ImgFamily]:
    return family.facts.img2img


def can_train_text_encoders(family: ModelFamily) -> TypeGuard[TextTrainingFamily]:
    return bool(family.facts.trains_text_encoders)


def can_controlnet(family: ModelFamily) -> TypeGuard[ControlNetFamily]:
    return family.facts.controlnet


@dataclass(frozen=True)
class FusedPart:
    """A module that kohya's LoRA format has as some of the output rows of a larger layer, as the queries of a layer for q, k and v."""

    layer: str  # the name of the larger layer
    index: int  # which part of it this module is
    rows: tuple[int, ...]  # output rows of each part


@dataclass(frozen=True)
class SwappedHalves:
    """A module whose output has two halves (shift and scale), which are the other way round in kohya's LoRA format."""

    layer: str  # its name there


KohyaName = str | FusedPart | SwappedHalves


LIVE = "_live"  # in names of files and folders with the live weights, where the plain name has their average


@dataclass(frozen=True)
class Corrupted:
    """The network's input and its target. B samples."""

    noisy: Tensor  # (B, C, h, w)
    timesteps: Tensor  # (B,) in the network's units
    target: Tensor  # (B, C, h, w)
    weight: Tensor  # (B,) loss weight


class Objective(Protocol):
    """What the network learns to predict, and how much each sample counts. This one learns the noise, at one noise level:

    class HalfNoise:
        facts = Facts(name="half", title="half noise")
        samplers = {"euler": "EulerDiscreteScheduler"}
        identity = {}

        def __init__(self, options, scheduler_config):
            self.scheduler_config = scheduler_config

        def corrupt(self, latents, draws):
            noise = draws.normal("noise", *latents.shape[1:]).to(latents.device)
            ones = torch.ones(len(latents), device=latents.device)
            return Corrupted((latents + noise) / 2**0.5, timesteps=500 * ones, target=noise, weight=ones)

        def loss(self, prediction, corrupted, mask=None):
            distance = (prediction.float() - corrupted.target) ** 2
            mask = torch.ones_like(distance[:, :1]) if mask is None else mask
            return (distance * mask).mean(dim=(1, 2, 3)) / mask.mean(dim=(1, 2, 3)) * corrupted.weight
    """

    @property
    def facts(self) -> Facts: ...

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """The training schedule, by diffusers' names, for a sampler that matches it."""
        ...

    @property
    def samplers(self) -> Mapping[str, str]:
        """Values of --validation_noise_scheduler that can sample this prediction, with the diffusers class of each."""
        ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """Values found from model and options together, by option names. They must be the same when a run resumes."""
        ...

    def corrupt(self, latents: Tensor, draws: StepDraws) -> Corrupted:
        """latents (B, C, h, w), float32 => the network's input and target, on the same device. Random numbers come from `draws` only."""
        ...

    def loss(self, prediction: Tensor, corrupted: Corrupted, mask: Tensor | None = None) -> Tensor:
        """(B,) weighted loss of each sample, float32. The caller takes the mean.

        `mask` (B, 1, h, w) weights the pixels of the latents: the mean over pixels is sum(mask x distance) / sum(mask) of each sample.
        """
        ...


class TrainingMethod(Protocol):
    """Which weights are trained, and how they are saved. This one trains the first convolution of a U-Net:

    class FirstLayer:
        facts = Facts(name="first_layer", title="first layer")

        def __init__(self, options, family):
            pass

        def default_optimizer(self, mixed_precision):
            return "adamw"

        def weights_dtype(self, mixed_precision, optimizer):
            return torch.float32

        def check(self, outline):
            if not hasattr(outline.denoiser, "conv_in"):
                raise ConfigError("--model_type=first_layer needs a U-Net.")

        def attach(self, parts):
            parts.denoiser.requires_grad_(False).train()
            layer = parts.denoiser.conv_in.requires_grad_(True)
            parameters = {f"conv_in.{name}": parameter for name, parameter in layer.named_parameters()}
            return Trainable(parts.denoiser, parameters, "the first layer", parts.denoiser_folder)

        def save(self, trainable, folder, weights=None, label=""):
            path = folder / f"first_layer{label}.safetensors"
            save_tensors(dict(weights or trainable.parameters), path)
            return [path]

        def read(self, trainable, folder, label=""):
            return load_file(folder / f"first_layer{label}.safetensors")

        def export(self, trainable, folder, schedule, average):
            return self.save(trainable, folder, average)
    """

    @property
    def facts(self) -> Facts: ...

    def default_optimizer(self, mixed_precision: str) -> str:
        """The optimizer that `--optimizer=auto` stands for."""
        ...

    def weights_dtype(self, mixed_precision: str, optimizer: str) -> torch.dtype:
        """The precision in which the base model is loaded."""
        ...

    def check(self, outline: Parts) -> None:
        """Raises ConfigError where the network cannot be trained as asked. Called before hours of caching, with layers without weights."""
        ...

    def attach(self, parts: Parts) -> Trainable:
        """Prepare the network for training, in place: freeze what is not trained, add what is. Raises ConfigError as `check` does."""
        ...

    def save(self, trainable: Trainable, folder: Path, weights: Mapping[str, Tensor] | None = None, label: str = "") -> list[Path]:
        """Write the trained weights in the formats that other tools load. => the files or folders written

        `weights`, such as an average, replaces the live weights. `label` is appended to the names, so that both fit in one folder.
        """
        ...

    def read(self, trainable: Trainable, folder: Path, label: str = "") -> dict[str, Tensor]:
        """The weights that `save` wrote, by parameter name, on the CPU and bit for bit; with them the constant tensors (`fixed`)."""
        ...

    def export(self, trainable: Trainable, folder: Path, schedule: Mapping[str, Any], average: Mapping[str, Tensor] | None) -> list[Path]:
        """Write the result of the run into OUTPUT_DIR, of the average where there is one. => the files or folders written"""
        ...


class FamilyClass(Protocol):
    """The class of a family, as it stands in the registry."""

    @property
    def facts(self) -> FamilyFacts: ...

    def __call__(self, options: ModelOptions, cache: CacheOptions) -> ModelFamily:
        """Open a base model. Raises ModelError where it cannot be used, ConfigError for options it cannot follow."""
        ...


class MethodClass(Protocol):
    """The class of a method, as it stands in the registry."""

    @property
    def facts(self) -> Facts: ...

    def __call__(self, options: AdapterOptions, family: ModelFamily) -> TrainingMethod:
        """Raises ConfigError where the family cannot be trained this way."""
        ...


class ObjectiveClass(Protocol):
    """The class of an objective, as it stands in the registry."""

    @property
    def facts(self) -> Facts: ...

    def __call__(self, options: ObjectiveOptions, scheduler_config: Mapping[str, Any], patch: int = 1) -> Objective:
        """`scheduler_config` is the base model's, `patch` the edge of a token in latents. Raises ConfigError if the options do not fit."""
        ...


@dataclass(frozen=True)
class StepResult:
    """What happened in one optimizer step, over all processes."""

    step: int  # from 1
    epoch: int  # from 0
    loss: float | None  # weighted mean over the samples of the global step; None if it is not finite, or there was no sample
    learning_rate: float
    grad_norm: float | None  # before clipping; None if it is not finite
    seconds: float
    data_seconds: float  # the part of `seconds` that was spent waiting for data
    samples: int
    skipped: bool = False  # loss or gradient were not finite, and the weights were not changed
    text_encoder_lr: float | None = None  # 0 once the text encoders are no longer trained; None where none is trained


@dataclass(frozen=True)
class ValidationImage:
    """One image made during training."""

    name: str  # the same at every step: the prompt's name, the size and, where there are several, a number
    path: Path


class Reporter:
    """Base class of those who watch a run. A reporter overrides the events it needs; it returns nothing and changes nothing:

    class PrintLoss(Reporter):
        def stepped(self, result):
            print(result.step, result.loss)
    """

    def surveyed(self, survey: Survey) -> None:
        """The datasets are scanned. Called again where encoding found images that cannot be used."""

    def started(self, settings: Mapping[str, Any], total_steps: int) -> None:
        """Training starts or resumes."""

    def chapter(self, title: str, text: str) -> None:
        """One line about a part of the run, such as `dataset`, `latents` or `training`."""

    def progress(self, title: str, total: int, unit: str) -> AbstractContextManager[Callable[[int], None]] | None:
        """A progress bar, or None where none is shown. The context gives a function to call with the number of units just done."""
        return None

    def stepped(self, result: StepResult) -> None:
        """One optimizer step is done."""

    def sampled(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """The rows of samples.jsonl for one step, one a sample."""

    def validated(self, step: int, images: Sequence[ValidationImage]) -> None:
        """Validation images are written."""

    def saving(self, step: int) -> None:
        """A checkpoint is about to be written: what was recorded up to this step must survive a power cut, as the checkpoint will."""

    def saved(self, step: int, folder: Path) -> None:
        """A checkpoint is written."""

    def finished(self, step: int, outputs: Sequence[Path]) -> None:
        """The run has ended, and these files and folders are its result."""

    def failed(self, reason: str) -> None:
        """The run ends early, for a reason in one sentence."""

    def close(self) -> None:
        """The process ends: release files and connections."""
