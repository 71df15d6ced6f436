"""A new run, or the checkpoint that a run resumes from, and what may not change in between."""

from __future__ import annotations

import dataclasses
import json
import secrets
from typing import TYPE_CHECKING, Any

from helpers.config.declare import options_of
from helpers.setup.run import Run, StartPoint
from helpers.training.checkpoints import Checkpointer
from helpers.training.state import TrainState, resume_accumulation

if TYPE_CHECKING:
    from helpers.config.config import Config
    from helpers.data.training_data import TrainingData
    from helpers.reporting import Reporters
    from helpers.training.learner import Learner
    from helpers.training.runtime import Runtime


def find_start(config: Config, runtime: Runtime, report: Reporters) -> StartPoint:
    """The checkpoint to resume from, or a new run with its seed. CheckpointError if neither is allowed."""
    checkpoints = Checkpointer(config.checkpoints, config.run.output_dir)
    if runtime.is_main:
        checkpoints.tidy()
    runtime.wait_for_everyone()
    checkpoint = checkpoints.find(lambda text: report.chapter("checkpoint", text))
    asked = config.run.gradient_accumulation_steps
    if checkpoint is None:
        seed = config.run.seed if config.run.seed > 0 else runtime.gather(1 + secrets.randbelow(2**31))[0]
        return StartPoint(None, TrainState(seed), asked)
    report.chapter("checkpoint", f"resuming from {checkpoint.name}")
    accumulation, note = resume_accumulation(checkpoint.content["batch"], asked, runtime.world_size, checkpoint.name)
    if note:
        report.chapter("", note)
    return StartPoint(checkpoint, TrainState.from_json(checkpoint.content["state"]), accumulation)


def check_start(run: Run) -> None:
    """A resumed run must have the settings that its checkpoint was trained with; in a new one the method must fit the network.

    Raises CheckpointError or ConfigError, before hours of caching.
    """
    if run.start.checkpoint:
        run.start.checkpoint.require_same_run(identity(run))
    else:
        run.method.check(run.family.load(None))


def identity(run: Run) -> dict[str, Any]:
    """The settings that may not change on resume, besides the data: JSON values by option name."""
    config = run.config
    adapter = dataclasses.asdict(config.adapter) if config.model.model_type == "lora" else {}
    encoders = dataclasses.asdict(config.text_encoder) if config.text_encoder.train_text_encoder else {}
    text = {name: value for name, value in encoders.items() if name != "text_encoder_lr"}  # may change, like the learning rate
    if config.model.controlnet:
        adapter = {"controlnet_model_name_or_path": config.model.controlnet_model_name_or_path}
    loss = dataclasses.asdict(config.objective)
    own = {item.name for chosen in config.model.family_sections for item in options_of(type(chosen)) if not item.alias_of}
    sampling_only = ("inference_scheduler_timestep_spacing", "training_scheduler_timestep_spacing")
    values = {
        "model": run.family.identity,
        "model_family": config.family_name,
        "model_type": config.method_name,
        "seed": config.run.seed,
        "train_batch_size": config.data.train_batch_size,
        "caption_dropout_probability": config.data.caption_dropout_probability,
        **{name: value for name, value in config.values().items() if name in own},
        "tokenizer_max_length": config.model.tokenizer_max_length,
        "long_captions": config.model.long_captions,
        "latent_sampling": config.cache.latent_sampling,
        "mixed_precision": config.run.mixed_precision,
        "optimizer": config.optimizer.optimizer,
        "optimizer_args": config.optimizer.optimizer_args,
        "base_quantization": config.run.base_quantization,
        "use_ema": config.ema.use_ema,
        **adapter,
        **text,
        **{name: value for name, value in {**loss, **run.objective.identity}.items() if name not in sampling_only},
    }
    return json.loads(json.dumps(values, default=str))  # as a checkpoint holds them: tuples become lists


def set_newer_aside(run: Run) -> None:
    """Rename the checkpoints after the one that the user asked to resume from, so that `latest` does not pick them next time."""
    checkpoint = run.start.checkpoint
    if run.runtime.is_main and checkpoint and (renamed := run.checkpoints.set_newer_aside(checkpoint.step)):
        names = ", ".join(path.name for path in renamed)
        run.report.chapter("checkpoint", f"later than {checkpoint.name} and set aside: {names}")


def position(run: Run, data: TrainingData, learner: Learner, total: int) -> dict[str, Any]:
    """What a checkpoint holds besides weights and optimizer: JSON values from which a resumed run continues exactly."""
    state = run.state
    return {
        "state": state.to_json(),
        "total_steps": total,
        **({"text_encoder_stop": learner.engine.text_stop} if learner.trainable.text_encoders else {}),
        "untouched_epoch": data.untouched_epoch(state.step, state.order),
        "identity": identity(run),
        "data": data.fingerprint(),
        "undecodable": data.undecodable,
        "batch": {"gradient_accumulation_steps": run.start.accumulation, "processes": run.runtime.world_size},
    }
