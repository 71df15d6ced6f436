"""What a run writes besides checkpoints: its reports and metrics, and the exported weights at the end."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.config.rules import VALIDATION_FOLDER
from helpers.families.original.single_file import modelspec_of_model, write_single_file
from helpers.methods.full import PIPELINE
from helpers.reporting.html_report import PAGE, HtmlReport
from helpers.setup.model import sampler_class
from helpers.training.request_files import remove_old_requests, watch

if TYPE_CHECKING:
    from helpers.config.config import Config
    from helpers.reporting import Reporters
    from helpers.setup.run import Run
    from helpers.training.learner import Learner
    from helpers.training.runtime import Runtime


def open_report(config: Config, runtime: Runtime, report: Reporters) -> None:
    """Print the settings that the run starts with, and add the HTML report of the datasets."""
    report.members.append(HtmlReport(config.run.output_dir))
    report.chapter("settings", config.describe())
    for note in (*config.notes, *runtime.notes):
        report.chapter("", note)
    if old := remove_old_requests(config.run.output_dir):
        report.chapter("", f"removed from an earlier run: {', '.join(old)} in {config.run.output_dir}")
    watch(config.run.output_dir, runtime.stop)
    logging.getLogger("helpers").debug("variables of the env file that are not ours: %s", ", ".join(config.passed_variables) or "none")


def describe_steps(step: int, total: int) -> str:
    """Which steps this start trains: `from step 100 to 3,000`, or that there is nothing left to train."""
    if step < total:
        return f"from step {step:,} to {total:,}"
    return f"already at step {step:,} of {total:,}, nothing to train (a larger --max_train_steps or --num_train_epochs continues)"


def join_reporters(run: Run, total: int) -> None:
    """Add the metrics files and trackers. Rows of steps later than this start are removed from the files."""
    from helpers.reporting.records import Records
    from helpers.reporting.trackers import Trackers

    config, state, report = run.config, run.state, run.report
    records = Records(config.run.output_dir, state.step, config.data.record_samples)
    for note in records.notes:
        report.chapter("", note)
    report.members.append(records)
    report.members.append(Trackers(config.reporting, config.run.output_dir, state.trackers, state.step))
    report.started(config.values(), total)


def export(run: Run, learner: Learner) -> list[Path]:
    """Write the trained weights in the formats that other tools load => them, and the curves and images worth a look."""
    from helpers.reporting.contact_sheet import SHEET
    from helpers.reporting.loss_curve import write_loss_curve

    folder = run.config.run.output_dir
    weights = learner.export(folder, {**run.objective.scheduler_config, "_class_name": sampler_class(run.config, run.objective)})
    if run.config.model.export_single_file:
        described = modelspec_of_model(run.family.modelspec(""))
        weights.append(write_single_file(folder / PIPELINE, folder / f"{PIPELINE}.safetensors", described))
    if run.config.adapter.use_dora and run.config.method_name == "lora":
        run.report.chapter(
            "",
            "DoRA: diffusers and LyCORIS give the trained result; ComfyUI and Forge do not, as they divide by the norm of W and not of "
            "W + dW (documentation/LORA.md)",
        )
    worth_a_look = (write_loss_curve(folder), folder / VALIDATION_FOLDER / SHEET, folder / PAGE)
    return [*weights, *(path for path in worth_a_look if path and path.exists())]
