"""A new run, or the checkpoint that a run resumes from, and what may not change in between."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

from helpers.choices import known_axes
from helpers.config.resume import compare, run_settings
from helpers.setup.run import Run, StartPoint
from helpers.storage.memo import Memo, digest_of
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
    checkpoints = Checkpointer(config.checkpoints, config.run.output_dir, lambda text: report.chapter("checkpoint", text))
    checkpoint = checkpoints.find()
    asked = config.run.gradient_accumulation_steps
    if checkpoint is None:
        seed = config.run.seed if config.run.seed > 0 else runtime.gather(1 + secrets.randbelow(2**31))[0]
        return StartPoint(None, TrainState(seed), asked, checkpoints)
    report.chapter("checkpoint", f"resuming from {checkpoint.name}")
    accumulation = resume_accumulation(checkpoint.content["batch"], asked, runtime.world_size, checkpoint.name)
    return StartPoint(checkpoint, TrainState.from_json(checkpoint.content["state"]), accumulation, checkpoints)


def check_start(run: Run) -> None:
    """A resumed run may change only what its options' declarations allow, which is reported; in a new one the method must fit.

    Raises CheckpointError or ConfigError, before hours of caching.
    """
    checkpoint = run.start.checkpoint
    if checkpoint is None:
        _check_method(run)
        return
    changes = compare(checkpoint.content["settings"], settings(run), run.config, known_axes(), checkpoint.step)
    changes.refuse(checkpoint.name)
    for sentence in changes.allowed:
        run.report.chapter("", sentence)


def _check_method(run: Run) -> None:
    """ConfigError where the method does not fit the network. What fitted once is remembered: building the network takes seconds.

    If that is wrong, because of an update or a file that changed under its name, the same error comes later, when the method is attached.
    """
    config, memo = run.config, Memo(run.config.cache.cache_dir / "memo")
    lora = run.base_lora.digest if run.base_lora else None
    inputs = digest_of(config.method_name, vars(config.adapter), vars(config.model), run.family.identity, lora)
    if memo.load_value(f"the method fits {inputs}", inputs):
        return
    outline = run.family.load(None)
    if run.base_lora:
        run.base_lora.check(outline.denoiser)
    run.method.check(outline)
    memo.save_value(f"the method fits {inputs}", inputs, True)


def settings(run: Run) -> dict[str, Any]:
    """Every setting with an effect on this run, as its checkpoints keep it, with what the base model and the objective decided."""
    rules = run.config.adapter.lora_layers
    files = {"lora_layers_content": rules.read_text(encoding="utf-8")} if rules else {}
    if run.base_lora:
        files["base_lora"] = f"a file of SHA-256 {run.base_lora.digest}"  # wherever it is
    return run_settings(run.config, known_axes(), {"base_model_hash": run.family.identity, **run.objective.identity, **files})


def set_newer_aside(run: Run) -> None:
    """Rename the checkpoints after the one that the run resumes from: the damaged ones, or those that the user goes back behind."""
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
        "settings": settings(run),
        "data": data.fingerprint(),
        "undecodable": data.undecodable,
        "batch": {"gradient_accumulation_steps": run.start.accumulation, "processes": run.runtime.world_size},
    }
