"""The golden runs: what each trains, on what data, with which flags.

Only the command line is used (`train.py`, a wrapper, `python -m helpers.families.tiny`), so that code may move underneath.

The numbers of a run must be the same on every x86 processor up to rounding. Three choices see to that:

- Latents and text are cached in float32. Rounding to fp16 would turn a difference in the last bit into one of 1/2048.
- Adam divides each gradient by its own size, so its first steps are nearly signs: where a gradient is nearly zero, the last bit decides
  the direction. With `adam_epsilon` well above the gradients the step is proportional to the gradient, and moments, bias correction and
  weight decay still count. The learning rate is high to make up for it.
- The steps are few, so that differences do not grow.

Every option whose default may change is set here.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from tests.warm import Finished, run_program
from tests.warm_python import warm_python

ROOT = Path(__file__).resolve().parents[2]
SIZES = ((64, 64), (96, 64), (64, 96), (160, 80))  # width, height of the images in turn; trained at 64 pixels
PLAIN = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
COLORS = ("red", "green", "blue", "yellow", "purple")

USUAL: Mapping[str, object] = {
    "seed": 7,
    "mixed_precision": "no",
    "cache_dtype": "fp32",
    "vae_dtype": "fp32",
    "resolution": 64,
    "resolution_type": "pixel",
    "aspect_bucket_alignment": 64,
    "num_train_epochs": 0,
    "max_train_steps": 4,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "checkpointing_steps": 2,
    "optimizer": "adamw",
    "adam_beta1": 0.9,
    "adam_beta2": 0.99,
    "adam_weight_decay": 0.01,
    "adam_epsilon": 1.0,
    "max_grad_norm": 0,
    "learning_rate": 0.1,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "caption_dropout_probability": 0.25,
    "caption_strategy": "textfile",
    "validation_disable_unconditional": True,
    "validation_steps": 0,
    "record_samples": True,
    "report_to": "none",
}
LORA: Mapping[str, object] = {"model_type": "lora", "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0, "learning_rate": 1.0}
FULL: Mapping[str, object] = {"model_type": "full"}


@dataclass(frozen=True)
class Dataset:
    """An image dataset: `count` generated images, and further keys of its dataloader entry."""

    count: int = 6
    keys: Mapping[str, object] = field(default_factory=dict)
    first: int = 0  # number of its first image


@dataclass(frozen=True)
class GoldenRun:
    """One run. `stops` are steps at which it ends before it is resumed."""

    model: str  # name of the miniature
    flags: Mapping[str, object]
    datasets: Mapping[str, Dataset] = field(default_factory=lambda: {"images": Dataset()})
    processes: int = 1
    stops: Sequence[int] = ()


CROPPED = {"crop": True, "crop_style": "random", "crop_aspect": "preserve", "flip": True}
REDRAWN = {"crop_aspect": "random", "crop_aspect_buckets": [0.5, 1, 2], "vae_cache_clear_each_epoch": True}
REGULARISATION = {"is_regularisation_data": True, "loss_weight": 0.5, "ignore_epochs": True, "probability": 0.2}

GOLDEN: Mapping[str, GoldenRun] = {
    "sdxl_lora": GoldenRun("sdxl", {**LORA, "lora_dropout": 0.2, "snr_gamma": 5, "max_grad_norm": 0.05, "gradient_accumulation_steps": 2}),
    "sdxl_full_ema": GoldenRun(
        "sdxl",
        {
            **FULL,
            "use_ema": True,
            "ema_decay": 0.99,
            "offset_noise": True,
            "noise_offset": 0.1,
            "noise_offset_probability": 0.5,
            "lr_scheduler": "cosine",
            "lr_end": 0.01,
            "lr_warmup_steps": 2,
        },
    ),
    "sd2_v_prediction": GoldenRun(
        "sd2", {**FULL, "model_family": "sd2x", "rescale_betas_zero_snr": True, "input_perturbation": 0.1, "latent_sampling": "sample"}
    ),
    "sd3_flow": GoldenRun(
        "sd3", {**FULL, "model_family": "sd3", "weighting_scheme": "logit_normal", "flow_shift": 3, "sd3_caption_dropout": "apart"}
    ),
    "flux_lora": GoldenRun("flux", {**LORA, "model_family": "flux", "tokenizer_max_length": 32, "flux_guidance": 1}),
    "pixart_lora": GoldenRun("pixart_sigma", {**LORA, "model_family": "pixart_sigma", "gradient_checkpointing": True}),
    "hunyuan_lokr": GoldenRun(
        "hunyuan_dit", {**LORA, "model_family": "hunyuan_dit", "lora_algorithm": "lokr", "loss": "huber", "huber_delta": 0.3}
    ),
    "controlnet": GoldenRun(
        "sdxl",
        {**FULL, "controlnet": True},
        {
            "images": Dataset(keys={**CROPPED, "conditioning_data": "edges", "disable_validation": True}),
            "edges": Dataset(keys={"dataset_type": "conditioning"}, first=1),
        },
    ),
    "several_datasets": GoldenRun(
        "sdxl",
        {**LORA, "max_train_steps": 12, "checkpointing_steps": 12, "timestep_bias_strategy": "later", "timestep_bias_multiplier": 2},
        {
            "redrawn": Dataset(8, {**CROPPED, **REDRAWN}),
            "repeated": Dataset(4, {**CROPPED, "crop_aspect": "square", "repeats": 1, "probability": 0.3, "shuffle_tags": True}, first=8),
            "regularisation": Dataset(4, REGULARISATION, first=12),
        },
    ),
    "two_processes": GoldenRun(
        "sdxl", {**LORA, "use_ema": True, "max_train_steps": 3, "checkpointing_steps": 3}, {"images": Dataset(7, CROPPED)}, processes=2
    ),
    "text_encoder": GoldenRun(
        "sd2",
        {
            **FULL,
            "model_family": "sd2x",
            "rescale_betas_zero_snr": False,
            "train_text_encoder": True,
            "text_encoder_lr": 0.05,
            "text_encoder_limit": 75,
            "freeze_encoder_strategy": "before",
            "freeze_encoder_before": 1,
        },
    ),
    "resumed": GoldenRun(
        "sdxl", {**LORA, "use_ema": True, "use_dora": True, "use_rslora": True, "lr_scheduler": "polynomial", "lr_end": 0.1}, stops=(2,)
    ),
}


def run(name: str, folder: Path, model: Path, checkout: Path = ROOT) -> Path:
    """Run the golden run `name` in the empty `folder` on its miniature `model`, with the trainer of `checkout` => the output folder."""
    golden, output = GOLDEN[name], folder / "output"
    _write_data(golden, folder)
    settings = {
        **USUAL,
        "pretrained_model_name_or_path": model,
        "data_backend_config": folder / "data.json",
        "output_dir": output,
        **golden.flags,
    }
    for steps in (*golden.stops, settings["max_train_steps"]):
        _train(golden, folder, [f"--{key}={value}" for key, value in {**settings, "max_train_steps": steps}.items()], checkout)
    return output


def write_miniature(family: str, folder: Path, checkout: Path = ROOT) -> Path:
    """Write a miniature by the command of `checkout` => the model's folder."""
    _succeed(run_program(["-m", "helpers.families.tiny", family, str(folder)], folder.parent, PLAIN, checkout))
    return folder


def _train(golden: GoldenRun, folder: Path, flags: Sequence[str], checkout: Path) -> None:
    if golden.processes == 1:
        return _succeed(run_program([str(checkout / "train.py"), *flags], folder, PLAIN, checkout))
    settings = folder / "empty-env.sh"
    settings.touch()
    processes = {"ENV_FILE": str(settings), "SIMPLETUNER_PYTHON": warm_python(), "TRAINING_NUM_PROCESSES": str(golden.processes)}
    command = ["bash", str(checkout / "train_sdxl.sh"), *flags]
    environment = {**os.environ, **PLAIN, **processes}
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    _succeed(Finished(done.returncode, done.stdout))


def _succeed(finished: Finished) -> None:
    if finished.code:
        raise RuntimeError(f"exit code {finished.code}\n{finished.output}")


def _write_data(golden: GoldenRun, folder: Path) -> None:
    entries: list[Mapping[str, object]] = []
    for name, dataset in golden.datasets.items():
        (folder / name).mkdir(parents=True)
        for number in range(dataset.count):
            _write_image(folder / name / f"image_{number:02}.png", number, dataset.first + number)
        entries.append({"id": name, "type": "local", "instance_data_dir": str(folder / name), **dataset.keys})
    (folder / "data.json").write_text(json.dumps(entries), encoding="utf-8")


def _write_image(path: Path, number: int, seed: int) -> None:
    """Sloping bands in three colors, and its caption. `number` chooses the size, `seed` the pattern."""
    width, height = SIZES[number % len(SIZES)]
    y, x = np.mgrid[0:height, 0:width]
    waves = [(x * (seed % 5 + channel + 1) + y * (seed % 7 + 2) * (channel + 1)) % 256 for channel in range(3)]
    Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8)).save(path)
    caption = f"a {COLORS[seed % len(COLORS)]} circle, small, on the sea, number {seed}"
    path.with_suffix(".txt").write_text(caption, encoding="utf-8")
