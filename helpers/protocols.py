"""The architecture on one page: a run = family x method x objective, over data (helpers/data/ports.py), watched by reporters.

Family, method and objective are protocols. Each choice is one file and one line in the registry of its package (`families/__init__.py`);
nothing outside `families/sdxl.py` knows that SDXL exists. What only some families can do is a protocol of its own, with a function that
asks for it: `can_img2img(family)`. mypy compares every choice with its protocols in tests/test_conformance.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
    """The modules of a loaded model that a method may train, by role. Not loaded until asked for by the family."""

    denoiser: Any  # nn.Module with diffusers' ModelMixin
    denoiser_folder: str  # its name in a diffusers folder: "unet" or "transformer"
    text_encoders: dict[str, Any] = field(default_factory=dict)  # those that are trained too, by their names in a diffusers folder
    text_weights: frozenset[str] = frozenset()  # of those, the parameters that may move: "text_encoder.encoder.layers.0...."
    unrounded: Mapping[str, Tensor] = field(default_factory=dict)  # of quantised layers, where a start needs them
    frozen_dtype: torch.dtype | None = None  # precision of a network that only stands beside what is trained; None: as it was loaded
    report: Reporter = field(default_factory=lambda: Reporter())  # is shown how far long work on the weights has come


@dataclass
class Trainable:
    """What moves, and how to run it."""

    denoiser: Any  # nn.Module with diffusers' ModelMixin as `attach` left it, or `Controlled`
    parameters: dict[str, nn.Parameter]  # the weights that move, by the name they keep in checkpoints
    description: str  # "LoRA rank 16, 23.2 M of 2,567.5 M parameters"
    role: str  # the name of what is trained in a diffusers folder: "unet", "transformer" or "controlnet"
    fixed: dict[str, Tensor] = field(default_factory=dict)  # stand still, and are kept in checkpoints: what moves is measured from them
    text_encoders: dict[str, Any] = field(default_factory=dict)  # by role, as `attach` left them; their parameters' names begin with it

    @property
    def modules(self) -> dict[str, Any]:
        """Every network in which something moves, by role."""
        return {self.role: self.denoiser, **self.text_encoders}

    def of(self, role: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of some weights that are this network's, by its own names for them."""
        if role in self.text_encoders:
            return {name.removeprefix(f"{role}."): tensor for name, tensor in weights.items() if name.startswith(f"{role}.")}
        others = tuple(f"{other}." for other in self.text_encoders)
        return {name: tensor for name, tensor in weights.items() if not name.startswith(others)}

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Replace the weights that move, and of those that stand still what is given, in place and in their own precision."""
        for name, parameter in self.parameters.items():
            parameter.data.copy_(weights[name])
        for name in self.fixed.keys() & weights.keys():
            self.fixed[name].data.copy_(weights[name])


class ModelFamily(ModelEncoders, Protocol):
    """A kind of network: how to load it, what it reads, and how it is saved. One file a family; importing that file imports no torch."""

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

    def kohya_name(self, module: str) -> str | None:
        """The name of a denoiser module in kohya's LoRA format; None where that format does not know the family."""
        ...

    def read_lora(self, path: Path) -> tuple[dict[str, Tensor], list[float]]:
        """A LoRA file as diffusers reads it: matrices by their PEFT names, and every alpha in the file."""
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
    """A denoiser and its ControlNet in one nn.Module. Called like the denoiser, with `condition` as one more keyword."""

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


class ControlNetFamily(ModelFamily, ConditionEncoder, Protocol):
    """A family for whose networks a ControlNet can be trained. Its `pipeline` also accepts a `ControlledDenoiser`."""

    def controlnet(self, denoiser: nn.Module) -> Any:
        """A `ControlledDenoiser`: the network, and a ControlNet with its initial weights."""
        ...


def can_img2img(family: ModelFamily) -> TypeGuard[Img2ImgFamily]:
    return family.facts.img2img


def can_train_text_encoders(family: ModelFamily) -> TypeGuard[TextTrainingFamily]:
    return bool(family.facts.trains_text_encoders)


def can_controlnet(family: ModelFamily) -> TypeGuard[ControlNetFamily]:
    return family.facts.controlnet


@dataclass(frozen=True)
class Corrupted:
    """Latents as the network is to see them, and the right answer. B samples."""

    noisy: Tensor  # (B, C, h, w)
    timesteps: Tensor  # (B,) in the network's units
    target: Tensor  # (B, C, h, w) what it should answer
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

        def loss(self, prediction, corrupted):
            return ((prediction.float() - corrupted.target) ** 2).mean(dim=(1, 2, 3)) * corrupted.weight
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

    def loss(self, prediction: Tensor, corrupted: Corrupted) -> Tensor:
        """(B,) weighted loss of each sample, float32. The caller takes the mean."""
        ...


class TrainingMethod(Protocol):
    """Which weights move. Created for a family, and refuses there what that family cannot do."""

    @property
    def facts(self) -> Facts: ...

    def default_optimizer(self, mixed_precision: str) -> str:
        """What `--optimizer=auto` means for the weights that move."""
        ...

    def weights_dtype(self, mixed_precision: str, optimizer: str) -> torch.dtype:
        """In what precision the base model is loaded."""
        ...

    def check(self, outline: Parts) -> None:
        """Refuse what does not fit the network, before hours of caching: `outline` has its layers, and no weights. Raises ConfigError."""
        ...

    def attach(self, parts: Parts) -> Trainable: ...

    def save(self, trainable: Trainable, folder: Path, weights: Mapping[str, Tensor] | None = None, label: str = "") -> list[Path]:
        """Write the weights that move into `folder` in the formats others load, and say which files or folders that made.

        `weights` (an average, say) replaces the live ones; `label` is appended to the names, so that both can stand side by side.
        """
        ...

    def read(self, trainable: Trainable, folder: Path, label: str = "") -> dict[str, Tensor]:
        """Exactly the weights that `save` wrote, by parameter name, on the CPU; with them those that stand still, where there are some."""
        ...

    def export(self, trainable: Trainable, folder: Path, schedule: Mapping[str, Any], average: Mapping[str, Tensor] | None) -> list[Path]:
        """Write what the user came for into OUTPUT_DIR, of the average where there is one, and say what that made."""
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

    def __call__(self, options: ObjectiveOptions, scheduler_config: Mapping[str, Any]) -> Objective:
        """`scheduler_config` is the base model's. Raises ConfigError for options that do not fit it."""
        ...


@dataclass(frozen=True)
class StepResult:
    """What happened in one optimiser step, over all processes."""

    step: int  # from 1
    epoch: int  # from 0
    loss: float  # weighted mean over the samples of the global step
    learning_rate: float
    grad_norm: float  # before clipping
    seconds: float
    data_seconds: float  # of them, waiting for data
    samples: int
    skipped: bool = False  # the gradient or the loss was not finite, and the weights stayed as they were
    text_encoder_lr: float | None = None  # the text encoders' learning rate, 0 where they stand still by now; None where none is trained


@dataclass(frozen=True)
class ValidationImage:
    """One picture made during training."""

    name: str  # the same at every step: its prompt's, its size, and its number where there are several
    path: Path


class Reporter:
    """Watches a run; returns nothing and steers nothing. Every event does nothing unless a reporter cares."""

    def surveyed(self, survey: Survey) -> None:
        """The data is known; told again when encoding brought something new to light."""

    def started(self, settings: Mapping[str, Any], total_steps: int) -> None: ...

    def chapter(self, title: str, text: str) -> None:
        """One line of the run's story: `dataset`, `latents`, `training` ..."""

    def progress(self, title: str, total: int, unit: str) -> AbstractContextManager[Callable[[int], None]] | None:
        """A bar for long work; the function it gives is told how many more units are done."""
        return None

    def stepped(self, result: StepResult) -> None: ...

    def sampled(self, rows: Iterable[Mapping[str, Any]]) -> None: ...

    def validated(self, step: int, images: Sequence[ValidationImage]) -> None: ...

    def saved(self, step: int, folder: Path) -> None: ...

    def finished(self, step: int, outputs: Sequence[Path]) -> None: ...

    def failed(self, reason: str) -> None: ...

    def close(self) -> None: ...
