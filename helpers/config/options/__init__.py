"""All options of a run, each declared once, in the sections of OPTIONS.md."""

from __future__ import annotations

from helpers.config.declare import Option, by_name
from helpers.config.options.data import CacheOptions, DataOptions
from helpers.config.options.ignored import IgnoredOptions
from helpers.config.options.launch import VARIABLES, WITHOUT_EFFECT, LaunchOptions, Variable
from helpers.config.options.model import AdapterOptions, ModelOptions, TextEncoderOptions
from helpers.config.options.objective import ObjectiveOptions
from helpers.config.options.run import CheckpointOptions, EmaOptions, OptimizerOptions, RunOptions, ScheduleOptions
from helpers.config.options.watch import ReportingOptions, ValidationOptions

__all__ = [
    "OPTIONS",
    "SECTIONS",
    "VARIABLES",
    "WITHOUT_EFFECT",
    "AdapterOptions",
    "CacheOptions",
    "CheckpointOptions",
    "DataOptions",
    "EmaOptions",
    "IgnoredOptions",
    "LaunchOptions",
    "ModelOptions",
    "ObjectiveOptions",
    "OptimizerOptions",
    "ReportingOptions",
    "RunOptions",
    "ScheduleOptions",
    "TextEncoderOptions",
    "ValidationOptions",
    "Variable",
]

SECTIONS: dict[str, type] = {
    "model": ModelOptions,
    "adapter": AdapterOptions,
    "text_encoder": TextEncoderOptions,
    "objective": ObjectiveOptions,
    "data": DataOptions,
    "cache": CacheOptions,
    "run": RunOptions,
    "optimizer": OptimizerOptions,
    "schedule": ScheduleOptions,
    "ema": EmaOptions,
    "checkpoints": CheckpointOptions,
    "validation": ValidationOptions,
    "reporting": ReportingOptions,
    "launch": LaunchOptions,
    "ignored": IgnoredOptions,
}  # attribute of Config -> its section

OPTIONS: dict[str, Option] = by_name(SECTIONS.values())
