"""Make pictures with two experts, each trained for its part of the noise schedule (documentation/MIXTURE_OF_EXPERTS.md).

    ./simpletuner experts first-expert second-expert --prompt "my dog Rex asleep on a sofa" --output_dir pictures

The folders are the OUTPUT_DIRs of the two runs, in any order: which part each has learnt, of which base model, is read from its
config.json. Full fine-tunes and LoRAs may be mixed. Picture n always starts from the same noise; a file of the same name is replaced.
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
from toolkit.pictures import Model, Wanted, add_sampling, exit_code, load_pipeline, make_folder, noise, sample, words

if TYPE_CHECKING:
    from PIL.Image import Image

WEIGHTS = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Expert:
    """A finished run for one part of the schedule."""

    folder: Path
    config: Config

    @classmethod
    def open(cls, folder: Path) -> Expert:
        """UserError for a run over the whole schedule, and for one whose files this program cannot open."""
        config = read_saved_config(folder, known_axes())
        if not config.objective.refiner_training:
            raise UserError(f"{folder} was trained on the whole schedule: it is no expert. Train with --refiner_training.")
        if config.method_name == "lycoris" and config.adapter.lora_algorithm != "locon":
            raise UserError(f"{folder} holds a {config.adapter.lora_algorithm}, which only the LyCORIS library opens.")
        expert = cls(folder, config)
        if not (expert.pipeline_folder.is_dir() or (folder / WEIGHTS).is_file()):
            raise UserError(f"{folder} holds neither a pipeline folder nor {WEIGHTS}: let the run come to its end.")
        return expert

    @property
    def pipeline_folder(self) -> Path:
        """Of a full fine-tune; an adapter has none."""
        return self.folder / "pipeline"

    @property
    def ends(self) -> bool:
        """Whether it is for the end of a picture, where little noise is left."""
        return not self.config.objective.refiner_training_invert_schedule

    @property
    def strength(self) -> float:
        """The share of the schedule that is the end."""
        return self.config.objective.refiner_training_strength

    @property
    def t5(self) -> str | None:
        """The T5 that was named for it; None for the base model's own, and where it reads none."""
        return self.config.model.pretrained_t5_model_name_or_path

    def load(self, dtype: str, device: str, **parts: Any) -> Any:
        """Its pipeline of diffusers, with these `parts` in place of its own."""
        if self.pipeline_folder.is_dir():
            return load_pipeline(Model(str(self.pipeline_folder)), dtype, device, **parts)
        told = self.config.model
        base = Model(
            told.pretrained_model_name_or_path,
            told.revision,
            told.variant,
            t5=told.pretrained_t5_model_name_or_path,
            vae=told.pretrained_vae_model_name_or_path,
        )
        pipeline = load_pipeline(base, dtype, device, **parts)
        if hasattr(pipeline, "load_lora_weights"):
            pipeline.load_lora_weights(self.folder, weight_name=WEIGHTS)
        else:
            from peft import PeftModel

            PeftModel.from_pretrained(pipeline.transformer, str(self.folder / Path(WEIGHTS).with_suffix(".peft")))
        return pipeline


def in_order(one: Expert, other: Expert) -> tuple[Expert, Expert]:
    """The one that begins pictures and the one that ends them. UserError where the two do not make one schedule."""
    first, second = (other, one) if one.ends else (one, other)
    if first.ends or not second.ends:
        part = "end" if first.ends else "beginning"
        raise UserError(
            f"{one.folder} and {other.folder} were both trained on the {part} of the schedule; "
            "one of them has to be trained with --refiner_training_invert_schedule, and the other without."
        )
    if first.strength != second.strength:
        raise UserError(
            f"{first.folder} was trained with --refiner_training_strength={first.strength:g} and {second.folder} with "
            f"{second.strength:g}: a part of the schedule has both experts or none. Train them with the same."
        )
    if first.config.family_name != second.config.family_name:
        raise UserError(
            f"{first.folder} is of the family {first.config.family_name} and {second.folder} of {second.config.family_name}: "
            "a base and a refiner are two pipelines. See documentation/REFINER.md."
        )
    if first.t5 != second.t5:
        raise UserError(
            f"{first.folder} was trained with the T5 of {first.t5 or 'its base model'} and {second.folder} with that of "
            f"{second.t5 or 'its base model'}: one pipeline reads captions with one. Train them with the same."
        )
    return first, second


def joined(first: Expert, second: Expert, dtype: str, device: str) -> Any:
    """The first expert's pipeline, whose network hands the end of the schedule to the second's."""
    from toolkit.inference.two_experts import TwoExperts

    pipeline = first.load(dtype, device)
    role = "unet" if "unet" in pipeline.components else "transformer"
    shared = {name: part for name, part in pipeline.components.items() if name != role}
    late = getattr(second.load(dtype, device, **shared), role)
    border = second.strength * pipeline.scheduler.config.num_train_timesteps
    setattr(pipeline, role, TwoExperts(getattr(pipeline, role), late, round(border)))
    return pipeline


def make(pipeline: Any, arguments: argparse.Namespace) -> Iterator[Image]:
    """The pictures in the order of their numbers."""
    wanted = Wanted.of(arguments)
    for start in range(0, arguments.number, arguments.batch):
        some = range(start, min(start + arguments.batch, arguments.number))
        yield from sample(pipeline, wanted, [noise("experts", arguments.seed, number) for number in some])


def run(arguments: argparse.Namespace) -> None:
    from helpers.reporting.console import Console
    from helpers.storage.atomic import write_file

    first, second = in_order(Expert.open(arguments.one), Expert.open(arguments.other))
    folder: Path = arguments.output_dir
    make_folder(folder)
    console = Console()
    console.chapter("experts", f"{first.folder} begins, {second.folder} has the last {100 * second.strength:g} % of the schedule")
    pipeline = joined(first, second, arguments.dtype, arguments.device)
    with console.progress("make pictures", arguments.number, "pictures") as advance:
        for number, picture in enumerate(make(pipeline, arguments), start=1):
            content = io.BytesIO()
            picture.save(content, "PNG")
            write_file(folder / f"experts_{number}.png", content.getvalue())
            advance(1)
    console.chapter("finished", f"{arguments.number:,} pictures in {folder}")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="./simpletuner experts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("one", type=Path, metavar="EXPERT", help="the OUTPUT_DIR of one run")
    made.add_argument("other", type=Path, metavar="EXPERT", help="the OUTPUT_DIR of the other")
    made.add_argument("--prompt", required=True, type=words, help="what the pictures show")
    made.add_argument("--output_dir", required=True, type=Path, metavar="FOLDER", help="where the pictures go")
    add_sampling(made, number=1, what="of pictures")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parser().parse_args(arguments)
    return exit_code(lambda: run(chosen))
