from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from helpers.choices import known_axes
from helpers.config.config import Config
from helpers.config.document import options_page
from helpers.config.env_file import read_env_file
from helpers.config.read import known_variables, read_config

OPTIONS = known_axes().options

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted(path.name for path in ROOT.glob("*-env.sh.example"))


def test_options_md_is_what_the_code_declares(repository: Path) -> None:
    assert (repository / "OPTIONS.md").read_text(encoding="utf-8") == options_page(known_axes()), "run ./simpletuner document"


def test_options_md_has_a_row_for_every_option_and_variable() -> None:
    page = options_page(known_axes())
    rows = re.findall(r"^\| `--(\w+)` \|", page, re.MULTILINE)
    assert sorted(rows) == sorted(OPTIONS)
    assert all(f"`{name}`" in page for name in known_variables(known_axes().options))


def test_options_md_tells_what_may_change_on_resume_and_what_an_option_needs() -> None:
    page = options_page(known_axes())
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `--")}
    assert rows["--adam_beta1"].endswith("| fixed |") and rows["--learning_rate"].endswith("| may change |")
    assert rows["--resolution"].endswith("| with the same data |") and rows["--revision"].endswith("| with the same weights |")
    assert rows["--use_8bit_adam"].endswith("| as `--optimizer` |")
    assert "Only with `--model_type` `lora`. Only with `--lora_algorithm` `lokr`. |" in rows["--lokr_factor"]
    assert "Not with `--lr_scheduler` `constant`. |" in rows["--lr_warmup_steps"]
    assert "Only for flow matching. |" in rows["--flow_shift"]
    assert "Only for SDXL, SDXL refiner, Hunyuan-DiT. |" in rows["--sdxl_original_size"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_variable_of_an_example_is_known(name: str, repository: Path) -> None:
    text = (repository / name).read_text(encoding="utf-8")
    offered = set(re.findall(r"^#?([A-Z][A-Z0-9_]+)=", text, re.MULTILINE))
    assert len(offered) > 40
    assert offered - known_variables(known_axes().options) == set()


@pytest.mark.parametrize("name", EXAMPLES)
def test_values_of_an_example_stand_in_single_quotes_unless_they_use_a_variable(name: str, repository: Path) -> None:
    for line in (repository / name).read_text(encoding="utf-8").splitlines():
        if re.match(r"#?[A-Z][A-Z0-9_]+=", line):
            assert re.match(r"#?\w+=('[^']*'|\"\$\w+[^\"$]*\")(\s+#.*)?$", line), line


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_follows_the_order_of_options_md(name: str, repository: Path) -> None:
    text = (repository / name).read_text(encoding="utf-8")
    titles = [title for title in re.findall(r"^# --- (.*?) -+$", text, re.MULTILINE) if title != "LoRA"]
    page = [title for title in re.findall(r"^## (.*)$", options_page(known_axes()), re.MULTILINE) if title != "LoRA"]
    merged = [title.split(" and learning rate")[0] for title in titles]
    assert merged == [title for title in page if title in merged]


def family_of(example: str) -> str:
    """The family of the wrapper that reads an example's copy."""
    [wrapper] = [path for path in ROOT.glob("train_*.sh") if f"env_files=({example.removesuffix('.example')}" in path.read_text()]
    return wrapper.stem.removeprefix("train_")


def settings_of(example: Path, folder: Path, family: str = "sdxl") -> Config:
    """The Config of a user who copied an example and changed only its folder."""
    (folder / "images").mkdir()
    (folder / "data.json").write_text('[{"id": "a", "instance_data_dir": "images"}]')
    copy = folder / "env.sh"
    copy.write_text(example.read_text(encoding="utf-8"))
    shell = f"set -a; . {copy}; env -0"
    sourced = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, env={"PATH": os.environ["PATH"]}, check=True).stdout
    environ = dict(entry.split("=", 1) for entry in sourced.split("\0") if entry)
    environ |= {"SIMPLETUNER_ENV_FILE": str(copy), "DATALOADER_CONFIG": "data.json", "SIMPLETUNER_FAMILY": family}
    return read_config([], environ, known_axes())


def test_the_sdxl_example_needs_only_its_paths_changed(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = settings_of(repository / "sdxl-env.sh.example", tmp_path)
    assert config.notes == ()
    assert (config.method_name, config.run.max_train_steps, config.data.resolution) == ("lora", 3000, 1.0)
    assert config.origins["learning_rate"].startswith("LEARNING_RATE (env.sh:")


def test_the_sd2_example_needs_only_its_paths_changed(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = settings_of(repository / "sd21-env.sh.example", tmp_path)
    assert config.notes == ()
    assert (config.method_name, config.run.max_train_steps, config.data.resolution) == ("lora", 3000, 768)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_the_examples_of_flow_matching_need_only_their_paths_changed(
    family: str, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = settings_of(repository / f"{family}-env.sh.example", tmp_path, family=family)
    assert config.notes == ()
    assert (config.family_name, config.objective_name, config.data.resolution) == (family, "flow", 1.0)


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize(
    ("name", "wrapper", "changes", "family"),
    [
        ("sdxl-env.sh.example", "sdxl", {}, "sdxl"),
        ("sdxl-env.sh.example", "sdxl", {"STABLE_DIFFUSION_3": "true"}, "sd3"),
        ("sdxl-env.sh.example", "sdxl", {"PIXART_SIGMA": "true"}, "pixart_sigma"),
        ("sdxl-env.sh.example", "sdxl", {"PIXART_ALPHA": "true"}, "pixart_alpha"),
        ("sdxl-env.sh.example", "sdxl", {"HUNYUAN_DIT": "true"}, "hunyuan_dit"),
        ("sdxl-env.sh.example", "sd3", {}, "sd3"),  # train_sd3.sh reads an sdxl-env.sh where there is no other
        ("sd3-env.sh.example", "sd3", {}, "sd3"),
        ("sd21-env.sh.example", "sd2x", {}, "sd2x"),
        ("sd21-env.sh.example", "sd2x", {"MODEL_TYPE": "deepfloyd-{kind}", "RESOLUTION": ""}, "deepfloyd_1"),
        ("sd21-env.sh.example", "sd2x", {"MODEL_TYPE": "deepfloyd-stage2-{kind}", "RESOLUTION": ""}, "deepfloyd_2"),
    ],
)
def test_an_example_starts_for_every_family_that_it_names(
    name: str,
    wrapper: str,
    changes: dict[str, str],
    family: str,
    kind: str,
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    changes = {"MODEL_TYPE": kind, **changes}
    changes["MODEL_TYPE"] = changes["MODEL_TYPE"].format(kind=kind).replace("stage2-full", "stage2")
    lines = "".join(f"{variable}='{value}'\n" for variable, value in changes.items())
    example = tmp_path / name
    example.write_text((repository / name).read_text(encoding="utf-8") + lines, encoding="utf-8")
    assert settings_of(example, tmp_path, family=wrapper).family_name == family


def test_the_migration_page_names_every_option_that_does_nothing(repository: Path) -> None:
    page = (repository / "documentation" / "MIGRATION.md").read_text(encoding="utf-8")
    missing = [item.flag for item in OPTIONS.values() if item.does_nothing and f"`{item.flag}`" not in page]
    assert missing == []


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_env_file_scanner_finds_what_bash_sets(name: str, repository: Path) -> None:
    shell = f"set -a; . {repository / name}; env -0"
    sourced = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, env={}, check=True).stdout
    names = {entry.partition("=")[0] for entry in sourced.split("\0")} - {"PWD", "SHLVL", "_", ""}
    assert set(read_env_file(repository / name).lines) == names


OFFERED = [
    (name, line)
    for name in EXAMPLES
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
    if re.match(r"#[A-Z][A-Z0-9_]+=", line) and "TEXT_ENCODER" not in line
]


@pytest.mark.parametrize(("name", "line"), OFFERED)
def test_a_line_that_an_example_offers_can_be_taken_as_it_stands(
    name: str, line: str, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    example = tmp_path / name
    example.write_text(f"{(repository / name).read_text(encoding='utf-8')}\n{line[1:]}\n", encoding="utf-8")
    for note in settings_of(example, tmp_path, family=family_of(name)).notes:
        assert " with " in line.partition("#")[2].partition("#")[2], note  # it says beside what it goes
