"""The trained weights, their optimizer, schedule and average, in the state in which the run was last saved."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from helpers.config.optimizer_rules import highest_rate
from helpers.methods.lora import frozen_dtype
from helpers.methods.quantized_base import bytes_of, quantize
from helpers.methods.text_encoders import add_text_encoders
from helpers.protocols import can_train_text_encoders
from helpers.training.ema import Average
from helpers.training.engine import Engine
from helpers.training.learner import Learner
from helpers.training.live_text import text_stop
from helpers.training.memory import apply_memory_options, choose_attention
from helpers.training.schedules import Schedule

if TYPE_CHECKING:
    import torch

    from helpers.config.config import Config
    from helpers.protocols import Parts, Trainable
    from helpers.setup.run import Run

LOW_MEAN = 0.25  # a mean learning rate below this share of its peak is reported


def make_learner(run: Run, total: int) -> Learner:
    """Load the network, attach the method, build the optimizer and the average, and restore what the checkpoint holds."""
    config = run.config
    run.runtime.seed("initial weights", run.state.seed)  # of an adapter: the same on every process
    trainable = _attach_method(run)
    schedule = _schedule(run, total)
    stop = _text_encoder_stop(run, total)
    text_rate = _text_encoder_rate(config) / config.schedule.learning_rate
    engine = Engine(run.runtime, trainable, config.optimizer, schedule, config.run.gradient_precision, text_rate, stop)
    average = Average(trainable.parameters, config.ema) if config.ema.use_ema else None
    learner = Learner(run.method, trainable, engine, average)
    if run.start.checkpoint:
        learner.restore(run.start.checkpoint)
    return learner


def _attach_method(run: Run) -> Trainable:
    """Attach the method to the network, and switch on the memory options. => what is trained"""
    options = run.config.run
    parts = _load_network(run)
    if run.config.text_encoder.train_text_encoder:
        _load_text_encoders(run, parts)
    trainable = run.method.attach(parts)
    apply_memory_options(trainable.denoiser, options, run.family.facts.options)
    if options.gradient_checkpointing:
        for encoder in trainable.text_encoders.values():
            encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    choose_attention(options.attention)
    return trainable


def _load_network(run: Run) -> Parts:
    """The network of the base model in the method's precision, with --base_lora, quantized if the user asked for it."""
    parts = run.family.load(_weights_dtype(run))
    parts.frozen_dtype = frozen_dtype(run.runtime.mixed_precision)
    parts.report = run.report
    if run.base_lora:
        layers = run.base_lora.merge(parts.denoiser, run.runtime.device)
        run.report.chapter("model", f"{run.base_lora.path.name} is added to {layers} layers while training, and not exported")
    if (kind := run.config.run.base_quantization) != "none":
        before = bytes_of(parts.denoiser)
        quantize(parts.denoiser, kind, run.runtime.device)
        after = bytes_of(parts.denoiser)
        run.report.chapter("model", f"weights in {kind}: {after / 2**30:,.2f} GiB instead of {before / 2**30:,.2f}")
    return parts


def _load_text_encoders(run: Run, parts: Parts) -> None:
    """Add the text encoders that are trained with the network."""
    freezes = run.config.model.model_type == "full"
    assert can_train_text_encoders(run.family), "the settings refuse --train_text_encoder for other families"
    add_text_encoders(parts, run.family, run.config.text_encoder, _weights_dtype(run), freezes)


def _weights_dtype(run: Run) -> torch.dtype:
    return run.method.weights_dtype(run.runtime.mixed_precision, run.config.optimizer.optimizer)


def _schedule(run: Run, total: int) -> Schedule:
    """The learning-rate schedule. Reports by how much new settings or a new length change the rate of the next step."""
    schedule, checkpoint = Schedule.create(run.config.schedule, total), run.start.checkpoint
    if checkpoint:
        kept = {name: value for name, value in checkpoint.content["settings"].items() if name in vars(run.config.schedule)}
        planned = Schedule.create(dataclasses.replace(run.config.schedule, **kept), checkpoint.content["total_steps"])
        now, then = schedule(run.state.updates), planned(run.state.updates)
        if now != then:
            next_step = f"step {run.state.step + 1:,} has the learning rate {now:.3g}"
            run.report.chapter("", f"{next_step}; with the settings and the length of {checkpoint.name} it would be {then:.3g}")
    if schedule.mean < schedule.rate * LOW_MEAN:
        run.report.chapter("", _low_mean(schedule))
    return schedule


def _low_mean(schedule: Schedule) -> str:
    settings = f"--lr_scheduler={schedule.name} and --lr_warmup_steps={schedule.warmup_steps}"
    return (
        f"the learning rate averages {schedule.mean:.2g} over these {schedule.total_steps:,} steps, "
        f"{schedule.mean / schedule.rate:.0%} of its peak of {schedule.rate:.2g}: with {settings}, little is learned. "
        "Lower --lr_warmup_steps, or set --lr_scheduler=constant_with_warmup"
    )


def _text_encoder_stop(run: Run, total: int) -> int:
    """The step, counted from 0, at which training of the text encoders stops. Decided when the run starts; a resumed run keeps it."""
    config, checkpoint = run.config, run.start.checkpoint
    if not config.text_encoder.train_text_encoder:
        return 0
    stop = text_stop(config.text_encoder.text_encoder_limit, total, checkpoint.content["text_encoder_stop"] if checkpoint else None)
    chosen = config.optimizer
    peak = highest_rate(chosen.optimizer, chosen.optimizer_args, chosen.adafactor_relative_step, _text_encoder_rate(config))
    run.report.chapter("text", f"the text encoders are trained up to step {min(stop, total):,}, at {peak}")
    return stop


def _text_encoder_rate(config: Config) -> float:
    """The learning rate of the text encoders at the peak of the schedule."""
    return config.text_encoder.text_encoder_lr or config.schedule.learning_rate
