"""How long an optimizer step takes, compared with the same step written by hand in plain torch and diffusers.

    python -m benchmarks.training_step [--sizes middle miniature] [--methods lora full] [--steps 4] [--rounds 9] [--profile]

Both loops train the same U-Net in float32 on the same cached latents and text embeddings, with noise, AdamW, adapter dropout and gradient
clipping, on one thread. The bare loop holds its batches in memory. Ours reads them from the caches in its background thread, computes its
random numbers from step and position, and writes metrics.jsonl. Before the measurement, both must give the same loss for the same noise.

There are two times. The time of a step is wall-clock time, without the first step of a round, for which our background thread has only just
started. CPU time is that of all threads over the whole round: it leaves nothing out, and other work on the machine does not count.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor
from torch.nn import functional

from benchmarks.material import new_run, run_settings, write_photographs
from benchmarks.measure import Figure, compared, conclude, in_turns, parser, profile
from helpers.config.config import Config
from helpers.data.batches import Batch
from helpers.data.prepare import prepare_data
from helpers.data.training_data import TrainingData
from helpers.families import FAMILIES
from helpers.families.miniatures.sdxl import SdxlSizes, write_sdxl
from helpers.methods import METHODS
from helpers.objectives import OBJECTIVES
from helpers.protocols import ModelFamily, Reporter
from helpers.reporting.records import Records
from helpers.setup.datasets import data_settings, workers
from helpers.training.engine import Engine
from helpers.training.runtime import Runtime, start_runtime
from helpers.training.schedules import Schedule
from helpers.training.state import TrainState
from helpers.training.steps import step_result, timed
from helpers.training.stopping import StopRequest
from train import train_step

MOST_OF_BARE = 1.05  # time of a step, relative to the bare loop
MOST_WAITING = 0.01  # waiting for data, relative to the time of a step
IMAGES, BATCH = 24, 4

# middle: a step takes 0.3 to 1 s on one thread, long enough that our overhead is realistic relative to the network.
SIZES = {
    "middle": (SdxlSizes(unet_channels=(64, 128, 256), unet_heads=(1, 2, 4), unet_transformers=(1, 1, 2), unet_groups=32), 256),
    "miniature": (SdxlSizes(), 128),
}


class Took(NamedTuple):
    """Milliseconds of a step."""

    clock: float
    processor: float


@dataclass(frozen=True)
class Tensors:
    """A batch of the bare loop: the network's inputs, on the CPU, in float32."""

    latents: Tensor  # (B, 4, h, w)
    states: Tensor  # (B, 77, D)
    pooled: Tensor  # (B, P)
    time_ids: Tensor  # (B, 6)


class Bare:
    """The bare loop: torch, diffusers and peft, without our code."""

    def __init__(self, model: Path, config: Config) -> None:
        self.schedule = DDPMScheduler.from_pretrained(model / "scheduler")
        self.unet = UNet2DConditionModel.from_pretrained(model / "unet").train()
        if config.method_name == "lora":
            self.unet.requires_grad_(False)
            targets = ["to_q", "to_k", "to_v", "to_out.0"]
            self.unet.add_adapter(LoraConfig(r=16, lora_alpha=16, lora_dropout=0.1, target_modules=targets))
        self.parameters = [parameter for parameter in self.unet.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=1e-2)

    def loss(self, batch: Tensors, noise: Tensor, timesteps: Tensor) -> Tensor:
        noisy = self.schedule.add_noise(batch.latents, noise, timesteps)
        added = {"text_embeds": batch.pooled, "time_ids": batch.time_ids}
        prediction = self.unet(noisy, timesteps, encoder_hidden_states=batch.states, added_cond_kwargs=added).sample
        return functional.mse_loss(prediction, noise)

    def step(self, batch: Tensors) -> float:
        noise = torch.randn_like(batch.latents)
        timesteps = torch.randint(0, 1000, (len(noise),))
        loss = self.loss(batch, noise, timesteps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 2.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def steps(self, batches: Sequence[Tensors]) -> Took:
        took = []
        processor_began = time.process_time()
        for batch in batches:
            began = time.perf_counter()
            self.step(batch)
            took.append(time.perf_counter() - began)
        return took_of(took[1:], (time.process_time() - processor_began) / len(batches))


class Ours:
    """Our loop, as in train.py, from the caches to metrics.jsonl, without checkpoints and validation."""

    def __init__(self, config: Config, runtime: Runtime, family: ModelFamily, data: TrainingData) -> None:
        self.runtime, self.family, self.data = runtime, family, data
        self.objective = OBJECTIVES[config.objective_name](config.objective, family.scheduler_config, family.latents.patch)
        method = METHODS[config.method_name](config.adapter, family)
        optimizer = config.replaced("settled", optimizer=method.default_optimizer("no")).optimizer
        trainable = method.attach(family.load(method.weights_dtype("no", optimizer.optimizer)))
        self.engine = Engine(runtime, trainable, optimizer, Schedule.create(config.schedule, 1_000_000))
        self.state = TrainState(seed=1)
        self.records = Records(config.run.output_dir, 0, record_samples=False)
        self.counted, self.waited = 0.0, 0.0  # seconds of all counted steps, and their seconds of waiting for data

    def steps(self, count: int) -> Took:
        took = []
        processor_began = time.process_time()
        for batches, waited, began in timed(self.data.steps(self.state.step, self.state.step + count)):
            self.step(batches, waited, began)
            took.append(time.perf_counter() - began)
            if len(took) > 1:
                self.counted += took[-1]
                self.waited += waited
        return took_of(took[1:], (time.process_time() - processor_began) / count)

    def step(self, batches: Sequence[Batch], waited: float, began: float) -> None:
        state = self.state
        for number, batch in enumerate(batches):
            self.runtime.seed("dropout", state.seed, state.step, number)
            with self.engine.micro_batch(last=number == len(batches) - 1):
                losses, _ = train_step(self.family, self.objective, self.engine.denoiser, batch, self.runtime.device)
                self.engine.backward(losses, batch.loss_weight, batch.global_samples)
        update = self.engine.step(state.seed, state.step, state.updates, batches[0].global_samples)
        state.advance(update.taken)
        self.records.stepped(step_result(state, update, batches, began, waited))


def took_of(steps: Sequence[float], processor: float) -> Took:
    """From the wall-clock seconds of each step, and the mean CPU seconds of a step."""
    return Took(statistics.median(steps) * 1e3, processor * 1e3)


def tensors_of(batch: Batch) -> Tensors:
    """SDXL's size conditioning, computed by hand: original height and width, top and left of the crop, target height and width."""
    numbers = [(cut.original.height, cut.original.width, cut.top, cut.left, cut.target.height, cut.target.width) for cut in batch.geometry]
    return Tensors(batch.latents, batch.text["prompt_embeds"].float(), batch.text["pooled"].float(), torch.tensor(numbers).float())


def require_same_loss(bare: Bare, ours: Ours) -> None:
    """Check that both loops do the same work: with the same noise and without dropout they compute the same loss."""
    (batch,) = next(iter(ours.data.steps(0, 1)))
    corrupted = ours.objective.corrupt(batch.latents, batch.draws)
    for network in (bare.unet, ours.engine.denoiser):
        network.eval()
    with torch.no_grad():
        losses, _ = train_step(ours.family, ours.objective, ours.engine.denoiser, batch, ours.runtime.device)
        expected = bare.loss(tensors_of(batch), corrupted.target, corrupted.timesteps)
    for network in (bare.unet, ours.engine.denoiser):
        network.train()
    torch.testing.assert_close(losses.mean(), expected, rtol=1e-4, atol=1e-6)


@contextmanager
def loops(folder: Path, model: Path, images: Path, resolution: int, method: str) -> Iterator[tuple[Bare, Ours]]:
    """Both loops with the same model and images, everything cached."""
    changed = {"model_type": method, "train_batch_size": BATCH, "cache_dir": folder / "cache"}
    config = run_settings(folder / method, model, images, resolution, **changed)
    with start_runtime(config.run, config.cache.cache_dir, config.given, StopRequest()) as runtime:
        family = FAMILIES[config.family_name](config.model, config.cache)
        settings = data_settings(new_run(config, runtime))
        data = prepare_data(config.datasets, settings, family, workers(runtime), Reporter())
        bare, ours = Bare(model, config), Ours(config, runtime, family, data)
        require_same_loss(bare, ours)
        yield bare, ours
        ours.records.close()


def measured(bare: Bare, ours: Ours, name: str, steps: int, rounds: int) -> list[Figure]:
    """Alternate steps of both loops."""
    held = [tensors_of(batch) for (batch,) in ours.data.steps(0, steps)]
    bare.steps(held)  # warm-up: the first steps allocate memory and create the optimizer state
    ours.steps(steps)
    ours.counted, ours.waited = 0.0, 0.0
    took = in_turns(rounds, lambda: bare.steps(held), lambda: ours.steps(steps))
    clock = [(theirs.clock, mine.clock) for theirs, mine in took]
    processor = [(theirs.processor, mine.processor) for theirs, mine in took]
    overhead = statistics.median(mine - theirs for theirs, mine in processor)
    gated = name.startswith("middle")  # a step of the miniature is mostly Python in both loops, so only its milliseconds are meaningful
    most, most_waiting = (MOST_OF_BARE, 100 * MOST_WAITING) if gated else (None, None)
    return [
        compared(f"{name}, a step", "ms", clock, at_most=most),
        compared(f"{name}, CPU time", "ms", processor, at_most=most),
        Figure(f"{name}, overhead", overhead, "ms"),
        Figure(f"{name}, waiting for data", 100 * ours.waited / ours.counted, "%", at_most=most_waiting),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    options.add_argument("--methods", nargs="+", choices=("lora", "full"), default=["lora", "full"])
    options.add_argument("--steps", type=int, default=4, help="steps of each loop per round")
    options.set_defaults(rounds=9)
    chosen = options.parse_args(arguments)
    torch.set_num_threads(1)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as place:
        images = write_photographs(Path(place) / "images", IMAGES)
        for size in chosen.sizes:
            sizes, resolution = SIZES[size]
            model = write_sdxl(Path(place) / size / "model", sizes=sizes)
            for method in chosen.methods:
                with loops(Path(place) / size, model, images, resolution, method) as (bare, ours):
                    figures += measured(bare, ours, f"{size} {method}", chosen.steps, chosen.rounds)
                    if chosen.profile:
                        held = [tensors_of(batch) for (batch,) in ours.data.steps(0, chosen.steps)]
                        profile(f"{size} {method}, bare", partial(bare.steps, held))
                        profile(f"{size} {method}, ours", partial(ours.steps, chosen.steps))
    return conclude(figures, chosen.rounds)


if __name__ == "__main__":
    sys.exit(main())
