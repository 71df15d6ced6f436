"""A whole run with loss masks beside a set without: stopped on two processes and resumed on one."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.harness import NO_VALIDATION, Trainer, draw_images, same_weights
from toolkit.cache.command import main as cache

USUAL: dict[str, object] = {**NO_VALIDATION, "max_train_steps": 2, "validation_steps": 0}


@pytest.mark.slow
def test_masks_survive_a_stop_and_count_on_any_number_of_processes(trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    masks, regular = trainer.folder / "masks", draw_images(trainer.folder / "regular", 4)
    masks.mkdir()
    for place in trainer.images.glob("*.png"):
        mask = Image.new("L", Image.open(place).size)
        ImageDraw.Draw(mask).ellipse((8, 8, 48, 48), fill=255)
        mask.save(masks / place.name)
    path = trainer.dataloader(mask_data="masks")
    [images] = json.loads(path.read_text())
    own = {name: value for name, value in images.items() if name != "mask_data"}
    others = [{**own, "id": "regular", "instance_data_dir": str(regular), "is_regularisation_data": True}]
    path.write_text(json.dumps([images, *others, {"id": "masks", "dataset_type": "mask", "instance_data_dir": str(masks)}]))

    undisturbed = trainer.finish("undisturbed", **USUAL)
    rows = undisturbed.rows("samples.jsonl")
    assert {row["dataset"] for row in rows if "mask" in row} == {"images"} and {row["dataset"] for row in rows if "mask" not in row} == {
        "regular"
    }
    for row in (row for row in rows if "mask" in row):
        height, width = row["target_size"]
        white = np.asarray(Image.open(masks / row["key"])).mean() / 255
        assert 0 < row["mask"] < 1 and (Image.open(masks / row["key"]).size != (width, height) or abs(row["mask"] - white) < 1e-3)
    image = sorted(trainer.images.glob("*.png"))[0]
    assert cache(["why", str(image), f"--output_dir={undisturbed.folder}"]) == 0
    assert "is current: the next start uses this entry" in capsys.readouterr().out

    halves = {**USUAL, "gradient_accumulation_steps": 1}
    trainer.finish_on(2, "stopped", **{**halves, "max_train_steps": 1})
    assert same_weights(trainer.finish("stopped", **USUAL), undisturbed)
