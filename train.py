#!/usr/bin/env python3
"""Train a diffusion model: the story of a run, from its settings to the files it hands over.

`python train.py --help` lists the options; the wrappers (`train_sdxl.sh` ...) start this with the settings of an env file.
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
from typing import TYPE_CHECKING, Any, cast

from helpers import ranks
from helpers.assembly import (
    attached,
    begin_report,
    begun_with,
    chosen_axes,
    data_settings,
    find_start,
    hand_over,
    join_reporters,
    look_at_data,
    make_validator,
    of_the_base_model,
    run_identity,
    settled,
    text_encoder_stop,
    total_steps,
    try_on_this_device,
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
    from helpers.protocols import (
        Corrupted,
        ModelFamily,
        Objective,
        TextTrainer,
    )
    from helpers.reporting import Reporters
    from helpers.training.runtime import Runtime

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
    from helpers.reporting.console import Console, Speaker

    first = os.environ.get("RANK", "0") == "0"
    report = Reporters(Console() if first else Speaker(f"process {os.environ['RANK']}"))
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
    from helpers.data.order import OrderStart
    from helpers.data.prepare import prepare_data
    from helpers.reporting.contact_sheet import write_contact_sheet
    from helpers.training.checkpoints import Checkpointer
    from helpers.training.ema import Average
    from helpers.training.engine import Engine
    from helpers.training.learner import Learner
    from helpers.training.live_text import LiveText
    from helpers.training.schedules import Schedule
    from helpers.training.steps import in_order, sample_rows, step_result, timed

    if config.run.dataset_report:
        config = without_weights(config, runtime)
    # Which network, which weights, which loss: each refuses here what it cannot do, before hours of caching.
    config = of_the_base_model(config, runtime, report)
    family, method, objective = chosen_axes(config)
    for note in family.notes:
        report.chapter("", note)
    prompts, from_pictures = begun_with(config, family, report)
    gc.freeze()
    gc.enable()

    checkpoints = Checkpointer(config.checkpoints, config.run.output_dir)
    found, state, accumulation = find_start(checkpoints, config, runtime, report)
    if config.run.dataset_report:
        return look_at_data(config, runtime, found, state, accumulation, family, report)
    config = settled(config, runtime, method, state, accumulation)
    try_on_this_device(config, runtime, method)

    identity = run_identity(config, family, objective)
    if found:
        found.require_same_run(identity)
    else:
        method.try_on(family.load(None))

    # Encode every image and caption once, then let the encoders go: they and the network share the GPU only where the user wants that.
    settings = data_settings(config, family, runtime, found, state, accumulation, prompts, from_pictures)
    data = prepare_data(config.datasets, settings, family, workers(runtime), report)
    if found and (changed := found.changed_data(data.fingerprint(like=found.content["data"]), config.data.accept_changed_data)):
        state.order = OrderStart(state.step, found.content["untouched_epoch"])
        now = f"epoch {state.order.epoch} begins with step {state.step + 1:,} on what is there now"
        report.chapter("dataset", f"changed since {found.folder.name} and accepted ({', '.join(changed)}): {now}")

    runtime.seed("initial weights", state.seed)  # of an adapter: the same on every process
    trainable = attached(config, runtime, family, method, report)
    total = total_steps(config, data, accumulation * runtime.world_size, state.order)
    schedule = Schedule.create(config.schedule, total)
    if found and schedule.bends_with_length and total != (planned := found.content["total_steps"]):
        laid = f"--lr_scheduler={schedule.name} was laid over {planned:,} steps and now is over {total:,}"
        report.chapter("", f"the learning rate bends: {laid}")
    text_stop = text_encoder_stop(config, found, total, report)
    text_rate = (config.text_encoder.text_encoder_lr or config.schedule.learning_rate) / config.schedule.learning_rate
    engine = Engine(runtime, trainable, config.optimizer, schedule, config.run.gradient_precision, text_rate, text_stop)
    live = LiveText(cast("TextTrainer", family), trainable, engine) if trainable.text_encoders else None
    average = Average(trainable.parameters, config.ema) if config.ema.use_ema else None
    learner = Learner(method, trainable, engine, average)
    if found:
        learner.restore(found)
        if runtime.is_main and (left := checkpoints.set_newer_aside(found.step)):
            report.chapter("checkpoint", f"later than {found.folder.name} and set aside: {', '.join(path.name for path in left)}")
    validator = make_validator(config, runtime, family, objective, data, prompts, state, live)

    def save() -> None:
        if runtime.is_main:  # it writes for all: weights, optimiser and average are the same everywhere
            position = {
                "state": state.to_json(),
                "total_steps": total,
                **({"text_encoder_stop": text_stop} if live else {}),
                "untouched_epoch": data.untouched_epoch(state.step, state.order),
                "identity": identity,
                "data": data.fingerprint(),
                "undecodable": data.undecodable,
                "batch": {"gradient_accumulation_steps": accumulation, "processes": runtime.world_size},
            }
            report.saved(state.step, checkpoints.save(state.step, learner, position))
            data.remember_undecodable()
        runtime.wait_for_everyone()

    def validate() -> None:
        if runtime.is_main and (validator.due(state.step) or state.step in (0, total)) and validator.missing(state.step):
            with learner.averaged():
                images = validator.run(trainable, state.step)
            write_contact_sheet(validator.folder)
            report.validated(state.step, images)
        runtime.wait_for_everyone()

    if runtime.is_main:
        join_reporters(config, state, total, report)
    length = f"from step {state.step:,} to {total:,}"
    report.chapter("training", f"{family.facts.title} · {trainable.description} · {length} · {data.describe()}")
    validate()
    for batches, waited, began in timed(data.steps(state.step, total, state.order)):
        rows: list[dict[str, Any]] = []
        for number, batch in enumerate(batches):
            runtime.seed("dropout", state.seed, state.step, number * runtime.world_size + runtime.rank)  # by place in the step
            with engine.micro_batch(last=number == len(batches) - 1):
                told = live.told(batch, state.step) if live else batch
                losses, corrupted = train_step(family, objective, engine.denoiser, told, runtime.device)
                engine.backward(losses, batch.loss_weight.to(losses.device), batch.global_samples, batch.size)
            if config.data.record_samples:
                rows += sample_rows(state.step + 1, batch, corrupted, losses)
        update = engine.step(state.seed, state.step, state.updates, batches[0].global_samples)
        state.advance(update.taken, MOST_SKIPPED[runtime.mixed_precision], batches[-1].samples, empty=not update.samples)
        if average is not None and update.taken:
            average.update(state.updates)
        if config.data.record_samples:
            report.sampled(in_order(runtime.gather(rows)))
        report.stepped(step_result(state, update, batches, began, waited))
        if (checkpoints.due(state.step) and update.taken) or update.stop_asked or state.step == total:
            save()
        if update.stop_asked and state.step < total:
            data.close()
            raise Interrupted(f"step {state.step:,} of {total:,} is done and saved; start again to go on.")
        validate()
        if config.run.accelerator_cache_clear_interval and state.step % config.run.accelerator_cache_clear_interval == 0:
            runtime.clear_cache()

    if state.skipped_in_a_row == state.step:
        raise TrainingError("Not one step had a finite loss and gradient: nothing was learnt, and nothing is handed over.")
    if runtime.is_main:
        report.finished(state.step, hand_over(config, learner, objective))


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
