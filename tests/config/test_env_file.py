from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.choices import known_axes
from helpers.config.config import Config
from helpers.config.env_file import EnvFile, read_env_file
from helpers.config.read import known_variables

Read = Callable[..., Config]
Refuse = Callable[..., str]


def scan(folder: Path, text: str) -> EnvFile:
    path = folder / "env.sh"
    path.write_bytes(text.encode())
    return read_env_file(path)


def test_assignments_are_found_with_their_lines(tmp_path: Path) -> None:
    text = "# A=0\nA=1\nexport B='x'\n\n  C=$A; D=2\nif [ \"$A\" = 1 ]; then E=3; fi\necho --F=4 G\n"
    assert scan(tmp_path, text).lines == {"A": 2, "B": 3, "C": 5, "D": 5, "E": 6}


def test_quoted_text_is_not_searched_for_assignments(tmp_path: Path) -> None:
    text = "P='one\nLORA_RANK=4 # it'\nQ=\"two \\\"\nLORA_ALPHA=3\"\nR=it\\'s\n# don't\nS=1\n"
    assert scan(tmp_path, text).lines == {"P": 1, "Q": 3, "R": 5, "S": 7}


def test_a_bom_and_windows_line_endings_are_fine(tmp_path: Path) -> None:
    assert scan(tmp_path, "\ufeffA='1'\r\nB='2'\r\n").lines == {"A": 1, "B": 2}


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("LERNING_RATE", "LEARNING_RATE"),
        ("LEARNIGN_RATE", "LEARNING_RATE"),
        ("lora_rank", "LORA_RANK"),
        ("VALIDATION_PROMTP", "VALIDATION_PROMPT"),
        ("TRAIN_BATCHSIZE", "TRAIN_BATCH_SIZE"),
        ("SEEDS", "SEED"),
        ("USE_EMMA", "USE_EMA"),
        ("MIN_SNR_GAMA", "MIN_SNR_GAMMA"),
        ("ACCELERATE_EXTRA_ARG", "ACCELERATE_EXTRA_ARGS"),
    ],
)
def test_a_misspelt_variable_is_refused_with_its_line(name: str, meant: str, folder: Path, refuse: Refuse) -> None:
    scan(folder, f"MODEL_TYPE='lora'\n{name}='1'\n")
    assert refuse(SIMPLETUNER_ENV_FILE="env.sh") == f"env.sh, line 2: {name} is not a variable of the trainer; did you mean {meant}?"


PASSED = "HF_HOME HF_HUB_OFFLINE NCCL_DEBUG CUDA_VISIBLE_DEVICES OMP_NUM_THREADS PYTORCH_CUDA_ALLOC_CONF PATH LD_LIBRARY_PATH LANG"


@pytest.mark.parametrize("name", [*PASSED.split(), "WANDB_MODE", "AWS_PROFILE", "MY_FOLDER", "TRANSFORMERS_CACHE", "http_proxy"])
def test_variables_of_other_programs_and_the_users_own_pass(name: str, folder: Path, read: Read) -> None:
    scan(folder, f"export {name}='1'\n")
    config = read(SIMPLETUNER_ENV_FILE="env.sh")
    assert config.notes == ()
    assert config.passed_variables == (() if name in known_variables(known_axes().options) else (name,))


def test_a_helper_that_the_file_reads_itself_passes_however_it_is_called(folder: Path, read: Read) -> None:
    scan(folder, 'MODEL_NAMES=/models\nMODEL_NAME="$MODEL_NAMES/x"\n')
    assert read(SIMPLETUNER_ENV_FILE="env.sh").notes == ()


def test_a_variable_with_a_word_missing_is_pointed_out(folder: Path, read: Read) -> None:
    scan(folder, "MAX_STEPS=4\n")
    assert read(SIMPLETUNER_ENV_FILE="env.sh").notes == (
        "env.sh, line 1: MAX_STEPS sets nothing here; did you mean MAX_NUM_STEPS or MAX_TRAIN_STEPS?",
    )


def test_a_wrong_value_is_named_with_file_and_line(folder: Path, refuse: Refuse) -> None:
    scan(folder, "\nMAX_NUM_STEPS='many'\n")
    assert refuse(SIMPLETUNER_ENV_FILE="env.sh", MAX_NUM_STEPS="many") == "MAX_NUM_STEPS (env.sh:2): 'many' is not a whole number."


def test_variables_of_the_june_2024_release_without_effect_are_said_aloud(folder: Path, read: Read) -> None:
    scan(folder, "PURE_BF16=true\n")
    assert read(SIMPLETUNER_ENV_FILE="env.sh").notes == ("PURE_BF16 (env.sh:1) does nothing: use OPTIMIZER='adamw_bf16'.",)


def test_an_env_file_that_cannot_be_read_is_named(refuse: Refuse) -> None:
    assert "nowhere.sh: No such file or directory" in refuse(SIMPLETUNER_ENV_FILE="nowhere.sh")


def test_a_variable_that_is_set_twice_is_said_with_its_lines(tmp_path: Path) -> None:
    file = tmp_path / "env.sh"
    file.write_text("LORA_RANK=4\nMINE=1\n#LORA_RANK=5\nMINE=2\nLORA_RANK=8\nEXTRA=a\nEXTRA+=b\n")
    said = "env.sh sets LORA_RANK on lines 1 and 5; the last one that bash reaches counts."
    assert list(read_env_file(file).twice(frozenset(["LORA_RANK", "EXTRA"]))) == [said]
