"""Generate images with two experts, each trained on a part of the noise schedule (documentation/MIXTURE_OF_EXPERTS.md).

    ./simpletuner experts first-expert second-expert --prompt "my dog Rex asleep on a sofa" --output_dir images

The folders are the OUTPUT_DIRs of the two runs, in any order: each expert's part and base model are read from its config.json. Full
fine-tunes and LoRAs may be mixed. Image n always starts from the same noise. Existing files of the same name are replaced.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.choices import known_axes
from helpers.config.config import Config
from helpers.config.saved import read_saved_config
from helpers.errors import UserError
from toolkit.generation import ImageSettings, Model, add_sampling, exit_code, load_pipeline, make_folder, noise, prompt, sample

if TYPE_CHECKING:
    from PIL.Image import Image

WEIGHTS = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Expert:
    """A finished run on one part of the schedule."""

    folder: Path
    config: Config

    @classmethod
    def open(cls, folder: Path) -> Expert:
        """UserError for a run on the whole schedule, and for files that this program cannot load."""
        config = read_saved_config(folder, known_axes())
        if not config.objective.refiner_training:
            raise UserError(f"{folder} was trained on the whole schedule, so it is not an expert. Train with --refiner_training.")
        if config.method_name == "lycoris" and config.adapter.lora_algorithm != "locon":
            raise UserError(f"{folder} contains a {config.adapter.lora_algorithm} adapter, which only the LyCORIS library can load.")
        expert = cls(folder, config)
        if not (expert.pipeline_folder.is_dir() or (folder / WEIGHTS).is_file()):
            raise UserError(f"{folder} contains neither a pipeline folder nor {WEIGHTS}: let the run finish.")
        return expert

    @property
    def pipeline_folder(self) -> Path:
        """Exported by full fine-tuning; an adapter has none."""
        return self.folder / "pipeline"

    @property
    def ends(self) -> bool:
        """Whether it is for the end of sampling, where little noise is left."""
        return not self.config.objective.refiner_training_invert_schedule

    @property
    def strength(self) -> float:
        """The second expert's share of the schedule, from 0 to 1."""
        return self.config.objective.refiner_training_strength

    @property
    def t5(self) -> str | None:
        """The T5 that the run was given; None for the base model's own, or for a model without T5."""
        return self.config.model.pretrained_t5_model_name_or_path

    def load(self, dtype: str, device: str, **parts: Any) -> Any:
        """Its diffusers pipeline, with `parts` instead of its own."""
        if self.pipeline_folder.is_dir():
            return load_pipeline(Model(str(self.pipeline_folder)), dtype, device, **parts)
        options = self.config.model
        base = Model(
            options.pretrained_model_name_or_path,
            options.revision,
            options.variant,
            t5=options.pretrained_t5_model_name_or_path,
            vae=options.pretrained_vae_model_name_or_path,
        )
        pipeline = load_pipeline(base, dtype, device, **parts)
        if hasattr(pipeline, "load_lora_weights"):
            pipeline.load_lora_weights(self.folder, weight_name=WEIGHTS)
        else:
            from peft import PeftModel

            PeftModel.from_pretrained(pipeline.transformer, str(self.folder / Path(WEIGHTS).with_suffix(".peft")))
        return pipeline


def in_order(one: Expert, other: Expert) -> tuple[Expert, Expert]:
    """The expert for the noisy timesteps, and the one for the rest. UserError if the two do not cover one schedule."""
    first, second = (other, one) if one.ends else (one, other)
    if first.ends or not second.ends:
        part = "end" if first.ends else "beginning"
        raise UserError(
            f"{one.folder} and {other.folder} were both trained on the {part} of the schedule; "
            "train one of them with --refiner_training_invert_schedule, and the other without."
        )
    if first.strength != second.strength:
        raise UserError(
            f"{first.folder} was trained with --refiner_training_strength={first.strength:g} and {second.folder} with "
            f"{second.strength:g}, so some timesteps have two experts or none. Train both with the same value."
        )
    if first.config.family_name != second.config.family_name:
        raise UserError(
            f"{first.folder} belongs to the model family {first.config.family_name} and {second.folder} to {second.config.family_name}; "
            "a base model and a refiner need two pipelines. See documentation/REFINER.md."
        )
    if first.t5 != second.t5:
        raise UserError(
            f"{first.folder} was trained with the T5 of {first.t5 or 'its base model'} and {second.folder} with that of "
            f"{second.t5 or 'its base model'}, but a pipeline has only one T5. Train both with the same T5."
        )
    return first, second


def joined(first: Expert, second: Expert, dtype: str, device: str) -> Any:
    """The first expert's pipeline, with a network that uses the second expert at the end of the schedule."""
    from toolkit.inference.two_experts import TwoExperts

    pipeline = first.load(dtype, device)
    role = "unet" if "unet" in pipeline.components else "transformer"
    shared = {name: part for name, part in pipeline.components.items() if name != role}
    late = getattr(second.load(dtype, device, **shared), role)
    border = second.strength * pipeline.scheduler.config.num_train_timesteps
    setattr(pipeline, role, TwoExperts(getattr(pipeline, role), late, round(border)))
    return pipeline


def make(pipeline: Any, arguments: argparse.Namespace) -> Iterator[Image]:
    """Generate the images in the order of their numbers."""
    settings = ImageSettings.from_arguments(arguments)
    for start in range(0, arguments.number, arguments.batch):
        some = range(start, min(start + arguments.batch, arguments.number))
        yield from sample(pipeline, settings, [noise("experts", arguments.seed, number) for number in some])


def run(arguments: argparse.Namespace) -> None:
    from helpers.reporting.console import Console
    from helpers.storage.atomic import write_file

    first, second = in_order(Expert.open(arguments.one), Expert.open(arguments.other))
    folder: Path = arguments.output_dir
    make_folder(folder)
    console = Console()
    console.chapter("experts", f"{first.folder} starts, {second.folder} has the last {100 * second.strength:g} % of the schedule")
    pipeline = joined(first, second, arguments.dtype, arguments.device)
    with console.progress("generate", arguments.number, "images") as advance:
        for number, image in enumerate(make(pipeline, arguments), start=1):
            content = io.BytesIO()
            image.save(content, "PNG")
            write_file(folder / f"experts_{number}.png", content.getvalue())
            advance(1)
    console.chapter("finished", f"{arguments.number:,} images in {folder}")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="./simpletuner experts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("one", type=Path, metavar="EXPERT", help="the OUTPUT_DIR of one run")
    made.add_argument("other", type=Path, metavar="EXPERT", help="the OUTPUT_DIR of the other run")
    made.add_argument("--prompt", required=True, type=prompt, help="the prompt of the images")
    made.add_argument("--output_dir", required=True, type=Path, metavar="FOLDER", help="folder for the images")
    add_sampling(made, number=1, what="number of images")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parser().parse_args(arguments)
    return exit_code(lambda: run(chosen))
