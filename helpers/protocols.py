"""The architecture on one page: a run = Family x Method x Objective, over Data.

Four axes and one observer. Each axis is a protocol, a registry of one line an entry and one file a choice; nothing outside
`families/sdxl.py` knows that SDXL exists.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from helpers.config.facts import Facts, FamilyFacts

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from helpers.data.base.draws import StepDraws
    from helpers.data.batches import Batch
    from helpers.data.report.survey import Survey

TextTensors = dict[str, "Tensor"]  # what text encoders give for one caption, by name, without a batch dimension


@dataclass(frozen=True)
class LatentSpec:
    """The tensors a family trains on: `channels` at 1/`downsampling` of the pixels' width and height."""

    channels: int
    downsampling: int
    patch: int = 1  # the network reads squares of this edge, so the edges of latents are multiples of it

    @property
    def alignment(self) -> int:
        """The edges of pictures are multiples of this, in pixels."""
        return self.downsampling * self.patch


class ImageCodec(Protocol):
    """Pixels to what the network sees and back. For pixel models the identity."""

    fingerprint: str  # changes with anything that changes the bytes of `encode`: weights, dtype, scaling

    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        """pixels (B, 3, H, W) in [-1, 1] => {"mean": (B, C, h, w)} and, when latents are sampled, "std"; scaled and shifted."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, C, h, w), as `encode` gave them => pixels (B, 3, H, W) in [-1, 1]."""
        ...


class TextEncoders(Protocol):
    """Captions to conditioning tensors, the same function for the cache and for live training."""

    fingerprint: str

    @property
    def truncated(self) -> int:
        """Captions so far that were longer than the encoders read."""
        ...

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """B captions => tensors by name, each (B, ...)."""
        ...


class CaptionLengths(Protocol):
    """How long captions are for the text encoders, from their tokenizers alone."""

    fingerprint: str  # changes with anything that changes the lengths

    @property
    def limit(self) -> int | None:
        """Tokens that are read of a caption, those that mark its beginning and end included; None where all are."""
        ...

    def of(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption, those marks included; where tokenizers differ, by the one that makes most of it."""
        ...


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


class ModelFamily(Protocol):
    """A kind of network: how to load it, feed it and save it. One file per family; its facts import without torch."""

    facts: FamilyFacts
    latents: LatentSpec
    name: str  # model folder or hub name, for messages and cards
    identity: str  # a hash of the denoiser's weights: a run goes on only with the model it began with
    refines: bool  # whether its pictures begin with pictures (img2img) and not with noise
    notes: Sequence[str]  # of this base model, what a run should say at its start
    loads_lora: bool  # whether its pipeline in diffusers loads LoRA files
    lora_targets: tuple[str, ...]  # module name endings that an adapter goes to unless the user names others
    scheduler_config: Mapping[str, Any]  # the checkpoint's own noise schedule

    def image_codec(self, device: torch.device) -> AbstractContextManager[ImageCodec]: ...

    def text_encoders(self, device: torch.device) -> AbstractContextManager[TextEncoders]: ...

    def caption_lengths(self) -> CaptionLengths:
        """Loads no weights."""
        ...

    def unconditional(self, encoders: TextEncoders) -> TextTensors:
        """What a dropped caption becomes."""
        ...

    def load(self, dtype: torch.dtype | None) -> Parts:
        """The network in this precision, on the CPU; with None an outline of it, which has layers and no weights."""
        ...

    def conditioning(self, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        """Everything the network is told besides the noisy latents, each tensor (B, ...), on the device."""
        ...

    def predict(self, denoiser: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        """noisy (B, C, h, w), timesteps (B,) => the network's answer (B, C, h, w)."""
        ...

    def pipeline(self, denoiser: nn.Module, sampler: Any) -> Any:
        """A diffusers pipeline from embeddings, and from what `begin_with` says where the family refines, to latents.

        It has no encoders and no VAE.
        """
        ...

    def img2img_pipeline(self, denoiser: nn.Module, sampler: Any) -> Any:
        """The same for pictures that begin with what `begin_with` says, of families that do so only when asked (`facts.img2img`)."""
        ...

    def prompt_arguments(self, text: TextTensors, negative: TextTensors) -> dict[str, Any]:
        """The pipeline's call arguments for one prompt, each with a batch dimension of 1."""
        ...

    def begin_with(self, latents: Tensor, steps: int, strength: float) -> dict[str, Any]:
        """Its call arguments for one picture that begins with latents (1, C, h, w), steps among them (`facts.img2img`).

        `strength` is the share of the schedule that such a picture goes back to, in (0, 1].
        """
        ...

    def kohya_name(self, module: str) -> str | None:
        """A denoiser module's name in kohya's layout; None where the family has no such layout."""
        ...

    def read_lora(self, path: Path) -> tuple[dict[str, Tensor], list[float]]:
        """What diffusers makes of a LoRA file of this family: matrices by peft's names, and every alpha it found."""
        ...

    def modelspec(self, kind: str) -> dict[str, str]:
        """`modelspec.*` metadata (Stability AI's model specification 1.0.0) for a file of this kind ("lora")."""
        ...

    def export_pipeline(self, denoiser_folder: Path, scheduler_config: Mapping[str, Any], target: Path) -> None:
        """Write a complete diffusers folder around a saved denoiser, which other tools load."""
        ...


class TextTrainer(Protocol):
    """What a family has too whose text encoders can be trained (`facts.trains_text_encoders`)."""

    def load_text_encoders(self, dtype: torch.dtype) -> dict[str, Any]:
        """The encoders, by role, on the CPU."""
        ...

    def text_layers_read(self, role: str) -> int:
        """How many layers of an encoder that is trained the network is told of, from the first; what is behind gets no gradient."""
        ...

    def embed(self, encoders: Mapping[str, nn.Module], captions: Sequence[str | None], device: torch.device) -> dict[str, Tensor]:
        """What `text_encoders` gives for captions, None being the unconditional, by those encoders on the device and differentiable."""
        ...


class EncodersApart(Protocol):
    """What a family has too that may be told of a caption by one text encoder and not by another (`facts.encoders_apart`)."""

    encoders_apart: tuple[str, ...]  # those a caption is kept from each by itself, by their folders; none where it is dropped as a whole

    def without(self, text: TextTensors, encoders: Collection[str]) -> TextTensors:
        """A caption's tensors, without a batch dimension, as if these encoders had not been told of it."""
        ...


class Controlled(Protocol):
    """A network with a ControlNet beside it: an nn.Module that is asked as the network alone is, with `condition` beside the rest."""

    denoiser: Any
    controlnet: Any
    unused: tuple[str, ...]  # beginnings of names of the ControlNet's weights that nothing depends on
    argument: str  # by which the pipeline takes the condition

    def prepared(self, condition: Tensor) -> Tensor:
        """The conditions of a batch, as the ControlNet reads them and the pipeline is handed them."""
        ...


class ControlledFamily(ModelFamily, Protocol):
    """A family whose facts say that a ControlNet can be trained beside its networks. Then its `pipeline` takes both as one."""

    condition_as_latents: bool  # whether the ControlNet reads conditions as the VAE encodes them, or as pixels in [0, 1]

    def controlnet(self, denoiser: nn.Module) -> Any:
        """`Controlled`: the network, and the ControlNet that it starts with."""
        ...


@dataclass(frozen=True)
class Corrupted:
    """Latents as the network is to see them, and the right answer. B samples."""

    noisy: Tensor  # (B, C, h, w)
    timesteps: Tensor  # (B,) in the network's units
    target: Tensor  # (B, C, h, w) what it should answer
    weight: Tensor  # (B,) loss weight


class Objective(Protocol):
    """What a network is asked to predict, and how much each sample counts."""

    facts: Facts
    scheduler_config: Mapping[str, Any]  # for a sampler that agrees with the training schedule
    samplers: Mapping[str, str]  # diffusers' class for each of --validation_noise_scheduler that can sample what is learnt
    identity: Mapping[str, Any]  # what the model and the options agreed on, by the options' names: a resumed run must agree too

    def corrupt(self, latents: Tensor, draws: StepDraws) -> Corrupted: ...

    def loss(self, prediction: Tensor, corrupted: Corrupted) -> Tensor:
        """(B,) the weighted loss of each sample, float32; reduction is the caller's."""
        ...


class TrainingMethod(Protocol):
    """Which weights move. Created for a family, and refuses there what that family cannot do."""

    facts: Facts

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
