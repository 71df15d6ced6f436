"""How a run is started, and what its end is called, without starting one."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec, module_from_spec
from pathlib import Path

import pytest

from helpers import ranks
from helpers.config.options import LaunchOptions
from helpers.errors import ConfigError
from helpers.launch import accelerate_file, free_port, plan_launch, torch_has_a_gpu
from helpers.supervisor import verdict

PLAIN = LaunchOptions(training_num_processes=1, training_num_machines=1, accelerate_extra_args="", training_dynamo_backend="no")


def test_one_process_needs_no_accelerate() -> None:
    assert plan_launch(PLAIN, os.environ) is None


def test_a_compiler_is_asked_of_accelerate_for_one_process_too() -> None:
    launch = plan_launch(replace(PLAIN, training_dynamo_backend="inductor"), {})
    assert launch is not None
    assert launch.arguments[launch.arguments.index("--dynamo_backend") + 1] == "inductor"


def test_two_processes_are_asked_for_in_words_that_accelerate_does_not_ignore_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helpers.launch.torch_has_a_gpu", lambda: False)
    launch = plan_launch(replace(PLAIN, training_num_processes=2), os.environ)
    assert launch is not None
    assert "--multi_gpu" in launch.arguments and launch.arguments[launch.arguments.index("--num_processes") + 1] == "2"
    assert launch.variables == {"ACCELERATE_USE_CPU": "true", ranks.PROCESSES_VARIABLE: "2"}


def test_gpus_are_not_told_to_be_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helpers.launch.torch_has_a_gpu", lambda: True)
    launch = plan_launch(replace(PLAIN, training_num_processes=2), os.environ)
    assert launch is not None and "ACCELERATE_USE_CPU" not in launch.variables


def test_extra_arguments_are_split_as_a_shell_would_and_come_last() -> None:
    launch = plan_launch(replace(PLAIN, accelerate_extra_args="--gpu_ids '0, 1' --main_process_port 1234 *.sh"), os.environ)
    assert launch is not None
    assert launch.arguments[-5:] == ("--gpu_ids", "0, 1", "--main_process_port", "1234", "*.sh")


def test_a_strategy_of_the_users_own_is_not_joined_by_a_second_one() -> None:
    launch = plan_launch(replace(PLAIN, training_num_processes=2, accelerate_extra_args="--multi_gpu"), os.environ)
    assert launch is not None
    assert launch.arguments.count("--multi_gpu") == 1 and "ACCELERATE_USE_CPU" not in launch.variables


@pytest.mark.parametrize("extra", ["--num_processes 4", "--num_processes=4"])
def test_a_number_of_processes_among_the_extra_arguments_is_not_contradicted(extra: str) -> None:
    launch = plan_launch(replace(PLAIN, accelerate_extra_args=extra), os.environ)
    assert launch is not None
    assert ranks.PROCESSES_VARIABLE not in launch.variables
    assert launch.arguments[-len(extra.split()) :] == tuple(extra.split())


def test_a_configuration_file_among_the_extra_arguments_is_left_to_say_everything(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("distributed_type: MULTI_GPU\n")
    named = f"--config_file={tmp_path}/my.yaml"
    launch = plan_launch(replace(PLAIN, accelerate_extra_args=named), os.environ)
    assert launch is not None and launch.arguments == (named,)
    assert launch.variables == {}


def test_accelerates_own_configuration_counts_when_it_asks_for_more_than_one_plain_process(tmp_path: Path) -> None:
    environ = {"HF_HOME": str(tmp_path)}
    file = tmp_path / "accelerate" / "default_config.yaml"
    file.parent.mkdir()
    assert accelerate_file(environ) is None
    file.write_text("distributed_type: 'NO'\nnum_processes: 1\n")
    assert plan_launch(PLAIN, environ) is None
    file.write_text("distributed_type: MULTI_GPU\nnum_processes: 4\n")
    launch = plan_launch(PLAIN, environ)
    assert launch is not None
    assert launch.arguments == ("--config_file", str(file))
    assert ranks.PROCESSES_VARIABLE not in launch.variables
    compiled = plan_launch(replace(PLAIN, training_dynamo_backend="inductor"), environ)
    assert compiled is not None and compiled.arguments == ("--config_file", str(file), "--dynamo_backend", "inductor")
    assert plan_launch(PLAIN, environ, wants_file=False) is None


@pytest.mark.parametrize("content", [b"num_processes: [1", b"- num_processes", b"\xff\xfe"])
def test_a_configuration_of_accelerates_that_cannot_be_read_is_named(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "accelerate" / "default_config.yaml"
    file.parent.mkdir()
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^{file} .* `accelerate config`"):
        plan_launch(PLAIN, {"HF_HOME": str(tmp_path)})


def test_accelerates_configuration_is_looked_for_where_accelerate_does(tmp_path: Path) -> None:
    spec = find_spec("accelerate.commands.config.config_args")
    assert spec is not None and spec.loader is not None
    for variables in ({"HF_HOME": str(tmp_path / "hf")}, {"XDG_CACHE_HOME": str(tmp_path / "cache")}, {"HOME": str(tmp_path)}):
        with pytest.MonkeyPatch.context() as patch:
            for name in ("HF_HOME", "XDG_CACHE_HOME"):
                patch.delenv(name, raising=False)
            for name, value in variables.items():
                patch.setenv(name, value)
            theirs = module_from_spec(spec)
            spec.loader.exec_module(theirs)  # it looks for the file when it is loaded
            file = Path(theirs.default_yaml_config_file)
            assert file.is_relative_to(tmp_path)
            file.parent.mkdir(parents=True)
            file.write_text("num_processes: 2\n")
            assert accelerate_file(dict(os.environ)) == file


def test_the_kind_of_the_installed_torch_is_told_without_importing_it() -> None:
    import torch

    program = "import sys; from helpers.launch import torch_has_a_gpu as ours; print(ours(), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True)
    assert done.stdout == f"{bool(torch.version.cuda or torch.version.hip)} False\n"


@pytest.mark.parametrize("line, has", [("cuda: Optional[str] = '13.0'", True), ("hip: str = '7.2'", True), ("cuda = None", False)])
def test_builds_for_gpus_are_told_by_their_version_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, has: bool) -> None:
    class Spec:
        origin = str(tmp_path / "__init__.py")

    (tmp_path / "version.py").write_text(f"__version__ = '2.13.0'\n{line}\ngit_version = 'abc'\n")
    monkeypatch.setattr("helpers.launch.find_spec", lambda name: Spec)
    assert torch_has_a_gpu() is has


def test_two_launches_get_ports_of_their_own() -> None:
    assert len({free_port() for _ in range(20)}) > 1


@pytest.mark.parametrize(
    "codes, announced, child, signals, code",
    [
        ({"0": 0, "1": 0}, "01", 0, 0, 0),
        ({"1": 75, "0": 75}, "01", 0, 1, 75),
        ({"1": 75, "0": 0}, "01", 0, 1, 75),
        ({"1": 2, "0": 1}, "01", 1, 0, 2),
        ({"0": 1, "1": 75}, "01", 1, 1, 1),
        ({"0": 75}, "01", 1, 1, 1),
        ({"0": 75}, "01", -9, 2, 130),
        ({"0": 130, "1": 75}, "01", 1, 2, 130),
        ({"0": 75, "1": 75}, "01", 0, 2, 75),
        ({}, "", -9, 2, 130),
        ({}, "", 2, 0, 2),
        ({}, "", -11, 0, 1),
        ({"0": 0}, "0", 1, 0, 1),
    ],
    ids=[
        "all finished", "all interrupted", "one was done before it was asked", "the first fault", "a fault outweighs an interruption",
        "a rank vanished", "left at once", "one left at once", "saved before the second signal", "stopped before any rank spoke",
        "accelerate refused its arguments", "accelerate crashed", "a rank died before it spoke",
    ],
)  # fmt: skip
def test_many_ranks_end_with_one_code(codes: dict[str, int], announced: str, child: int, signals: int, code: int) -> None:
    assert verdict(codes, set(announced), child, [15] * signals) == code


def test_without_a_launcher_of_ours_a_rank_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ranks.tie_to_launcher({})
    ranks.announce_rank({"RANK": "1"})
    assert ranks.record_exit({"RANK": "1"}, 75) == 75
    assert list(tmp_path.iterdir()) == []


def test_a_rank_keeps_its_code_for_the_agents_of_other_machines(tmp_path: Path) -> None:
    environ = {ranks.FOLDER_VARIABLE: str(tmp_path), "RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    assert ranks.record_exit(environ, 75) == 75
    assert ranks.record_exit({**environ, "WORLD_SIZE": "2"}, 75) == 0
    assert (tmp_path / "3.code").read_text() == "75"
