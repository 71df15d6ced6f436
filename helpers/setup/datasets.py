"""From datasets to the batches of a run, and how many steps they make."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from helpers.data.base.workers import Workers
from helpers.data.order.epoch_order import OrderStart
from helpers.data.ports import can_drop_encoders_apart
from helpers.data.prepare import prepare_data, survey_data
from helpers.data.report.dataset_report import REPORT
from helpers.data.settings import DataSettings
from helpers.reporting.html_report import PAGE
from helpers.setup.validation import captions_to_encode

if TYPE_CHECKING:
    from helpers.data.training_data import TrainingData
    from helpers.setup.run import Run
    from helpers.training.runtime import Runtime


def prepare(run: Run) -> TrainingData:
    """Scan and plan the datasets, and encode every image and caption once, those of validation too.

    The encoders leave memory before the network is loaded, unless latents are encoded in the background. CheckpointError if the data
    changed since the checkpoint and --accept_changed_data is off; other errors as in `prepare_data`.
    """
    settings = data_settings(run, captions_to_encode(run.config, run.family))
    data = prepare_data(run.config.datasets, settings, run.family, workers(run.runtime), run.report)
    _accept_changes(run, data)
    return data


def report_on_data(run: Run) -> None:
    """Scan and plan the datasets as training would, and say where to read about them. Encodes nothing."""
    if run.config.run.seed <= 0 and not run.start.checkpoint:
        run.report.chapter("", "the seed is drawn when a run starts: the places of random crops shown are examples")
    survey_data(run.config.datasets, data_settings(run), run.family, workers(run.runtime), run.report)
    folder = run.config.run.output_dir
    run.report.chapter("report", f"{folder / PAGE} to look at, {folder / REPORT} for programs")


def data_settings(run: Run, captions: Sequence[str] = ()) -> DataSettings:
    """`captions` are encoded in addition to those of the datasets."""
    config, checkpoint, state = run.config, run.start.checkpoint, run.state
    return DataSettings(
        output_dir=config.run.output_dir,
        cache_dir=config.cache.cache_dir,
        text_cache_dir=config.cache.cache_dir_text,
        device=run.runtime.device,
        seed=state.seed,
        batch_size=config.data.train_batch_size,
        encode_while_training=not config.cache.vae_cache_preprocess,
        step=state.step,
        order=state.order,
        undecodable=checkpoint.content["undecodable"] if checkpoint else None,
        accumulation=run.start.accumulation,
        caption_dropout=config.data.caption_dropout_probability,
        encoders_apart=run.family.encoders_apart if can_drop_encoders_apart(run.family) else (),
        cache_dtype=config.cache.cache_dtype,
        vae_batch_size=config.cache.vae_batch_size,
        live_text=config.text_encoder.train_text_encoder,
        extra_captions=captions,
    )


def workers(runtime: Runtime) -> Workers:
    """The processes of a run, as the preparation of data sees them."""
    meeting = runtime.meet()
    return Workers(runtime.rank, runtime.world_size, meeting.gather, meeting.stop_asked)


def total_steps(run: Run, data: TrainingData) -> int:
    """The last step of the run: --max_train_steps, or the step that trains the last sample of the last epoch."""
    config, order = run.config.run, run.state.order
    if config.max_train_steps:
        return config.max_train_steps
    last_epoch = max(config.num_train_epochs, order.epoch)
    micro_batches = data.micro_batches(order.epoch, last_epoch)  # from the step on that the present data starts with
    return order.step + math.ceil(micro_batches / (run.start.accumulation * run.runtime.world_size))


def _accept_changes(run: Run, data: TrainingData) -> None:
    """If the data changed since the checkpoint and the user accepts that, start a new epoch on the present data.

    That is the first epoch of which nothing has been trained yet. CheckpointError if the user does not accept it.
    """
    checkpoint, state = run.start.checkpoint, run.state
    if checkpoint is None:
        return
    if changed := checkpoint.changed_data(data.fingerprint(like=checkpoint.content["data"]), run.config.data.accept_changed_data):
        state.order = OrderStart(state.step, checkpoint.content["untouched_epoch"])
        now = f"epoch {state.order.epoch} starts at step {state.step + 1:,} on the present data"
        run.report.chapter("dataset", f"changed since {checkpoint.name} and accepted ({', '.join(changed)}): {now}")
