"""Settings of libraries that stand in the environment: what would change a run's numbers is removed and named."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.config.options import LaunchOptions
from helpers.errors import ConfigError
from helpers.launch import UNAVAILABLE_STRATEGIES, plan_launch
from helpers.library_settings import COUNT, in_effect, remove_library_settings, remove_ranks

PLAIN = LaunchOptions(training_num_processes=1, training_num_machines=1, accelerate_extra_args="", training_dynamo_backend="no")


def test_what_would_change_numbers_is_removed_and_named() -> None:
    environ = {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8",
        "ACCELERATE_DYNAMO_BACKEND": "inductor",
        "DIFFUSERS_ATTN_BACKEND": "flash",
        "NVIDIA_TF32_OVERRIDE": "0",
        "HF_HOME": "/somewhere",
        "ACCELERATE_TORCH_DEVICE": "cuda:1",
    }
    notes = remove_library_settings(environ)
    assert environ == {"HF_HOME": "/somewhere", "ACCELERATE_TORCH_DEVICE": "cuda:1"}
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=8 in the environment is ignored" in notes
    assert "DIFFUSERS_ATTN_BACKEND=flash in the environment is ignored; use --attention" in notes
    assert len(notes) == 4


def test_what_accelerate_launch_sets_by_itself_needs_no_word() -> None:
    environ = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False"}
    assert remove_library_settings(environ) == []


def test_no_variable_that_accelerate_reads_for_its_numbers_stays() -> None:
    """Every variable in the installed accelerate's own source which sets a number of the training is one that is removed."""
    import accelerate.accelerator
    import accelerate.state
    import accelerate.utils.dataclasses as settings

    source = "".join(inspect.getsource(module) for module in (accelerate.accelerator, accelerate.state, settings))
    read = set(re.findall(r"[\"'](ACCELERATE_[A-Z0-9_]+|FSDP_[A-Z0-9_]+|PARALLELISM_CONFIG_[A-Z0-9_]+)[\"']", source))
    assert {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "FSDP_OFFLOAD_PARAMS"} <= read
    environ = dict.fromkeys(read - {name for name in read if "_USE_" in name}, "7")
    remove_library_settings(environ)
    assert not {name for name in environ if re.search("GRADIENT|PRECISION|FP8|DYNAMO|DEEPSPEED|FSDP|BF16|PARALLELISM|ALLOW_CP", name)} - {
        "ACCELERATE_MIXED_PRECISION"  # the trainer passes its own precision
    }


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_a_strategy_that_the_trainer_lacks_is_refused_by_its_variable(name: str) -> None:
    with pytest.raises(ConfigError, match=f"ACCELERATE_USE_{name}=true .* not available yet: unset it"):
        remove_library_settings({f"ACCELERATE_USE_{name}": "true"})
    assert remove_library_settings({f"ACCELERATE_USE_{name}": "false"}) == []


@pytest.mark.parametrize("flag", UNAVAILABLE_STRATEGIES)
def test_a_strategy_that_the_trainer_lacks_is_refused_as_an_argument(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"{flag} asks for .*, which is not available yet; remove it"):
        plan_launch(replace(PLAIN, accelerate_extra_args=flag), {})


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP", "MEGATRON_LM", "XLA", "something new"])
@pytest.mark.parametrize("named", [True, False])
def test_a_strategy_that_the_trainer_lacks_is_refused_in_accelerates_file(tmp_path: Path, kind: str, named: bool) -> None:
    file = tmp_path / "accelerate" / "default_config.yaml"
    file.parent.mkdir()
    file.write_text(f"distributed_type: {kind}\nnum_processes: 2\n")
    options = replace(PLAIN, accelerate_extra_args=f"--config_file={file}") if named else PLAIN
    with pytest.raises(ConfigError, match=f"{re.escape(str(file))}: distributed_type {kind.upper()} is not available yet"):
        plan_launch(options, {} if named else {"HF_HOME": str(tmp_path)})


def test_ranks_of_a_job_controller_are_removed_and_named() -> None:
    environ = {"WORLD_SIZE": "4", "RANK": "2", "PMI_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1"}
    [note] = remove_ranks(environ)
    assert environ == {"MASTER_ADDR": "10.0.0.1"}
    assert "WORLD_SIZE=4" in note and "TRAINING_NUM_PROCESSES" in note
    assert remove_ranks(environ) == []


def test_variables_that_choose_kernels_are_named() -> None:
    assert in_effect({"OMP_NUM_THREADS": "2", "HOME": "/root"}) == "OMP_NUM_THREADS=2"
    assert in_effect({}) == ""
    page = (Path(__file__).parents[2] / "INSTALL.md").read_text(encoding="utf-8")
    assert [name for name in COUNT if f"`{name}`" not in page] == []
