#!/usr/bin/env python3
"""Train a diffusion model: the story of a run, from its settings to the files it hands over.

`python train.py --help` lists the options; the wrappers (`train_sdxl.sh` ...) start this with the settings of an env file.
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from helpers import ranks
from helpers.assembly import (
    StartPoint,
    begin_report,
    captions_of_pictures,
    check_device,
    chosen_axes,
    data_settings,
    find_start,
    go_on_with_changed_data,
    hand_over,
    join_reporters,
    look_at_data,
    make_learner,
    make_validator,
    of_the_base_model,
    run_identity,
    say_what_validation_leaves_out,
    settled,
    subjects_of_pictures,
    total_steps,
    without_weights,
    workers,
)
from helpers.choices import known_facts
from helpers.config.config import Config
from helpers.config.read import read_config
from helpers.errors import (
    EXIT_FAULT,
    EXIT_FINISHED,
    EXIT_INTERRUPTED,
    EXIT_REFUSED,
    ConfigError,
    Interrupted,
    StorageError,
    TrainingError,
    UserError,
)
from helpers.threads import wait_briefly
from helpers.training.stopping import StopRequest

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from helpers.data.batches import Batch
    from helpers.data.training_data import TrainingData
    from helpers.protocols import Corrupted, ModelFamily, Objective
    from helpers.reporting import Reporters
    from helpers.training.checkpoints import Checkpointer
    from helpers.training.learner import Learner
    from helpers.training.live_text import LiveText
    from helpers.training.runtime import Runtime
    from helpers.training.validation import Validator

MOST_SKIPPED = {"no": 3, "bf16": 3, "fp16": 20}  # steps in a row without a finite gradient; fp16 first has to find its loss scale


def main() -> int:
    """Run, and say how it ended by the exit code (helpers/errors.py)."""
    ranks.tie_to_launcher(os.environ)
    wait_briefly(os.environ)
    stop = StopRequest().listen()
    try:
        config = read_config(sys.argv[1:], os.environ, known_facts())  # all mistakes at once, before torch is imported
    except ConfigError as error:
        print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
        return ranks.record_exit(os.environ, EXIT_REFUSED)

    from helpers.reporting import Reporters
    from helpers.reporting.console import Console, FailureReporter

    first = os.environ.get("RANK", "0") == "0"
    report = Reporters(Console() if first else FailureReporter(f"process {os.environ['RANK']}"))
    code = EXIT_FAULT
    try:
        train(config, stop, report)
        code = EXIT_FINISHED
    except Interrupted as left:
        report.failed(str(left))
        code = EXIT_INTERRUPTED
    except UserError as error:
        report.failed(str(error))
        code = EXIT_REFUSED
    except (StorageError, TrainingError) as error:
        report.failed(str(error))
    except Exception:
        traceback.print_exc()
    finally:
        report.close()
    return ranks.record_exit(os.environ, code)


def train(config: Config, stop: StopRequest, report: Reporters) -> None:
    """One life of a run: it begins anew or goes on from a checkpoint, and ends finished, or saved and interrupted."""
    gc.disable()  # while libraries are imported: it would go through half a million new objects again and again, and find nothing
    from helpers.training.runtime import start_runtime

    if config.run.max_train_seconds is not None:
        stop.after(config.run.max_train_seconds)
    folders = {"--output_dir": config.run.output_dir, "--cache_dir": config.cache.cache_dir}
    with start_runtime(config.run, folders, config.given, stop) as runtime:  # processes, device, precision, locks on its folders
        if runtime.is_main:
            begin_report(config, runtime, report)
        run(config, runtime, report)


def run(config: Config, runtime: Runtime, report: Reporters) -> None:
    """Put the run together, each part refusing at once what it cannot do; then train, and hand over what was learnt."""
    from helpers.data.prepare import prepare_data
    from helpers.training.checkpoints import Checkpointer
    from helpers.training.live_text import live_text

    if config.run.dataset_report:
        config = without_weights(config, runtime)
    # Which network, which weights, which loss.
    config = of_the_base_model(config, runtime, report)
    family, method, objective = chosen_axes(config)
    for note in family.notes:
        report.chapter("", note)
    say_what_validation_leaves_out(config, family, report)
    gc.freeze()
    gc.enable()

    checkpoints = Checkpointer(config.checkpoints, config.run.output_dir)
    beginning = find_start(checkpoints, config, runtime, report)
    if config.run.dataset_report:
        return look_at_data(config, runtime, beginning, family, report)
    config = settled(config, runtime, method, beginning)
    check_device(config, runtime, method)
    identity = run_identity(config, family, objective)
    if beginning.found:
        beginning.found.require_same_run(identity)
    else:
        method.check(family.load(None))

    # Encode every image and caption once, then let the encoders go: they and the network share the GPU only where the user wants that.
    settings = data_settings(config, family, runtime, beginning, captions_of_pictures(config, family))
    data = prepare_data(config.datasets, settings, family, workers(runtime), report)
    go_on_with_changed_data(config, beginning, data, report)

    total = total_steps(config, runtime, data, beginning)
    learner = make_learner(config, runtime, family, method, beginning, total, report)
    if runtime.is_main and beginning.found and (left := checkpoints.set_newer_aside(beginning.found.step)):
        names = ", ".join(path.name for path in left)
        report.chapter("checkpoint", f"later than {beginning.found.folder.name} and set aside: {names}")
    trainable, engine, state = learner.trainable, learner.engine, beginning.state
    live = live_text(family, trainable, engine)
    validator = make_validator(config, runtime, family, objective, subjects_of_pictures(config, family, data, live), state.seed)

    if runtime.is_main:
        join_reporters(config, state, total, report)
    length = f"from step {state.step:,} to {total:,}"
    report.chapter("training", f"{family.facts.title} · {trainable.description} · {length} · {data.describe()}")
    Training(
        config=config,
        runtime=runtime,
        report=report,
        family=family,
        objective=objective,
        data=data,
        learner=learner,
        live=live,
        validator=validator,
        checkpoints=checkpoints,
        identity=identity,
        beginning=beginning,
        total=total,
    ).advance()
    if state.skipped_in_a_row == state.step:
        raise TrainingError("Not one step had a finite loss and gradient: nothing was learnt, and nothing is handed over.")
    if runtime.is_main:
        report.finished(state.step, hand_over(config, learner, objective))


@dataclass(frozen=True, kw_only=True)
class Training:
    """A run put together, from its first step in this life to its last."""

    config: Config
    runtime: Runtime
    report: Reporters
    family: ModelFamily
    objective: Objective
    data: TrainingData
    learner: Learner
    live: LiveText | None  # where text encoders are trained
    validator: Validator
    checkpoints: Checkpointer
    identity: Mapping[str, Any]
    beginning: StartPoint  # its state advances
    total: int

    def advance(self) -> None:
        """All that happens, in the order in which it happens. Raises Interrupted, saved, when the run is asked to stop."""
        from helpers.training.steps import in_order, step_result, timed

        runtime, report, data, state, total = self.runtime, self.report, self.data, self.beginning.state, self.total
        average, clear_every = self.learner.average, self.config.run.accelerator_cache_clear_interval
        self.validate()
        for batches, waited, began in timed(data.steps(state.step, total, state.order)):
            rows = self.add_gradients(batches)
            update = self.learner.engine.step(state.seed, state.step, state.updates, batches[0].global_samples)
            state.advance(update.taken, MOST_SKIPPED[runtime.mixed_precision], batches[-1].samples, empty=not update.samples)
            if average is not None and update.taken:
                average.update(state.updates)
            if self.config.data.record_samples:
                report.sampled(in_order(runtime.gather(rows)))
            report.stepped(step_result(state, update, batches, began, waited))
            if (self.checkpoints.due(state.step) and update.taken) or update.stop_asked or state.step == total:
                self.save()
            if update.stop_asked and state.step < total:
                data.close()
                raise Interrupted(f"step {state.step:,} of {total:,} is done and saved; start again to go on.")
            self.validate()
            if clear_every and state.step % clear_every == 0:
                runtime.clear_cache()

    def add_gradients(self, batches: Sequence[Batch]) -> list[dict[str, Any]]:
        """Forward and backward pass of each micro-batch of a step. => what is recorded of its samples, if it is"""
        from helpers.training.steps import sample_rows

        runtime, state, engine = self.runtime, self.beginning.state, self.learner.engine
        rows: list[dict[str, Any]] = []
        for number, batch in enumerate(batches):
            runtime.seed("dropout", state.seed, state.step, number * runtime.world_size + runtime.rank)  # by place in the step
            with engine.micro_batch(last=number == len(batches) - 1):
                told = self.live.told(batch, state.step) if self.live else batch
                losses, corrupted = train_step(self.family, self.objective, engine.denoiser, told, runtime.device)
                engine.backward(losses, batch.loss_weight.to(losses.device), batch.global_samples, batch.size)
            if self.config.data.record_samples:
                rows += sample_rows(state.step + 1, batch, corrupted, losses)
        return rows

    def save(self) -> None:
        if self.runtime.is_main:  # it writes for all: weights, optimiser and average are the same everywhere
            data, state = self.data, self.beginning.state
            position = {
                "state": state.to_json(),
                "total_steps": self.total,
                **({"text_encoder_stop": self.learner.engine.text_stop} if self.live else {}),
                "untouched_epoch": data.untouched_epoch(state.step, state.order),
                "identity": self.identity,
                "data": data.fingerprint(),
                "undecodable": data.undecodable,
                "batch": {"gradient_accumulation_steps": self.beginning.accumulation, "processes": self.runtime.world_size},
            }
            self.report.saved(state.step, self.checkpoints.save(state.step, self.learner, position))
            data.remember_undecodable()
        self.runtime.wait_for_everyone()

    def validate(self) -> None:
        """Make the pictures of this step that it is to have and that are not there yet."""
        from helpers.reporting.contact_sheet import write_contact_sheet

        step, validator = self.beginning.state.step, self.validator
        if self.runtime.is_main and (validator.due(step) or step in (0, self.total)) and validator.missing(step):
            with self.learner.averaged():
                images = validator.run(self.learner.trainable, step)
            write_contact_sheet(validator.folder)
            self.report.validated(step, images)
        self.runtime.wait_for_everyone()


def train_step(
    family: ModelFamily, objective: Objective, denoiser: nn.Module, batch: Batch, device: torch.device
) -> tuple[Tensor, Corrupted]:
    """The whole of diffusion training: add noise, ask the network, compare. => (B,) losses, and what the network saw."""
    corrupted = objective.corrupt(batch.latents.to(device), batch.draws)
    prediction = family.predict(denoiser, corrupted.noisy, corrupted.timesteps, family.conditioning(batch, device))
    return objective.loss(prediction, corrupted), corrupted


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # everything is written; taking the libraries down object by object would cost another second
