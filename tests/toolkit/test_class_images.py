"""Class images of the demo model, generated and continued as a user does."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import T5EncoderModel

from helpers.errors import EXIT_FINISHED, EXIT_REFUSED
from helpers.families.miniatures.pixart import write_pixart_sigma
from helpers.families.miniatures.sd3 import write_sd3, write_sd35
from helpers.families.miniatures.t5 import t5_config
from helpers.families.tiny import MINIATURES
from toolkit.datasets import class_images

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a red circle on a blue background"


def make(folder: Path, *more: str, number: int = 2) -> int:
    usual = ("--pretrained_model_name_or_path", str(ROOT / "demo" / "model"), "--prompt", PROMPT, "--output_dir", str(folder))
    small = ("--size", "64", "--steps", "2", "--batch", "2", "--number", str(number), "--device", "cpu")
    return class_images.main([*usual, *small, *more])


def miniature(family: str, folder: Path) -> tuple[str, str]:
    return "--pretrained_model_name_or_path", str(MINIATURES[family](folder / family))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_each_image_has_its_size_and_a_caption_file_with_its_prompt(tmp_path: Path) -> None:
    assert make(tmp_path, "--size", "64x48") == EXIT_FINISHED
    pictures = sorted(tmp_path.glob("*.png"))
    assert [Image.open(path).size for path in pictures] == [(64, 48)] * 2
    assert [path.with_suffix(".txt").read_text() for path in pictures] == [PROMPT] * 2
    assert len(list(tmp_path.iterdir())) == 4
    assert pictures[0].read_bytes() != pictures[1].read_bytes()


@pytest.mark.parametrize("family", ["pixart_alpha", "hunyuan_dit"])
def test_no_pipeline_rounds_the_size(family: str, tmp_path: Path) -> None:
    assert make(tmp_path / "out", "--size", "80x64", *miniature(family, tmp_path)) == EXIT_FINISHED
    assert {Image.open(path).size for path in (tmp_path / "out").glob("*.png")} == {(80, 64)}


@pytest.mark.parametrize(
    ("family", "reason"),
    [("pixart_alpha", "sides must be multiples of 16 for this model, not 72x72"), ("sdxl_refiner", "needs an input image")],
)
def test_what_a_model_cannot_generate_is_refused(family: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make(tmp_path / "out", "--size", "72", *miniature(family, tmp_path)) == EXIT_REFUSED
    assert reason in capsys.readouterr().err


def test_existing_files_stay_and_missing_images_are_generated_as_they_would_have_been(tmp_path: Path) -> None:
    make(tmp_path / "whole", number=4)
    whole = content(tmp_path / "whole")
    make(tmp_path / "stopped", number=2)
    half = content(tmp_path / "stopped")
    first, second = sorted((tmp_path / "stopped").glob("*.png"))
    first.write_bytes(b"mine")
    second.with_suffix(".txt").unlink()  # as if the program was killed between the two
    kept = second.read_bytes()
    assert make(tmp_path / "stopped", number=4) == EXIT_FINISHED
    after = content(tmp_path / "stopped")
    assert first.read_bytes() == b"mine" and second.read_bytes() == kept and half.keys() <= after.keys()
    assert after.keys() == whole.keys()
    made = [name for name in whole if name not in half and name.endswith(".png")]
    assert len(made) == 2
    for name in made:
        one, other = (np.asarray(Image.open(tmp_path / folder / name), np.int16) for folder in ("whole", "stopped"))
        assert abs(one - other).max() <= 2  # the batches differ


def test_other_settings_make_other_files(tmp_path: Path) -> None:
    make(tmp_path, number=1)
    before = content(tmp_path)
    make(tmp_path, "--seed", "7", number=1)
    after = content(tmp_path)
    assert len(after) == 4 and {name: after[name] for name in before} == before


def test_a_finished_series_loads_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path)
    monkeypatch.setattr(class_images, "load_pipeline", None)
    assert make(tmp_path) == EXIT_FINISHED
    assert "2 of 2 images" in capsys.readouterr().err


def test_a_missing_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert make(tmp_path / "out", "--pretrained_model_name_or_path", str(tmp_path / "empty")) == EXIT_REFUSED
    assert "has no model_index.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--size", "100"), "'100' is not a size in multiples of 8, such as 1024 or 1216x832"),
        (("--number", "0"), "'0' is not a whole number above 0"),
        (("--prompt", " "), "is empty; describe the images"),
    ],
)
def test_a_mistake_is_named(flags: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        make(tmp_path, *flags)
    assert leaving.value.code == 2
    assert said in capsys.readouterr().err


def test_help_is_answered_at_once() -> None:
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "toolkit/commands.py", "class-images", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--prompt" in done.stdout
    assert time.perf_counter() - began < 2


def test_a_model_without_t5_uses_the_one_that_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """T5 is part of the settings, so another T5 gives another series. A model that cannot use it is refused."""
    shutil.rmtree(write_pixart_sigma(tmp_path / "model") / "text_encoder")
    write_pixart_sigma(tmp_path / "one", seed=1)
    write_pixart_sigma(tmp_path / "two", seed=2)
    write_sd3(tmp_path / "wide")

    def with_t5(name: str, model: Path = tmp_path / "model") -> int:
        flags = ("--pretrained_model_name_or_path", str(model), "--pretrained_t5_model_name_or_path", str(tmp_path / name))
        return make(tmp_path / "out", *flags, number=1)

    assert (with_t5("one"), with_t5("two")) == (EXIT_FINISHED, EXIT_FINISHED)
    one, two = (path.read_bytes() for path in (tmp_path / "out").glob("*.png"))
    assert one != two
    assert with_t5("one", ROOT / "demo" / "model") == EXIT_REFUSED
    assert "a StableDiffusionXLPipeline has no T5; remove it" in capsys.readouterr().err
    assert with_t5("wide") == EXIT_REFUSED
    assert f"have width 64, but {tmp_path / 'model'} needs width 32. Name a T5 of the size" in capsys.readouterr().err
    T5EncoderModel(t5_config(8, 48)).save_pretrained(tmp_path / "wide" / "text_encoder_3")  # 48 is another width in the network
    assert with_t5("wide") == EXIT_REFUSED
    assert f"have width 48, but {tmp_path / 'model'} needs width 32" in capsys.readouterr().err


def test_stable_diffusion_3_works_without_t5(tmp_path: Path) -> None:
    model = write_sd35(tmp_path / "model")
    assert make(tmp_path / "out", "--pretrained_model_name_or_path", str(model), number=1) == EXIT_FINISHED
