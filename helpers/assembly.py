"""How a run is put together from its settings: with train.py, which tells it in order, the only place that sees the whole Config."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.choices import known_facts
from helpers.config.config import Config
from helpers.config.declare import show
from helpers.config.optimizer_rules import highest_rate
from helpers.config.options import OPTIONS
from helpers.config.rules import VALIDATION_FOLDER
from helpers.data.ports import can_drop_encoders_apart
from helpers.errors import ConfigError
from helpers.families import FAMILIES
from helpers.methods import METHODS
from helpers.objectives import OBJECTIVES
from helpers.protocols import can_train_text_encoders
from helpers.storage.atomic import write_json

if TYPE_CHECKING:
    from helpers.data.base.workers import Workers
    from helpers.data.ports import TextTensors
    from helpers.data.settings import DataSettings
    from helpers.data.training_data import TrainingData
    from helpers.protocols import ModelFamily, Objective, Parts, Trainable, TrainingMethod
    from helpers.reporting import Reporters
    from helpers.training.checkpoints import Checkpoint, Checkpointer
    from helpers.training.learner import Learner
    from helpers.training.live_text import LiveText
    from helpers.training.runtime import Runtime
    from helpers.training.schedules import Schedule
    from helpers.training.state import TrainState
    from helpers.training.validation import Prompt, Start, Subjects, Validator

SEARCHED_STEPS = 64  # of the first epoch, for pictures that validation begins with; what is drawn from later shows fewer of its own


@dataclass(frozen=True)
class StartPoint:
    """Where this life of a run begins: anew, or where an earlier one was saved."""

    found: Checkpoint | None  # the checkpoint that it goes on from
    state: TrainState  # of that checkpoint, or of a new run
    accumulation: int  # micro-batches of each process in a step


def begin_report(config: Config, runtime: Runtime, report: Reporters) -> None:
    """Say with which settings the run starts, and have what is found in the data shown on a page."""
    from helpers.reporting.html_report import HtmlReport

    report.members.append(HtmlReport(config.run.output_dir))
    report.chapter("settings", config.describe())
    for note in (*config.notes, *runtime.notes):
        report.chapter("", note)
    logging.getLogger("helpers").debug("variables of the env file that are not ours: %s", ", ".join(config.passed_variables) or "none")


def without_weights(config: Config, runtime: Runtime) -> Config:
    """The settings with models that need no weights, of which none are fetched: for a look at the data."""
    from helpers.families.loading.locate import without_weights

    if runtime.is_main:
        without_weights(config.model)  # fetches: once
    runtime.wait_for_everyone()
    return dataclasses.replace(config, model=without_weights(config.model))


def of_the_base_model(config: Config, runtime: Runtime, report: Reporters) -> Config:
    """The settings for the family that the base model is of: the wrapper of SDXL trains its refiner too."""
    from helpers.families.loading.recognise import recognise

    families = known_facts().families
    if runtime.is_main:
        recognise(config.family_name, config.model, config.cache)  # fetches the model, or makes it of a single file: once
    runtime.wait_for_everyone()
    found = families[recognise(config.family_name, config.model, config.cache)]
    if found.name != config.family_name:
        defaults = [f"{name} {show(value)}" for name, value in found.defaults.items() if name not in config.given]
        config = config.of_family(found)
        report.chapter("model", " · ".join((f"{found.title}, by its model_index.json", *defaults)))
    for note in config.of_other_families(families):
        report.chapter("", note)
    return config


def chosen_axes(config: Config) -> tuple[ModelFamily, TrainingMethod, Objective]:
    """Family, method and objective of the run. ConfigError or ModelError where one of them cannot do what is asked."""
    from helpers.methods.text_encoders import require_something_to_train

    family = FAMILIES[config.family_name](config.model, config.data, config.cache)
    method = METHODS[config.method_name](config.adapter, family)
    if config.text_encoder.train_text_encoder and config.model.model_type == "full":
        assert can_train_text_encoders(family), "the settings refuse --train_text_encoder for other families"
        require_something_to_train(family, config.text_encoder)
    objective = OBJECTIVES[config.objective_name](config.objective, family.scheduler_config)
    require_sampler(config, objective)
    return family, method, objective


def require_sampler(config: Config, objective: Objective) -> None:
    """ConfigError where validation and the exported pipeline could not sample what is learnt, which the base model may have settled."""
    asked = config.validation.validation_noise_scheduler
    if asked not in objective.samplers:
        raise ConfigError(
            f"--validation_noise_scheduler={asked} cannot sample what this model predicts; use {', '.join(objective.samplers)}."
        )


def sampler_kind(config: Config, objective: Objective) -> str:
    """Diffusers' class of the sampler for pictures, which what is handed over names too, so that it makes them as here."""
    return objective.samplers[config.validation.validation_noise_scheduler]


def say_what_validation_leaves_out(config: Config, family: ModelFamily, report: Reporters) -> None:
    if family.refines:
        report.chapter("", f"{family.facts.title} is validated on pictures of the data under their captions, not on prompts")
    for name in ("num_eval_images", "eval_dataset_id"):
        if not begins_with_pictures(config, family) and config.values()[name] != OPTIONS[name].default:
            report.chapter("", f"{config.origins[name]} does nothing while validation_using_datasets is off.")


def find_start(checkpoints: Checkpointer, config: Config, runtime: Runtime, report: Reporters) -> StartPoint:
    """The checkpoint to go on from, or a new run with its seed. Raises CheckpointError where neither may be."""
    from helpers.training.state import TrainState, settle_accumulation

    if runtime.is_main:
        checkpoints.tidy()
    runtime.wait_for_everyone()
    found = checkpoints.find(lambda text: report.chapter("checkpoint", text))
    asked = config.run.gradient_accumulation_steps
    if found is None:
        seed = config.run.seed if config.run.seed > 0 else runtime.gather(1 + secrets.randbelow(2**31))[0]
        return StartPoint(None, TrainState(seed), asked)
    report.chapter("checkpoint", f"going on from {found.folder.name}")
    accumulation, note = settle_accumulation(found.content["batch"], asked, runtime.world_size, found.folder.name)
    if note:
        report.chapter("", note)
    return StartPoint(found, TrainState.from_json(found.content["state"]), accumulation)


def look_at_data(config: Config, runtime: Runtime, beginning: StartPoint, family: ModelFamily, report: Reporters) -> None:
    """Scan and plan the data as the run would, and say where to read about it."""
    from helpers.data.prepare import survey_data
    from helpers.data.report.dataset_report import REPORT
    from helpers.reporting.html_report import PAGE

    if config.run.seed <= 0 and not beginning.found:
        report.chapter("", "the seed is drawn when a run starts: the places of random cuts shown are examples")
    survey_data(config.datasets, data_settings(config, family, runtime, beginning), family, workers(runtime), report)
    report.chapter("report", f"{config.run.output_dir / PAGE} to look at, {config.run.output_dir / REPORT} for programs")


def settled(config: Config, runtime: Runtime, method: TrainingMethod, beginning: StartPoint) -> Config:
    """The settings with what only the running trainer could tell; they are kept in OUTPUT_DIR/config.json."""
    told = {"seed": beginning.state.seed} if config.run.seed <= 0 else {}
    config = config.replaced("drawn at the start of the run", **told)
    found_out: dict[str, Any] = {"mixed_precision": runtime.mixed_precision, "gradient_accumulation_steps": beginning.accumulation}
    if config.schedule.lr_scale:
        samples = config.data.train_batch_size * beginning.accumulation * runtime.world_size
        found_out["learning_rate"] = config.schedule.learning_rate * samples
    if config.optimizer.optimizer == "auto":
        found_out["optimizer"] = method.default_optimizer(runtime.mixed_precision)
    known = config.values()
    config = config.replaced("settled for this machine", **{name: value for name, value in found_out.items() if value != known[name]})
    if runtime.is_main:
        write_json(config.run.output_dir / "config.json", config.to_json())
    return config


def check_device(config: Config, runtime: Runtime, method: TrainingMethod) -> None:
    """Raises ConfigError for what the device or a library cannot do, before hours of caching."""
    from helpers.methods.quantised_base import check_quantization
    from helpers.training.memory import check_attention, check_compiling
    from helpers.training.optimizers import check_optimizer

    check_optimizer(config.optimizer, config.schedule.learning_rate, runtime.device)
    dtype = method.weights_dtype(runtime.mixed_precision, config.optimizer.optimizer)
    if config.run.base_quantization != "none":
        check_quantization(config.run.base_quantization, runtime.device, dtype)
    check_attention(config.run.attention, runtime.device, runtime.dtype)
    if config.launch.training_dynamo_backend == "inductor":
        check_compiling("TRAINING_DYNAMO_BACKEND", runtime.device)
    if config.validation.validation_torch_compile:
        check_compiling("--validation_torch_compile", runtime.device)


def run_identity(config: Config, family: ModelFamily, objective: Objective) -> dict[str, Any]:
    """What must stay as it is from one life of a run to the next, beside the data: JSON values by the options' names."""
    adapter = dataclasses.asdict(config.adapter) if config.model.model_type == "lora" else {}
    encoders = dataclasses.asdict(config.text_encoder) if config.text_encoder.train_text_encoder else {}
    text = {name: value for name, value in encoders.items() if name != "text_encoder_lr"}  # like the learning rate it may change
    if config.model.controlnet:
        adapter = {"controlnet_model_name_or_path": config.model.controlnet_model_name_or_path}
    loss = dataclasses.asdict(config.objective)
    sampling_only = ("inference_scheduler_timestep_spacing", "training_scheduler_timestep_spacing")
    identity = {
        "model": family.identity,
        "model_family": config.family_name,
        "model_type": config.method_name,
        "seed": config.run.seed,
        "train_batch_size": config.data.train_batch_size,
        "caption_dropout_probability": config.data.caption_dropout_probability,
        "sd3_caption_dropout": config.data.sd3_caption_dropout,
        "sdxl_original_size": config.data.sdxl_original_size,
        "data_aesthetic_score": config.model.data_aesthetic_score,
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
        **{name: value for name, value in {**loss, **objective.identity}.items() if name not in sampling_only},
    }
    return json.loads(json.dumps(identity, default=str))  # as it will be read back: tuples become lists


def captions_of_pictures(config: Config, family: ModelFamily) -> list[str]:
    """What validation needs of the text encoders beside the captions of the data."""
    from helpers.training.validation import captions_to_encode

    return captions_to_encode(prompts_of(config, family), config.validation, begins_with_pictures(config, family))


def prompts_of(config: Config, family: ModelFamily) -> list[Prompt]:
    """The prompts that validation makes pictures of; none where the family only makes them from pictures."""
    from helpers.training.validation import read_prompts

    return [] if family.refines else read_prompts(config.validation)


def begins_with_pictures(config: Config, family: ModelFamily) -> bool:
    """Whether validation makes pictures from pictures of the data."""
    return bool(family.refines or config.model.controlnet or config.validation.validation_using_datasets)


def data_settings(
    config: Config,
    family: ModelFamily,
    runtime: Runtime,
    beginning: StartPoint,
    captions: Sequence[str] = (),
) -> DataSettings:
    """`captions` are encoded beside those of the data."""
    from helpers.data.settings import DataSettings

    found, state = beginning.found, beginning.state
    return DataSettings(
        output_dir=config.run.output_dir,
        cache_dir=config.cache.cache_dir,
        text_cache_dir=config.cache.cache_dir_text,
        device=runtime.device,
        seed=state.seed,
        batch_size=config.data.train_batch_size,
        behind=not config.cache.vae_cache_preprocess,
        step=state.step,
        order=state.order,
        undecodable=found.content["undecodable"] if found else None,
        accumulation=beginning.accumulation,
        caption_dropout=config.data.caption_dropout_probability,
        encoders_apart=family.encoders_apart if can_drop_encoders_apart(family) else (),
        cache_dtype=config.cache.cache_dtype,
        vae_batch_size=config.cache.vae_batch_size,
        live_text=config.text_encoder.train_text_encoder,
        extra_captions=captions,
    )


def workers(runtime: Runtime) -> Workers:
    from helpers.data.base.workers import Workers

    meeting = runtime.meet()
    return Workers(runtime.rank, runtime.world_size, meeting.gather, meeting.stop_asked)


def go_on_with_changed_data(config: Config, beginning: StartPoint, data: TrainingData, report: Reporters) -> None:
    """Where the data is not what the checkpoint was trained on and that is accepted, the next untouched epoch begins on what is there now.

    Raises CheckpointError where it is not accepted.
    """
    from helpers.data.order.epoch_order import OrderStart

    found, state = beginning.found, beginning.state
    if found is None:
        return
    if changed := found.changed_data(data.fingerprint(like=found.content["data"]), config.data.accept_changed_data):
        state.order = OrderStart(state.step, found.content["untouched_epoch"])
        now = f"epoch {state.order.epoch} begins with step {state.step + 1:,} on what is there now"
        report.chapter("dataset", f"changed since {found.folder.name} and accepted ({', '.join(changed)}): {now}")


def total_steps(config: Config, runtime: Runtime, data: TrainingData, beginning: StartPoint) -> int:
    """The step that the run ends with: as was asked, or with the last sample of its last epoch."""
    if config.run.max_train_steps:
        return config.run.max_train_steps
    order = beginning.state.order
    end = max(config.run.num_train_epochs, order.epoch)
    left = data.micro_batches(order.epoch, end)  # on the present data
    return order.step + math.ceil(left / (beginning.accumulation * runtime.world_size))


def make_learner(
    config: Config,
    runtime: Runtime,
    family: ModelFamily,
    method: TrainingMethod,
    beginning: StartPoint,
    total: int,
    report: Reporters,
) -> Learner:
    """What moves, with its optimiser and its average, as it was when the run was last saved."""
    from helpers.training.ema import Average
    from helpers.training.engine import Engine
    from helpers.training.learner import Learner

    runtime.seed("initial weights", beginning.state.seed)  # of an adapter: the same on every process
    trainable = attached(config, runtime, family, method, report)
    schedule = make_schedule(config, beginning, total, report)
    stop = text_encoder_stop(config, beginning.found, total, report)
    rate = text_encoder_rate(config) / config.schedule.learning_rate
    engine = Engine(runtime, trainable, config.optimizer, schedule, config.run.gradient_precision, rate, stop)
    average = Average(trainable.parameters, config.ema) if config.ema.use_ema else None
    learner = Learner(method, trainable, engine, average)
    if beginning.found:
        learner.restore(beginning.found)
    return learner


def attached(config: Config, runtime: Runtime, family: ModelFamily, method: TrainingMethod, report: Reporters) -> Trainable:
    """The network as the method trains it, in as little memory as was asked for."""
    from helpers.training.memory import apply_memory_options, choose_attention

    parts = load_network(config, runtime, family, method, report)
    add_text(parts, config, family, method, runtime)
    trainable = method.attach(parts)
    apply_memory_options(trainable.denoiser, config.run, family.facts.options)
    if config.run.gradient_checkpointing:
        for encoder in trainable.text_encoders.values():
            encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    choose_attention(config.run.attention)
    return trainable


def load_network(config: Config, runtime: Runtime, family: ModelFamily, method: TrainingMethod, report: Reporters) -> Parts:
    """The family's network as the base of this run: in the method's precision, its blocks in fewer bits where that is asked for."""
    from helpers.methods.lora import frozen_dtype

    parts = family.load(method.weights_dtype(runtime.mixed_precision, config.optimizer.optimizer))
    parts.frozen_dtype = frozen_dtype(runtime.mixed_precision)
    parts.report = report
    if (kind := config.run.base_quantization) != "none":
        from helpers.methods.quantised_base import bytes_of, quantise

        before = bytes_of(parts.denoiser)
        parts.unrounded = quantise(parts.denoiser, kind, runtime.device, keep=config.adapter.lora_init_type == "loftq")
        report.chapter("model", f"weights in {kind}: {bytes_of(parts.denoiser) / 2**30:,.2f} GiB instead of {before / 2**30:,.2f}")
    return parts


def add_text(parts: Parts, config: Config, family: ModelFamily, method: TrainingMethod, runtime: Runtime) -> None:
    """Load the text encoders that are to be trained beside the network."""
    from helpers.methods.text_encoders import add_text_encoders

    if config.text_encoder.train_text_encoder:
        dtype = method.weights_dtype(runtime.mixed_precision, config.optimizer.optimizer)
        freezes = config.model.model_type == "full"
        assert can_train_text_encoders(family), "the settings refuse --train_text_encoder for other families"
        add_text_encoders(parts, family, config.text_encoder, dtype, freezes)


def make_schedule(config: Config, beginning: StartPoint, total: int, report: Reporters) -> Schedule:
    from helpers.training.schedules import Schedule

    schedule = Schedule.create(config.schedule, total)
    found = beginning.found
    if found and schedule.bends_with_length and total != (planned := found.content["total_steps"]):
        laid = f"--lr_scheduler={schedule.name} was laid over {planned:,} steps and now is over {total:,}"
        report.chapter("", f"the learning rate bends: {laid}")
    return schedule


def text_encoder_stop(config: Config, found: Checkpoint | None, total: int, report: Reporters) -> int:
    """The step, counted from 0, that the text encoders stop before. It is settled when a run starts, and stays."""
    from helpers.training.live_text import stop_of

    if not config.text_encoder.train_text_encoder:
        return 0
    stop = stop_of(config.text_encoder.text_encoder_limit, total, found.content["text_encoder_stop"] if found else None)
    chosen = config.optimizer
    peak = highest_rate(chosen.optimizer, chosen.optimizer_args, chosen.adafactor_relative_step, text_encoder_rate(config))
    report.chapter("text", f"the text encoders are trained up to step {min(stop, total):,}, at {peak}")
    return stop


def text_encoder_rate(config: Config) -> float:
    """The learning rate of the text encoders where the schedule is at its peak."""
    return config.text_encoder.text_encoder_lr or config.schedule.learning_rate


def subjects_of_pictures(config: Config, family: ModelFamily, data: TrainingData, live: LiveText | None) -> Subjects:
    """What validation makes pictures of. With trained text encoders, they are told of it by these as they then are."""
    from helpers.training.validation import Subjects, after_the_first, parse_sizes

    prompts = prompts_of(config, family)
    starts = pictures_of_the_data(config, data) if begins_with_pictures(config, family) else {}
    if config.model.controlnet:
        starts, prompts = after_the_first(starts, prompts), []

    def text(caption: str | None) -> TextTensors:
        if live:
            return live.of(caption or None)
        return data.text(caption) if caption else data.unconditional

    sizes = parse_sizes(config.validation.validation_resolution, data.most_common_shape, family.latents.alignment)
    return Subjects([*prompts, *starts], sizes, text, starts, config.objective.refiner_training_strength)


def pictures_of_the_data(config: Config, data: TrainingData) -> dict[Prompt, Start]:
    """What validation begins pictures with: the first that are trained of each data set that it may use."""
    from helpers.training.validation import first_pictures

    options = config.validation
    used = [dataset.id for dataset in config.datasets if not dataset.disable_validation and options.eval_dataset_id in (None, dataset.id)]
    samples = data.samples_of_datasets
    counts = {dataset: min(options.num_eval_images, samples[dataset]) for dataset in used if dataset in samples}
    searched = max(1, min(SEARCHED_STEPS, int(data.steps_per_epoch)))
    with contextlib.closing(data.steps(0, searched, keep_captions=True)) as steps:
        return first_pictures(steps, counts)


def make_validator(config: Config, runtime: Runtime, family: ModelFamily, objective: Objective, subjects: Subjects, seed: int) -> Validator:
    from helpers.families.networks.samplers import sampler
    from helpers.training.validation import Validator

    kind, spacing = sampler_kind(config, objective), config.objective.inference_scheduler_timestep_spacing
    return Validator(
        config.validation,
        family,
        runtime,
        subjects,
        lambda: sampler(kind, objective.scheduler_config, spacing),
        config.run.output_dir / VALIDATION_FOLDER,
        seed,
    )


def join_reporters(config: Config, state: TrainState, total: int, report: Reporters) -> None:
    """From the first step on metrics and trackers are told too; what files here hold of later steps than this one is cut off."""
    from helpers.reporting.records import Records
    from helpers.reporting.trackers import Trackers

    report.members.append(Records(config.run.output_dir, state.step, config.data.record_samples))
    report.members.append(Trackers(config.reporting, config.run.output_dir, state.trackers, state.step))
    report.started(config.values(), total)


def hand_over(config: Config, learner: Learner, objective: Objective) -> list[Path]:
    """Write what the user came for, and list everything worth looking at."""
    from helpers.reporting.contact_sheet import SHEET
    from helpers.reporting.html_report import PAGE
    from helpers.reporting.loss_curve import write_loss_curve

    folder = config.run.output_dir
    weights = learner.export(folder, {**objective.scheduler_config, "_class_name": sampler_kind(config, objective)})
    worth_a_look = (write_loss_curve(folder), folder / VALIDATION_FOLDER / SHEET, folder / PAGE)
    return [*weights, *(path for path in worth_a_look if path and path.exists())]
