#!/usr/bin/env python3
"""Train a diffusion model: the story of a run, from its settings to the exported weights.

`python train.py --help` lists the options; the wrappers (`train_sdxl.sh` ...) start this with the settings of an env file.
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from helpers import errors, ranks
from helpers.choices import known_axes
from helpers.config.config import Config
from helpers.config.read import read_config
from helpers.library_settings import remove_library_settings
from helpers.streams import make_unfailing
from helpers.threads import wait_briefly
from helpers.training.stopping import StopRequest

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from helpers.data.batches import Batch
    from helpers.data.training_data import TrainingData
    from helpers.protocols import Corrupted, ModelFamily, Objective
    from helpers.reporting import Reporters
    from helpers.setup.run import Run
    from helpers.training.learner import Learner
    from helpers.training.live_text import LiveText
    from helpers.training.runtime import Runtime
    from helpers.training.validation import Validator


def main() -> int:
    """Run, and return how it ended as an exit code (helpers/errors.py)."""
    ranks.tie_to_launcher(os.environ)
    wait_briefly(os.environ)
    stop = StopRequest().listen()
    try:
        ignored = [] if ranks.has_launcher(os.environ) else remove_library_settings(os.environ)
        config = read_config(sys.argv[1:], os.environ, known_axes())  # all mistakes at once, before torch is imported
    except errors.ConfigError as error:
        print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
        return ranks.record_exit(os.environ, errors.EXIT_REFUSED)

    from helpers.reporting import Reporters
    from helpers.reporting.console import Console, FailureReporter
    from helpers.storage.database import close_databases

    first = os.environ.get("RANK", "0") == "0"
    report = Reporters(Console() if first else FailureReporter(f"process {os.environ['RANK']}"))
    for note in ignored:
        report.chapter("", note)
    code = errors.EXIT_FAULT
    try:
        train(config, stop, report)
        code = errors.EXIT_FINISHED
    except errors.Interrupted as error:
        report.failed(str(error))
        code = errors.EXIT_INTERRUPTED
    except errors.UserError as error:
        report.failed(str(error))
        code = errors.EXIT_REFUSED
    except (errors.StorageError, errors.TrainingError) as error:
        report.failed(str(error))
    except Exception:
        traceback.print_exc()
    finally:
        report.close()
        close_databases()
    return ranks.record_exit(os.environ, code)


def train(config: Config, stop: StopRequest, report: Reporters) -> None:
    """Start a run, or resume it; it ends finished, or saved and interrupted."""
    gc.disable()  # while libraries are imported: it would go through half a million new objects again and again, and find nothing
    from helpers.setup.outputs import open_report
    from helpers.training.runtime import start_runtime

    if config.run.max_train_seconds is not None:
        stop.after(config.run.max_train_seconds)
    with start_runtime(config.run, config.cache.cache_dir, config.given, stop) as runtime:  # processes, device, precision, locks
        if runtime.is_main:
            open_report(config, runtime, report)
        set_up_and_train(config, runtime, report)


def set_up_and_train(config: Config, runtime: Runtime, report: Reporters) -> None:
    """Set the run up, train, and export what was learned. Each part of the set-up refuses at once what it cannot do."""
    from helpers.setup import datasets, learning, machine, model, outputs, resume, validation
    from helpers.setup.run import Run
    from helpers.training.live_text import live_text
    from helpers.training.steps import refuse_export

    # The base model and the settings decide family, method and objective; OUTPUT_DIR decides whether the run resumes.
    config = model.resolve_base_model(config, runtime, report)
    family, method, objective = model.choose_axes(config)
    for note in (*family.notes, *model.zero_snr_notes(config, family, objective)):
        report.chapter("", note)
    validation.note_unused_options(config, family, report)
    gc.freeze()
    gc.enable()
    start = resume.find_start(config, runtime, report)
    run = Run(config, runtime, report, family, method, objective, start, model.read_base_lora(config, family))
    if config.run.dataset_report:
        return datasets.report_on_data(run)
    run = machine.resolve_for_machine(run)
    machine.check_machine(run)
    resume.check_start(run)

    # Encode every image and caption once. Then the encoders leave memory before the network comes, unless the user wants both there.
    data = datasets.prepare(run)
    total = datasets.total_steps(run, data)

    learner = learning.make_learner(run, total)
    live = live_text(family, learner.trainable, learner.engine)
    resume.set_newer_aside(run)
    validator = validation.make_validator(run, data, live)
    if runtime.is_main:
        outputs.join_reporters(run, total)
    steps = outputs.describe_steps(run.state.step, total)
    report.chapter("training", f"{family.facts.title} · {learner.trainable.description} · {steps} · {data.describe()}")
    Training(run, data, learner, live, validator, total).advance()
    refuse_export(run.state, runtime.mixed_precision, run.checkpoints)
    if runtime.is_main:
        run.checkpoints.proved_good()  # as far as it will ever be
        report.finished(run.state.step, outputs.export(run, learner))


@dataclass(frozen=True)
class Training:
    """A run that is set up, from its first step after this start to its last."""

    run: Run
    data: TrainingData
    learner: Learner
    live: LiveText | None  # if text encoders are trained
    validator: Validator
    total: int  # steps

    def advance(self) -> None:
        """Everything that happens, in the order in which it happens. Raises Interrupted, after saving, when the run is asked to stop."""
        from helpers.training.steps import has_diverged, in_order, step_result, stop_if_diverged, timed

        config, runtime, report, state = self.run.config, self.run.runtime, self.run.report, self.run.state
        average, clear_every, total = self.learner.average, config.run.accelerator_cache_clear_interval, self.total
        precision, checkpoints = runtime.mixed_precision, self.run.checkpoints
        self.validate(is_saved=True)
        for batches, waited, began in timed(self.data.steps(state.step, total, state.order)):
            rows = self.add_gradients(batches)
            update = self.learner.engine.step(state.seed, state.step, state.updates, batches[0].global_samples)
            state.advance(update.taken, empty=not update.samples)
            stop_if_diverged(state, precision, batches[-1].samples, checkpoints)
            if average is not None and update.taken:
                average.update(state.updates)
            if config.data.record_samples:
                report.sampled(in_order(runtime.gather(rows)))
            report.stepped(step_result(state, update, batches, began, waited))
            if runtime.is_main and update.taken:
                checkpoints.proved_good()
            ends_well = state.step == total and not has_diverged(state, precision)
            is_due = (checkpoints.due(state.step) and update.taken) or update.save_asked
            if save := is_due or update.stop_asked or ends_well:
                self.save()
            if update.stop_asked and state.step < total:
                self.leave()
            self.validate(is_saved=save)
            if clear_every and state.step % clear_every == 0:
                runtime.clear_cache()

    def add_gradients(self, batches: Sequence[Batch]) -> list[dict[str, Any]]:
        """Forward and backward pass of each micro-batch of a step. => the records of its samples, if they are wanted"""
        from helpers.training.steps import sample_rows

        runtime, state, engine = self.run.runtime, self.run.state, self.learner.engine
        rows: list[dict[str, Any]] = []
        for number, batch in enumerate(batches):
            runtime.seed("dropout", state.seed, state.step, number * runtime.world_size + runtime.rank)  # by place in the step
            with engine.micro_batch(last=number == len(batches) - 1):
                encoded = self.live.encode(batch, state.step) if self.live else batch
                losses, corrupted = train_step(self.run.family, self.run.objective, engine.denoiser, encoded, runtime.device)
                engine.backward(losses, batch.loss_weight.to(losses.device), batch.global_samples, batch.size)
            if self.run.config.data.record_samples:
                rows += sample_rows(state.step + 1, batch, corrupted, losses)
        return rows

    def save(self) -> None:
        """Write a checkpoint, on the main process for all: weights, optimizer and average are the same on each."""
        from helpers.setup.resume import position

        if self.run.runtime.is_main:
            step = self.run.state.step
            self.run.report.saving(step)
            saved = self.run.checkpoints.save(step, self.learner, position(self.run, self.data, self.learner, self.total))
            self.run.report.saved(step, saved)
            self.data.remember_undecodable()
        self.run.runtime.wait_for_everyone()

    def leave(self) -> NoReturn:
        """Raise Interrupted. Everything up to here is saved."""
        from helpers.training.steps import interrupted

        self.data.close()
        raise interrupted(self.run.state.step, self.total)

    def validate(self, is_saved: bool) -> None:
        """Generate the images that are due at this step and not there yet.

        If a request to stop cuts this short, the run is saved at this step and Interrupted; it generates them when it resumes.
        """
        from helpers.reporting.contact_sheet import write_contact_sheet

        step, validator, runtime = self.run.state.step, self.validator, self.run.runtime
        cut_short = False
        if runtime.is_main and (validator.due(step) or step in (0, self.total)) and validator.missing(step):
            with self.learner.averaged():
                images = validator.run(self.learner.trainable, step)
            write_contact_sheet(validator.folder)
            self.run.report.validated(step, images)
            cut_short = validator.missing(step)
        [is_cut_short] = runtime.sum(float(cut_short))  # all processes wait here for the images
        if is_cut_short:
            if step and not is_saved:
                self.save()
            self.leave()


def train_step(
    family: ModelFamily, objective: Objective, denoiser: nn.Module, batch: Batch, device: torch.device
) -> tuple[Tensor, Corrupted]:
    """The whole of diffusion training: add noise, predict, compare. => the loss (B,) of each sample, and what the network was given."""
    corrupted = objective.corrupt(batch.latents.to(device), batch.draws)
    prediction = family.predict(denoiser, corrupted.noisy, corrupted.timesteps, family.conditioning(batch, device))
    mask = None if batch.mask is None else batch.mask.to(device)
    return objective.loss(prediction, corrupted, mask), corrupted


if __name__ == "__main__":
    make_unfailing()
    code = main()
    os._exit(code)  # everything is written; taking the libraries down object by object would cost another second
