"""How long a CPU step takes alone and next to busy programs, with PyTorch's default waiting of threads and with ours.

    python -m benchmarks.shared_cores [--rounds 5] [--seconds 4]

The step is a forward and backward pass of the demo's U-Net. Each measurement has a process of its own, because the way that threads wait is
fixed when torch is loaded. The busy programs are endless loops, one per core.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.measure import LEAST_ROUNDS, Figure, compared, conclude, in_turns
from helpers.threads import SETTLE_IT, wait_briefly

UNET = Path("demo/model/unet")
MOST_ALONE = 1.1  # relative to the default's time, when nothing else runs
MOST_BESIDE = 0.5  # relative to the default's time, next to busy programs


def step_milliseconds(seconds: float) -> float:
    """Mean time of the steps that this process takes in some seconds."""
    import torch
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(UNET)
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    words = torch.randn(4, 77, unet.config.cross_attention_dim)
    added = {"text_embeds": torch.randn(4, pooled), "time_ids": torch.randn(4, 6)}
    latents, timesteps = torch.randn(4, unet.config.in_channels, 16, 16), torch.tensor([5, 250, 500, 900])

    def step() -> None:
        unet(latents, timesteps, words, added_cond_kwargs=added).sample.square().mean().backward()

    step()
    steps, began = 0, time.perf_counter()
    while time.perf_counter() < began + seconds:
        step()
        steps += 1
    return 1000 * (time.perf_counter() - began) / steps


def measured(environ: Mapping[str, str], seconds: float) -> float:
    """Milliseconds of a step in a new process."""
    command = [sys.executable, "-m", "benchmarks.shared_cores", "--seconds", str(seconds), "--one"]
    told = subprocess.run(command, env=dict(environ), check=True, stdout=subprocess.PIPE, text=True)
    return float(told.stdout)


@contextlib.contextmanager
def busy_programs(count: int) -> Iterator[None]:
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def figures(rounds: int, seconds: float) -> list[Figure]:
    default = {name: value for name, value in os.environ.items() if name not in SETTLE_IT}
    ours = dict(default)
    wait_briefly(ours)
    told = []
    for name, programs, most in (("alone", 0, MOST_ALONE), ("next to busy programs", os.cpu_count() or 1, MOST_BESIDE)):
        with busy_programs(programs):
            taken = in_turns(rounds, lambda: measured(default, seconds), lambda: measured(ours, seconds))
        told.append(compared(f"a step, {name}", "ms", taken, at_most=most))
    return told


def main(arguments: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=LEAST_ROUNDS, help=f"alternating rounds (default {LEAST_ROUNDS})")
    options.add_argument("--seconds", type=float, default=4, help="seconds for which each process takes steps (default 4)")
    options.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # for the measured process
    chosen = options.parse_args(arguments)
    if chosen.one:
        print(step_milliseconds(chosen.seconds))
        return 0
    return conclude(figures(chosen.rounds, chosen.seconds), chosen.rounds)


if __name__ == "__main__":
    sys.exit(main())
