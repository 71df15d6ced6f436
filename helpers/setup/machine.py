"""Settings that depend on this machine, and what it cannot do."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from helpers.config.lora_layers import read_lora_layers
from helpers.methods.quantized_base import check_quantization
from helpers.storage.atomic import write_json
from helpers.training.memory import check_attention, check_compiling
from helpers.training.optimizers import check_optimizer

if TYPE_CHECKING:
    from helpers.setup.run import Run


def resolve_for_machine(run: Run) -> Run:
    """The run with the settings that only the running trainer knows: drawn seed, precision, accumulation, scaled learning rate, optimizer.

    Writes all settings to OUTPUT_DIR/config.json.
    """
    config, runtime = run.config, run.runtime
    drawn = {"seed": run.state.seed} if config.run.seed <= 0 else {}
    config = config.replaced("drawn at the start of the run", **drawn)
    resolved: dict[str, Any] = {"mixed_precision": runtime.mixed_precision, "gradient_accumulation_steps": run.start.accumulation}
    if config.schedule.lr_scale:
        samples = config.data.train_batch_size * run.start.accumulation * runtime.world_size
        resolved["learning_rate"] = config.schedule.learning_rate * samples
    if config.optimizer.optimizer == "auto":
        resolved["optimizer"] = run.method.default_optimizer(runtime.mixed_precision)
    before = config.values()
    changed = {name: value for name, value in resolved.items() if value != before[name]}
    config = config.replaced("resolved for this machine", **changed)
    if runtime.is_main:
        write_json(config.run.output_dir / "config.json", config.to_json())
    return dataclasses.replace(run, config=config)


def check_machine(run: Run) -> None:
    """ConfigError for what the device or an installed library cannot do, before hours of caching."""
    config, runtime = run.config, run.runtime
    rules = read_lora_layers(config.adapter.lora_layers) if config.adapter.lora_layers else ()
    scaled = any(rule.lr_scale != 1 for rule in rules)
    check_optimizer(config.optimizer, config.schedule.learning_rate, runtime.device, scaled)
    dtype = run.method.weights_dtype(runtime.mixed_precision, config.optimizer.optimizer)
    if config.run.base_quantization != "none":
        check_quantization(config.run.base_quantization, runtime.device, dtype)
    check_attention(config.run.attention, runtime.device, runtime.dtype)
    if config.launch.training_dynamo_backend == "inductor":
        check_compiling("TRAINING_DYNAMO_BACKEND", runtime.device)
    if config.validation.validation_torch_compile:
        check_compiling("--validation_torch_compile", runtime.device)
