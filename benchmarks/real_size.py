"""Full-size networks with random weights: time and memory of LoRA steps at 256 pixels on a CPU, and the exported files.

    python -m benchmarks.real_size [--networks sd2 sd3 sdxl] [--kinds none nf4] [--steps 2] [--gradient_checkpointing]
    python -m benchmarks.real_size --weights

SDXL, Stable Diffusion 2.1 and Stable Diffusion 3 medium from their own configs, in float32, with the family, method, objective and engine
of a normal run. Weights, text embeddings and latents are random, so nothing is downloaded. Each network runs in a process of its own.
Memory is the process's peak resident size: while the network is built, which needs the full network, and during the steps after that. The
tensor names in the LoRA files must match published ones (benchmarks/published_names.py); otherwise the exit code is 1. `--weights` only
computes the size of the weights of a bf16 run for each --base_quantization, which takes seconds and allocates no weights.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.published_names import PUBLISHED

EDGE = 256  # pixels
GIB = 2**30
KINDS = ("none", "int8", "fp8", "nf4")
UNET = {"sample_size": 96, "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "use_linear_projection": True}
CROSS_DOWN, CROSS_UP, DOWN, UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D", "DownBlock2D", "UpBlock2D"


@dataclass(frozen=True)
class Network:
    """The architecture of a published network, and the shapes of its text conditioning for one caption."""

    family: str
    miniature: str  # the miniature whose folder provides everything except the network
    role: str
    kind: str  # its diffusers class
    config: Mapping[str, Any]
    text: Mapping[str, tuple[int, ...]]


NETWORKS = {
    "sd2": Network(
        "sd2x",
        "sd2",
        "unet",
        "UNet2DConditionModel",
        {
            **UNET,
            "block_out_channels": (320, 640, 1280, 1280),
            "down_block_types": (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN),
            "up_block_types": (UP, CROSS_UP, CROSS_UP, CROSS_UP),
            "attention_head_dim": (5, 10, 20, 20),
            "cross_attention_dim": 1024,
        },
        {"prompt_embeds": (77, 1024)},
    ),
    "sd3": Network(
        "sd3",
        "sd3",
        "transformer",
        "SD3Transformer2DModel",
        {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
        },
        {"clip": (77, 2048), "pooled": (2048,), "t5": (256, 4096)},
    ),
    "sdxl": Network(
        "sdxl",
        "sdxl",
        "unet",
        "UNet2DConditionModel",
        {
            **UNET,
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": (DOWN, CROSS_DOWN, CROSS_DOWN),
            "up_block_types": (CROSS_UP, CROSS_UP, UP),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        {"prompt_embeds": (77, 2048), "pooled": (1280,)},
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_size", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["none"], help="--base_quantization")
    parser.add_argument("--steps", type=int, default=2, help="number of steps; with more than one, the first is not counted")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--weights", action="store_true", help="only compute the size of the weights")
    parser.add_argument("--alone", action="store_true", help="measure one network and kind in this process, and print JSON")
    options = parser.parse_args(arguments)
    if options.weights:
        return count_weights(options.networks)
    if options.alone:
        print(json.dumps(measured(options.networks[0], options.kinds[0], options.steps, options.gradient_checkpointing)))
        return 0
    print("| network | base | weights | trained | a step | RAM while building | RAM during steps | names |")
    print("|---|---|---:|---:|---:|---:|---:|---|")
    good = True
    for name in options.networks:
        for kind in options.kinds:
            row = in_a_process(name, kind, options.steps, options.gradient_checkpointing)
            good = good and row["names"]
            names = "as published" if row["names"] else "DIFFER"
            made, peak = row["made"] / GIB, row["peak"] / GIB
            what = f"{name}, {row['size'] / 1e6:,.1f} M | {kind} | {row['bytes'] / GIB:.2f} GiB | {row['trained'] / 1e6:.2f} M"
            print(f"| {what} | {row['seconds']:.1f} s | {made:.1f} GiB | {peak:.1f} GiB | {names} |", flush=True)
    print(f"load average {os.getloadavg()[0]:.1f} at the end")
    return 0 if good else 1


def count_weights(names: Sequence[str]) -> int:
    """Print the size of each network's weights for each kind. The weights are on torch's "meta" device, which stores only shapes."""
    import torch

    from helpers.methods.quantized_base import bytes_of, quantize

    print(f"| network | {' | '.join('bf16' if kind == 'none' else kind for kind in KINDS)} |")
    print(f"|---|{'---:|' * len(KINDS)}")
    torch.set_default_dtype(torch.bfloat16)  # of weights created from here on
    for name in names:
        sizes = []
        for kind in KINDS:
            with torch.device("meta"):
                network = random_network(NETWORKS[name]).denoiser
                if kind != "none":
                    quantize(network, kind, torch.device("meta"))
            sizes.append(f"{bytes_of(network) / GIB:.2f} GiB")
        print(f"| {name} | {' | '.join(sizes)} |", flush=True)
    return 0


def in_a_process(name: str, kind: str, steps: int, checkpointing: bool) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.real_size", "--alone", "--networks", name, "--kinds", kind, "--steps", str(steps)]
    command += ["--gradient_checkpointing"] * checkpointing
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def measured(name: str, kind: str, count: int, checkpointing: bool) -> dict[str, Any]:
    """Measure one network in this process: sizes, time and memory of its steps, and whether its files have the published names."""
    import torch
    from accelerate import Accelerator

    from helpers.config.options import AdapterOptions, ObjectiveOptions, OptimizerOptions, RunOptions
    from helpers.methods.lora import Lora
    from helpers.methods.quantized_base import bytes_of, count_weights, quantize
    from helpers.objectives import OBJECTIVES
    from helpers.training.engine import Engine
    from helpers.training.memory import apply_memory_options
    from helpers.training.runtime import Runtime
    from helpers.training.schedules import Schedule
    from helpers.training.stopping import StopRequest
    from train import train_step

    network = NETWORKS[name]
    torch.manual_seed(1)
    with tempfile.TemporaryDirectory() as folder:
        family = family_of(network, Path(folder))
        parts = random_network(network)
        size = count_weights(parts.denoiser)
        if kind != "none":
            quantize(parts.denoiser, kind, torch.device("cpu"))
        weights = bytes_of(parts.denoiser)
        method = Lora(AdapterOptions(), family)
        trainable = method.attach(parts)
        apply_memory_options(trainable.denoiser, RunOptions(gradient_checkpointing=checkpointing), family.facts.options)
        runtime = Runtime(Accelerator(cpu=True), StopRequest(), "no", [], [])
        options = dataclasses.replace(OptimizerOptions(), optimizer="adamw")
        engine = Engine(runtime, trainable, options, Schedule("constant", 1e-4, 0.0, 0, 100))
        objective = OBJECTIVES[family.facts.objective](ObjectiveOptions(), family.scheduler_config)
        made = largest_resident()
        forget_largest_resident()
        took = []
        for step in range(count):
            began = time.perf_counter()
            batch = random_batch(family.latents.channels, network.text, step)
            with engine.micro_batch(last=True):
                losses, _ = train_step(family, objective, engine.denoiser, batch, runtime.device)
                engine.backward(losses, batch.loss_weight, 1)
            if not engine.step(seed=1, step=step, updates=step, global_samples=1).taken:
                raise RuntimeError("a gradient was not finite")
            took.append(time.perf_counter() - began)
        peak = largest_resident()
        files = method.export(trainable, Path(folder) / "handed_over", family.scheduler_config, None)
        return {
            "size": size,
            "bytes": weights,
            "trained": sum(parameter.numel() for parameter in trainable.parameters.values()),
            "seconds": min(took[1:] or took),
            "made": made,
            "peak": peak,
            "names": names_in(files) == PUBLISHED[name],
        }


def family_of(network: Network, folder: Path) -> Any:
    """The family opened on a miniature's folder with the network's full-size config. The network's weights are never read."""
    from helpers.config.options import CacheOptions, ModelOptions
    from helpers.families import FAMILIES
    from helpers.families.tiny import MINIATURES

    write: Callable[[Path], Path] = MINIATURES[network.miniature]
    model = write(folder / "model")
    file = model / network.role / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **network.config}), encoding="utf-8")
    options = dataclasses.replace(ModelOptions(), pretrained_model_name_or_path=str(model))
    return FAMILIES[network.family](options, dataclasses.replace(CacheOptions(), cache_dir=folder / "cache"))


def random_network(network: Network) -> Any:
    import diffusers

    from helpers.protocols import Parts

    return Parts(getattr(diffusers, network.kind)(**network.config), network.role)


def random_batch(channels: int, text: Mapping[str, tuple[int, ...]], step: int) -> Any:
    """One sample of random latents and text."""
    import torch

    from helpers.data.base.draws import StepDraws
    from helpers.data.base.sample import Geometry, Size
    from helpers.data.batches import Batch

    square = Size(EDGE, EDGE)
    return Batch(
        latents=torch.randn(1, channels, EDGE // 8, EDGE // 8),
        text={name: torch.randn(1, *shape) for name, shape in text.items()},
        captions=("",),
        samples=(),
        geometry=(Geometry(square, square, top=0, left=0, target=square),),
        loss_weight=torch.ones(1),
        draws=StepDraws(seed=1, step=step, places=(0,), step_samples=1),
        epoch=0,
    )


def names_in(files: Sequence[Path]) -> dict[str, set[str]]:
    from safetensors import safe_open

    names = {}
    for file in files:
        with safe_open(file, "pt") as stored:
            names[file.name] = set(stored.keys())
    return names


def largest_resident() -> int:
    """Peak resident bytes since the process started or since `forget_largest_resident`. Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def forget_largest_resident() -> None:
    """Reset the peak, after the allocator has returned free memory: otherwise it would keep that of the network before quantization."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    sys.exit(main())
