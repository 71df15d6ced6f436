"""What a user meets in bash: env files, flags, prompts, folders, refusals."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

NEEDED = "MODEL_NAME='some/model'\nDATALOADER_CONFIG='data.json'\n"
PROMPTS = {
    "everything": "  two  blanks "
    """it's a "quoted" \\"word\\" """
    "a $100 bill, $HOME and ${PATH}"
    "`date` and $(date)"
    "* ? [a-z] ~ {a,b} !"
    "a; touch hacked & b | c > d # e"
    "first line\nsecond line\r\nthird\ttabbed"
    "a teddy bear 🧸 on Zürich's 山" + "very " * 2000,
    "blanks": "  two  blanks ",
    "comment": "# a",
    "glob": "*",
    "dashes": "--max_train_steps=7",
    "equals": "=a=b=",
}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_a_prompt_arrives_byte_for_byte(sandbox: Any, prompt: str) -> None:
    env_file = f"{NEEDED}VALIDATION_PROMPT={shlex.quote(prompt)}\n"
    (sandbox.folder / "sdxl-env.sh").write_bytes(env_file.encode())
    # An env file's carriage returns are taken for Windows' line endings.
    assert sandbox.told()["values"]["validation_prompt"] == prompt.replace("\r", "")
    assert sandbox.told(f"--validation_prompt={prompt}")["values"]["validation_prompt"] == prompt
    extra = shlex.quote(f"--validation_prompt={prompt}")
    (sandbox.folder / "sdxl-env.sh").write_bytes(f"{NEEDED}TRAINER_EXTRA_ARGS={shlex.quote(extra)}\n".encode().replace(b"\r", b""))
    assert sandbox.told()["values"]["validation_prompt"] == prompt.replace("\r", "")
    assert not (sandbox.folder / "hacked").exists()


def test_flags_win_over_extra_arguments_and_those_over_variables(sandbox: Any) -> None:
    (sandbox.folder / "sdxl-env.sh").write_text(
        NEEDED + "TRAINING_SEED='1'\nLEARNING_RATE='1e-1'\nTRAIN_BATCH_SIZE='3'\nTRAINER_EXTRA_ARGS='--seed=2 --learning_rate=1e-2'\n"
    )
    values = sandbox.told("--seed=5")["values"]
    assert (values["seed"], values["learning_rate"], values["train_batch_size"]) == (5, 1e-2, 3)


@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", b""], ids=["byte-order mark", "plain"])
def test_windows_line_endings_and_byte_order_mark_of_the_env_file_do_not_matter(sandbox: Any, mark: bytes) -> None:
    text = NEEDED + "BASE=x\nOUTPUT_DIR=\"$BASE/out\"\nVALIDATION_PROMPT='a\nb'"
    (sandbox.folder / "sdxl-env.sh").write_bytes(mark + text.replace("\n", "\r\n").encode())
    values = sandbox.told()["values"]
    assert (values["output_dir"], values["validation_prompt"]) == ("x/out", "a\nb")


def test_relative_paths_mean_the_folder_one_calls_from(sandbox: Any) -> None:
    (sandbox.root / "sdxl-env.sh").write_text(NEEDED)  # the dataloader JSON it names lies in the caller's folder
    told = sandbox.told()
    assert told["folder"] == str(sandbox.folder)
    assert told["family"] == "sdxl"


def test_each_wrapper_has_its_family_and_the_names_that_its_env_file_had_once(sandbox: Any) -> None:
    (sandbox.folder / "env.sh").write_text(NEEDED)
    done = sandbox.run(wrapper="train_sd2x.sh")
    assert '"family": "sd2x"' in done.stdout
    assert "env.sh, an old name; the current name is sd21-env.sh" in done.stderr


def test_the_env_file_here_comes_before_the_one_in_the_repository(sandbox: Any) -> None:
    (sandbox.root / "sdxl-env.sh").write_text(NEEDED + "TRAINING_SEED=1\n")
    (sandbox.folder / "sdxl-env.sh").write_text(NEEDED + "TRAINING_SEED=2\n")
    told = sandbox.told()
    assert told["values"]["seed"] == 2
    assert "sdxl-env.sh:3" in told["origins"]["seed"]


def test_another_env_file_can_be_chosen(sandbox: Any) -> None:
    (sandbox.folder / "other file.sh").write_text(NEEDED + "TRAINING_SEED=3\n")
    assert sandbox.told(ENV_FILE="other file.sh")["values"]["seed"] == 3


def test_flags_alone_are_enough_with_an_empty_env_file(sandbox: Any) -> None:
    told = sandbox.told("--pretrained_model_name_or_path=m", "--data_backend_config=data.json", ENV_FILE="/dev/null")
    assert told["values"]["pretrained_model_name_or_path"] == "m"


def test_a_wrapper_is_found_through_a_link(sandbox: Any) -> None:
    (sandbox.folder / "sdxl-env.sh").write_text(NEEDED)
    (sandbox.root / "linked").mkdir()
    (sandbox.root / "linked" / "train").symlink_to(sandbox.root / "train_sdxl.sh")
    assert sandbox.run(wrapper="linked/train").returncode == 0


def test_a_missing_env_file_names_the_file_to_copy(sandbox: Any) -> None:
    done = sandbox.run()
    assert done.returncode == 2
    assert "cp" in done.stderr and "sdxl-env.sh.example" in done.stderr and "--demo" in done.stderr
    done = sandbox.run(ENV_FILE="nowhere.sh")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "ENV_FILE is nowhere.sh" in done.stderr


@pytest.mark.parametrize("line", ["VALIDATION_PROMPT=a photo of a cat", "MODEL_NAME = 'x'", "# fine\r\nMODEL_NAME = 'x'\r"])
def test_a_slip_in_the_env_file_is_not_passed_over(sandbox: Any, line: str) -> None:
    (sandbox.folder / "sdxl-env.sh").write_bytes(f"{NEEDED}{line}\n".encode())
    done = sandbox.run()
    assert done.returncode == 2
    assert "write variables as NAME='value'" in done.stderr


def test_an_env_file_that_is_not_shell_is_refused_with_its_line(sandbox: Any) -> None:
    (sandbox.folder / "sdxl-env.sh").write_text(f"{NEEDED}A='1'\nVALIDATION_PROMPT='it's'\n")
    done = sandbox.run()
    assert done.returncode == 2
    assert "line 4" in done.stderr and "is not valid shell" in done.stderr


def test_a_false_test_in_the_env_file_is_no_mistake(sandbox: Any) -> None:
    (sandbox.folder / "sdxl-env.sh").write_text(NEEDED + '[ "$NOT_SET" = 1 ] && TRAINING_SEED=1\nfalse\n[ -n "$NOT_SET" ] && X=1')
    assert sandbox.told()["values"]["seed"] == 42


def test_all_mistakes_are_told_before_accelerate_or_torch(sandbox: Any) -> None:
    (sandbox.root / "train.py").write_text("raise SystemExit('the trainer was started')")
    (sandbox.folder / "sdxl-env.sh").write_text(NEEDED + "LERNING_RATE='1'\nTRAINING_NUM_PROCESSES='2'\n")
    done = sandbox.run("--trian_batch_size=2")
    assert done.returncode == 2
    assert "LERNING_RATE" in done.stderr and "line 3" in done.stderr and "--trian_batch_size" in done.stderr
    assert "the trainer was started" not in done.stderr


@pytest.mark.parametrize("code", ["1", "75"])
def test_the_exit_code_is_the_trainers(sandbox: Any, code: str) -> None:
    (sandbox.folder / "sdxl-env.sh").write_text(NEEDED)
    assert sandbox.run(STANDIN_CODE=code).returncode == int(code)


def test_with_one_process_the_wrapper_becomes_the_trainer(sandbox: Any) -> None:
    (sandbox.folder / "sdxl-env.sh").write_text(NEEDED)
    process = sandbox.start()
    out, _ = process.communicate(timeout=300)
    assert f'"pid": {process.pid}' in out


def test_help_needs_no_env_file(sandbox: Any) -> None:
    done = sandbox.run("--help")
    assert done.returncode == 0
    assert "--learning_rate" in done.stdout


@pytest.mark.parametrize("flag", ["--demo", "--demo=photos"])
def test_the_demo_reads_no_env_file(sandbox: Any, flag: str) -> None:
    (sandbox.folder / "sdxl-env.sh").write_text("TRAINING_SEED='12'\nexit 9\n")
    looks = sandbox.folder / "looks instead of starting python"
    looks.write_text('#!/bin/bash\necho "${SIMPLETUNER_ENV_FILE-no file} ${TRAINING_SEED-no seed} $2"\n')
    looks.chmod(0o755)
    out, err = sandbox.start(flag, python=str(looks), SIMPLETUNER_ENV_FILE="of another run").communicate(timeout=300)
    assert out == f"no file no seed {flag}\n", err


def test_wrappers_are_short_and_share_one_script(repository: Path) -> None:
    for wrapper in repository.glob("train_*.sh"):
        lines = wrapper.read_text().splitlines()
        assert len(lines) <= 6 and "helpers/launch.sh" in lines[-1]


def test_shell_scripts_parse(repository: Path) -> None:
    others = ("simpletuner", "tests/run.sh", ".ci/run")
    for script in [*repository.glob("*.sh"), *repository.glob("helpers/*.sh"), *map(repository.joinpath, others)]:
        subprocess.run(["bash", "-n", str(script)], check=True)


def test_an_env_file_that_ends_the_wrapper_is_refused(sandbox: Any) -> None:
    """`exit 0` at its end would end the wrapper with "finished", and nothing would be trained."""
    for line in ("exit 0", "exit 3", "set -e\nfalse"):
        (sandbox.folder / "sdxl-env.sh").write_text(f"{NEEDED}{line}\n")
        done = sandbox.run()
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), line
        assert "sdxl-env.sh ended early" in done.stderr


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_an_env_file_in_utf_16_is_refused_and_one_with_a_mark_is_read(sandbox: Any, encoding: str) -> None:
    (sandbox.folder / "sdxl-env.sh").write_bytes(f"\ufeff{NEEDED}".encode(encoding))
    done = sandbox.run()
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "is UTF-16; save it as UTF-8" in done.stderr
    (sandbox.folder / "sdxl-env.sh").write_text(f"\ufeff{NEEDED}TRAINING_SEED='3'\n", encoding="utf-8")
    assert sandbox.told()["values"]["seed"] == 3


def test_help_and_mistakes_do_not_wait_for_the_installation(sandbox: Any, tmp_path: Path) -> None:
    """In a fresh clone, by a Python without any package."""
    bare = tmp_path / "python3"
    bare.write_text(f'#!/bin/bash\nexec "{sys.executable}" -S "$@"\n')  # -S: no site-packages
    bare.chmod(0o755)
    (sandbox.root / "ubuntu.sh").write_text("echo installing; exit 9\n")
    (sandbox.folder / "sdxl-env.sh").write_text(NEEDED)
    done = sandbox.run("--help", python="", PYTHON=str(bare))
    assert done.returncode == 0 and "--learning_rate" in done.stdout and "installing" not in done.stdout
    done = sandbox.run("--learning_rat=1", python="", PYTHON=str(bare))
    assert done.returncode == 2 and "did you mean --learning_rate?" in done.stderr and "installing" not in done.stdout
    done = sandbox.run("--optimizer=prodigy", python="", PYTHON=str(bare))  # a library that the installation brings is not missed
    assert (done.returncode, done.stdout) == (9, "installing\n"), done.stderr
