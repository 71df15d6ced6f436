"""What each training method learns, measured on data that it was not trained on.

python -m benchmarks.learning                          all methods, one after the other: some minutes each
python -m benchmarks.learning bitfit experts           some of them

Every part trains the demo model, which knows circles, squares and triangles in eight colors, or a base model that it makes first. Training
uses `train.py` itself. The model is measured before and after, with demo/check.py or by the distance to correct images. It is never
measured on training data: stars have other color pairs, and drawn scenes another seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image, ImageFilter

from benchmarks.measure import Figure, table
from demo import check
from demo.autoencoder import to_tensor
from demo.drawings import COLORS, CONCEPT, Scene, draw, random_scene, write_drawings
from demo.make_base import SIZES

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "demo" / "model"
STARS = ROOT / "demo" / "concept"
HELD_OUT_SEED = 20_000  # of drawn scenes that are in no training set
REFINED_SHARE = 0.2  # share of the schedule of the refiner and the second expert
WORD = "cat"  # a token of the vocabulary that no image was captioned with
BLUR_PX = 2.0  # blur that the refiner should remove

EVERYWHERE = "to_q,to_k,to_v,to_out.0,proj_in,proj_out,ff.net.0.proj,ff.net.2,conv1,conv2,time_emb_proj"


@dataclass(frozen=True)
class Bench:
    """The folder of the runs, and their length: `share` of the full number of steps."""

    folder: Path
    share: float = 1.0

    def train(self, name: str, images: Path, *, steps: int, conditions: Path | None = None, **settings: object) -> Path:
        """Run train.py on a folder of captioned images => its OUTPUT_DIR. Raises RuntimeError with its output if it fails.

        `conditions` is a folder of ControlNet conditioning images.
        """
        output = self.folder / name
        datasets = self.folder / f"{name}.json"
        entry = {"id": "images", "instance_data_dir": str(images), "resolution": 64, "resolution_type": "pixel"}
        entries: list[dict[str, object]] = [{**entry, "caption_strategy": "textfile"}]
        if conditions:
            entries[0]["conditioning_data"] = "conditions"
            entries.append({"id": "conditions", "dataset_type": "conditioning", "instance_data_dir": str(conditions)})
        datasets.write_text(json.dumps(entries), encoding="utf-8")
        flags: dict[str, object] = {
            "pretrained_model_name_or_path": MODEL,
            "data_backend_config": datasets,
            "output_dir": output,
            "train_batch_size": 16,
            "gradient_accumulation_steps": 1,
            "max_train_steps": max(1, round(steps * self.share)),
            "num_train_epochs": 0,
            "learning_rate": 1e-3,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": round(20 * self.share),
            "lr_end": 1e-5,
            "max_grad_norm": 1.0,
            "lora_dropout": 0,
            "caption_dropout_probability": 0.1,
            "mixed_precision": "no",
            "checkpointing_steps": 10_000,
            "validation_steps": 0,
            "validation_disable_unconditional": True,
            "report_to": "none",
            **settings,
        }
        command = [sys.executable, str(ROOT / "train.py"), *(f"--{key}={value}" for key, value in flags.items())]
        ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if ended.returncode:
            raise RuntimeError(f"{name} ended with {ended.returncode}:\n{ended.stdout[-3000:]}")
        return output

    def drawn(self, count: int) -> Path:
        """Training images of the shapes that the demo model knows."""
        folder = self.folder / "images"
        if not folder.exists():
            write_drawings(folder, count)
        return folder

    def many_stars(self, count: int) -> Path:
        """More stars in the color pairs of demo/concept: full fine-tuning overfits to so few images."""
        drawn, pairs = random.Random(1), sorted({(star.foreground, star.background) for star in all_stars(1)} - held_out_pairs())
        return self.written("stars", [random_scene(drawn, (CONCEPT,), pairs[number % len(pairs)]) for number in range(count)])

    def written(self, name: str, scenes: Sequence[Scene], captioned: bool = True, shape: str = "") -> Path:
        """Write these scenes to a folder with their captions. `shape` replaces the word for the shape in the captions."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        for number, scene in enumerate(scenes):
            draw(scene).save(folder / f"{number:05}.png")
            if captioned:
                (folder / f"{number:05}.txt").write_text(dataclasses.replace(scene, shape=shape or scene.shape).caption, encoding="utf-8")
        return folder


def all_stars(each: int) -> list[Scene]:
    """Draw this many scenes of every color pair."""
    drawn = random.Random(HELD_OUT_SEED)
    return [random_scene(drawn, (CONCEPT,), pair) for pair in itertools.permutations(COLORS, 2) for _ in range(each)]


def held_out_pairs() -> set[tuple[str, str]]:
    """The color pairs that are not in the 40 images of demo/concept."""
    trained = {file.read_text(encoding="utf-8").strip() for file in STARS.glob("*.txt")}
    return {(star.foreground, star.background) for star in all_stars(1) if star.caption not in trained}


def held_out_stars() -> list[Scene]:
    """Three stars of each color pair that is in no training set."""
    pairs = held_out_pairs()
    return [star for star in all_stars(3) if (star.foreground, star.background) in pairs]


def share_right(scenes: Sequence[Scene], images: Sequence[Image.Image]) -> float:
    """The share of images with the requested shape, color and background, in [0, 1]."""
    seen = [check.judge(image) for image in images]
    asked = [(scene.shape, scene.foreground, scene.background) for scene in scenes]
    return statistics.mean((sight.shape, sight.foreground, sight.background) == wish for sight, wish in zip(seen, asked, strict=True))


def stars_of(model: Path, lora: Path | None = None) -> float:
    """The share of held-out stars that a model generates correctly."""
    scenes = held_out_stars()
    return share_right(scenes, check.generate(model, scenes, lora=lora))


def gain(what: str, before: float, after: float, at_least: float) -> list[Figure]:
    return [Figure(f"{what}: before", before, ""), Figure(f"{what}: after", after, "", at_least=at_least)]


# -- the parts ----------------------------------------------------------------------------------------------------------------


def lora(bench: Bench) -> Iterator[Figure]:
    """Learn the star with a LoRA on attention, feed-forward layers and convolutions: the demo's own settings."""
    preset = json.loads((ROOT / "demo" / "lora.json").read_text(encoding="utf-8"))
    kept = ("model_type", "lora_rank", "lora_alpha", "lora_targets", "learning_rate", "lr_end")
    output = bench.train("lora", STARS, steps=preset["max_train_steps"], **{name: preset[name] for name in kept})
    yield from gain("LoRA, stars right", stars_of(MODEL), stars_of(MODEL, output / "pytorch_lora_weights.safetensors"), 0.5)


def bitfit(bench: Bench) -> Iterator[Figure]:
    """Learn the star by training only the biases."""
    output = bench.train("bitfit", STARS, steps=1500, model_type="full", use_bitfit=True, learning_rate=1e-2, lr_end=1e-4)
    yield from gain("BitFit, stars right", stars_of(MODEL), stars_of(output / "pipeline"), 0.15)


def experts(bench: Bench) -> Iterator[Figure]:
    """Learn the star with two experts, for timesteps 200 to 999 and 0 to 199; measured alone and together."""
    from toolkit.inference import experts as program

    usual: dict[str, Any] = {"model_type": "full", "refiner_training": True, "refiner_training_strength": REFINED_SHARE}
    stars = bench.many_stars(1000)
    first = bench.train("first-expert", stars, steps=800, **usual, refiner_training_invert_schedule=True)
    second = bench.train("second-expert", stars, steps=800, **usual)
    pipeline = program.joined(*program.in_order(program.Expert.open(first), program.Expert.open(second)), "fp32", "cpu")
    both, base, scenes = pipeline.unet, loaded(MODEL).unet, held_out_stars()
    losses = {
        name: loss_of(network, pipeline, scenes)
        for name, network in {"demo's model": base, "the first alone": both.early, "the second alone": both.late, "both": both}.items()
    }
    together = losses.pop("both")
    for name, loss in losses.items():
        yield Figure(f"two experts, loss on stars: {name}", loss, "")
    yield Figure("both", together, "", at_most=min(losses.values()))
    yield from gain("two experts, stars right", stars_of(MODEL), share_right(scenes, check.ask(pipeline, scenes)), 0.7)


def loaded(model: Path) -> Any:
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_pretrained(model, dtype=torch.float32, local_files_only=True, add_watermarker=False)


@torch.no_grad()
def loss_of(network: Any, pipeline: Any, scenes: Sequence[Scene]) -> float:
    """Mean squared velocity error on drawn scenes, at timesteps spread evenly over the whole schedule."""
    schedule = pipeline.scheduler.alphas_cumprod
    numbers = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
    errors = []
    for index, scene in enumerate(scenes):
        generator = torch.Generator().manual_seed(HELD_OUT_SEED + index)
        mean = pipeline.vae.encode(to_tensor(draw(scene)).unsqueeze(0)).latent_dist.mean
        latents = mean * pipeline.vae.config.scaling_factor
        noise = torch.randn(latents.shape, generator=generator)
        timestep = torch.tensor([int(len(schedule) * (index + 0.5) / len(scenes))])
        signal, sigma = schedule[timestep].sqrt().view(1, 1, 1, 1), (1 - schedule[timestep]).sqrt().view(1, 1, 1, 1)
        states, _, pooled, _ = pipeline.encode_prompt(scene.caption, do_classifier_free_guidance=False)
        told = {"text_embeds": pooled, "time_ids": numbers}
        answer = network(signal * latents + sigma * noise, timestep, states, added_cond_kwargs=told).sample
        errors.append((answer - (signal * noise - sigma * latents)).square().mean().item())
    return statistics.mean(errors)


def refiner(bench: Bench) -> Iterator[Figure]:
    """Train a refiner from random weights on known shapes, then a LoRA on stars: the distance of refined images to the sharp ones."""
    start = write_refiner(bench.folder / "refiner-start")
    usual: dict[str, Any] = {"train_batch_size": 32, "learning_rate": 2e-3}
    base = bench.train(
        "refiner-base", bench.drawn(2000), steps=2500, pretrained_model_name_or_path=start, model_type="full", **usual
    ) / "pipeline"  # fmt: skip
    shapes = [random_scene(random.Random(HELD_OUT_SEED + number)) for number in range(48)]
    yield Figure("refiner from random weights, error on shapes: blurred", error_of(None, shapes), "of 255")
    yield Figure("before", error_of(start, shapes), "of 255")
    after = error_of(base, shapes)
    yield Figure("after", after, "of 255", at_most=0.8 * error_of(None, shapes))
    taught = bench.train(
        "refiner-stars", STARS, steps=1500, pretrained_model_name_or_path=base, model_type="lora", lora_targets=EVERYWHERE
    )  # fmt: skip
    stars = held_out_stars()
    yield Figure("LoRA on that refiner, error on stars: blurred", error_of(None, stars), "of 255")
    before = error_of(base, stars)
    yield Figure("before", before, "of 255")
    yield Figure("after", error_of(base, stars, taught / "pytorch_lora_weights.safetensors"), "of 255", at_most=0.97 * before)


def write_refiner(folder: Path) -> Path:
    """A refiner with the VAE and the second text encoder of the demo model, and a random U-Net."""
    from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

    from helpers.families.miniatures.parts import save_pipeline
    from helpers.families.miniatures.sd import TIME_ID_WIDTH

    base = StableDiffusionXLPipeline.from_pretrained(MODEL, local_files_only=True, add_watermarker=False)
    absent: Any = None
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 1, 2, 2),
        use_linear_projection=True,
        cross_attention_dim=base.text_encoder_2.config.hidden_size,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=SIZES.pooled_width + 5 * TIME_ID_WIDTH,
    )
    pipeline = StableDiffusionXLImg2ImgPipeline(
        vae=base.vae,
        text_encoder=absent,
        tokenizer=absent,
        text_encoder_2=base.text_encoder_2,
        tokenizer_2=base.tokenizer_2,
        unet=unet,
        scheduler=base.scheduler,
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    return save_pipeline(pipeline, folder)


def error_of(model: Path | None, scenes: Sequence[Scene], lora: Path | None = None) -> float:
    """Distance of blurred and refined scenes to the sharp ones: mean absolute pixel difference in [0, 255].

    With None instead of a model, the blurred scenes are measured.
    """
    sharp = [draw(scene) for scene in scenes]
    blurred = [image.filter(ImageFilter.GaussianBlur(BLUR_PX)) for image in sharp]
    refined = blurred if model is None else refined_by(model, scenes, blurred, lora)
    pairs = zip(refined, sharp, strict=True)
    return statistics.mean(float(np.abs(np.asarray(one, np.float32) - np.asarray(other, np.float32)).mean()) for one, other in pairs)


def refined_by(model: Path, scenes: Sequence[Scene], images: Sequence[Image.Image], lora: Path | None) -> list[Image.Image]:
    from diffusers import StableDiffusionXLImg2ImgPipeline

    pipeline = StableDiffusionXLImg2ImgPipeline.from_pretrained(model, dtype=torch.float32, local_files_only=True, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    if lora:
        pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    captions = [scene.caption for scene in scenes]
    made: list[Image.Image] = pipeline(
        captions,
        image=list(images),
        strength=REFINED_SHARE,
        num_inference_steps=50,
        guidance_scale=1.0,
        generator=[torch.Generator().manual_seed(number) for number in range(len(captions))],
    ).images
    return made


def controlnet(bench: Bench) -> Iterator[Figure]:
    """Train a ControlNet on silhouettes. They give a shape's position and size, which no caption does."""
    drawn = random.Random(2)
    scenes = [random_scene(drawn) for _ in range(2000)]
    images, silhouettes = bench.written("scenes", scenes), bench.written("silhouettes", [silhouette(s) for s in scenes], captioned=False)
    output = bench.train(
        "controlnet", images, steps=1500, conditions=silhouettes, controlnet=True, model_type="full", train_batch_size=8
    )  # fmt: skip
    asked = [random_scene(random.Random(HELD_OUT_SEED + number)) for number in range(48)]
    before = overlap(asked, check.generate(MODEL, asked))
    yield from gain("ControlNet, overlap with the silhouette", before, overlap(asked, following(output / "controlnet", asked)), 0.75)


def text_encoders(bench: Bench) -> Iterator[Figure]:
    """Learn a new word for a known shape with adapters on the text encoders; the U-Net is practically frozen."""
    drawn, pairs = random.Random(3), sorted(set(itertools.permutations(COLORS, 2)) - held_out_pairs())
    scenes = [random_scene(drawn, ("circle",), pairs[number % len(pairs)]) for number in range(400)]
    images = bench.written("circles", scenes, shape=WORD)
    still: dict[str, Any] = {"learning_rate": 1e-7, "lr_end": 1e-8, "lr_scheduler": "constant_with_warmup"}
    taught: dict[str, Any] = {"train_text_encoder": True, "text_encoder_lr": 2e-3, "text_encoder_limit": 100}
    output = bench.train("text-encoders", images, steps=300, model_type="lora", **still, **taught)
    circles = [Scene("circle", *pair) for pair in sorted(held_out_pairs()) for _ in range(3)]
    asked = [dataclasses.replace(scene, shape=WORD) for scene in circles]
    before, after = (
        share_right(circles, check.generate(MODEL, asked, lora=lora)) for lora in (None, output / "pytorch_lora_weights.safetensors")
    )
    yield from gain(f"text encoders, {WORD!r} is a circle", before, after, 0.5)


def silhouette(scene: Scene) -> Scene:
    """White where the shape is, black elsewhere."""
    return dataclasses.replace(scene, foreground="white", background="black")


def following(controlnet: Path, scenes: Sequence[Scene]) -> list[Image.Image]:
    """Generate images from the scenes' captions and silhouettes."""
    from diffusers import ControlNetModel, StableDiffusionXLControlNetPipeline

    parts = {**loaded(MODEL).components, "controlnet": ControlNetModel.from_pretrained(controlnet, local_files_only=True)}
    pipeline = StableDiffusionXLControlNetPipeline(**parts, add_watermarker=False)
    images: list[Image.Image] = []
    for number, scene in enumerate(scenes):
        images += check.ask(pipeline, [scene], image=draw(silhouette(scene)), first=number)
    return images


def overlap(scenes: Sequence[Scene], images: Sequence[Image.Image]) -> float:
    """Mean intersection over union of the pixels closer to the shape's color than to the background's, in images and in true scenes."""
    shares = []
    for scene, image in zip(scenes, images, strict=True):
        true, made = (_of_the_shape(scene, each) for each in (draw(scene), image))
        shares.append((true & made).sum() / (true | made).sum())
    return float(statistics.mean(shares))


def _of_the_shape(scene: Scene, image: Image.Image) -> Any:
    """(H, W) booleans."""
    pixels = np.asarray(image.convert("RGB"), np.float32)
    near, far = (np.linalg.norm(pixels - np.array(COLORS[color]), axis=2) for color in (scene.foreground, scene.background))
    return near < far


PARTS: Mapping[str, Callable[[Bench], Iterator[Figure]]] = {
    "lora": lora,
    "bitfit": bitfit,
    "experts": experts,
    "refiner": refiner,
    "controlnet": controlnet,
    "text_encoders": text_encoders,
}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="part", help=f"any of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--folder", type=Path, help="folder to keep the runs in (default: a temporary folder)")
    parser.add_argument("--share", type=float, default=1.0, help="share of the steps; less than 1 misses the gates (1)")
    chosen = parser.parse_args(argv)
    warnings.simplefilter("ignore")  # warnings of libraries about their own code
    diffusers.utils.logging.set_verbosity_error()
    kept = True
    with tempfile.TemporaryDirectory() as away:
        folder = (chosen.folder or Path(away)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for name in chosen.parts or PARTS:
            began = time.monotonic()
            figures = list(PARTS[name](Bench(folder, chosen.share)))
            print(table(figures))
            took, load = time.monotonic() - began, os.getloadavg()[0]
            print(f"{name}: {took:.0f} s; load average {load:.1f} on {os.cpu_count()} cores\n", flush=True)
            kept = kept and all(figure.kept for figure in figures)
    return int(not kept)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
