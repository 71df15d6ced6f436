"""Whatever people point a run at: a clear sentence and exit code 2, or a listed skip; and their files stay as they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.harness import NO_VALIDATION, Ended, Trainer, draw_images, same_weights
from tests.runs.evidence import damage_records, refusal, snapshot, unwrapped

SECRETS = {name: f"canary-of-{name.lower()}" for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "COMET_API_KEY")}
ODD = "a \"red\" circle, 'quoted', for $100 `id` * ; \\n\nof two lines 🎈"


def no_secret_in(*texts: str | bytes) -> bool:
    return not any(canary.encode() in (text.encode() if isinstance(text, str) else text) for text in texts for canary in SECRETS.values())


# -- refused before anything is loaded -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "flags", "sentence"),
    [
        ({"instance_data_dir": "gone"}, {}, "datasets[0].instance_data_dir: there is no folder gone; check the path"),
        ({"instance_data_dir": "dataloader.json"}, {}, "dataloader.json is a file; name the folder it is in"),
        ({"resolution": "64"}, {}, 'datasets[0].resolution is the text "64"; it must be a number'),
        ({"crop": "yes"}, {}, 'datasets[0].crop is the text "yes"; it must be'),
        ({"aws_secret_access_key": [SECRETS["AWS_SECRET_ACCESS_KEY"]]}, {}, "aws_secret_access_key"),
        ({}, {"pretrained_model_name_or_path": "./gone"}, "--pretrained_model_name_or_path: there is no folder ./gone; check the path"),
        ({"instance_data_dir": "images"}, {"output_dir": "images/out"}, "images/out is inside the images of dataset 'images'"),
        ({"instance_data_dir": "out/validation_images"}, {"output_dir": "out"}, "out/validation_images is inside the images of dataset"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_in_a_sentence(
    entry: dict[str, object], flags: dict[str, object], sentence: str, trainer: Trainer
) -> None:
    for name in ("images", "out/validation_images"):
        draw_images(trainer.folder / name, count=1)
    before = snapshot(trainer.folder / "images"), snapshot(trainer.folder / "out")
    trainer.dataloader(**entry)
    said = refusal(trainer.run_plain("new", variables=SECRETS, **flags))
    assert sentence in said
    assert no_secret_in(said)
    assert (snapshot(trainer.folder / "images"), snapshot(trainer.folder / "out")) == before
    assert not (trainer.folder / "new").exists()


# -- refused when the folder or the model has been looked at --------------------------------------------------------------


@pytest.mark.slow
def test_an_empty_folder_is_refused(trainer: Trainer) -> None:
    empty = trainer.folder / "empty"
    empty.mkdir()
    trainer.dataloader(instance_data_dir=str(empty))
    said = refusal(trainer.run())
    assert f"dataset 'images': there are no files in {empty}; put images there" in said


@pytest.mark.slow
def test_a_folder_of_which_every_image_is_left_out_is_refused(trainer: Trainer) -> None:
    small = draw_images(trainer.folder / "small", count=4)
    (small / "page.jpg").write_text("<!doctype html>")
    before = snapshot(small)
    trainer.dataloader(instance_data_dir=str(small), minimum_image_size=500)
    said = refusal(trainer.run())
    assert "all 5 files" in said and "4 below 500 px" in said and "1 unreadable" in said
    assert snapshot(small) == before


def without_index(model: Path) -> str:
    (model / "model_index.json").unlink()
    return f"--pretrained_model_name_or_path: {model} is not a model in diffusers layout: it has no model_index.json."


def of_another_class(model: Path) -> str:
    (model / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    return f"The base model in {model} has the pipeline KandinskyPipeline, which cannot be trained. Choose one of SDXL."


def without_a_component(model: Path) -> str:
    shutil.rmtree(model / "text_encoder_2")
    return f"The model in {model} has no text_encoder_2 folder"


def with_a_truncated_file(model: Path) -> str:
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return f"{weights} is cut off"


@pytest.mark.slow
@pytest.mark.parametrize("spoil", [without_index, of_another_class, without_a_component, with_a_truncated_file])
def test_a_folder_that_is_not_a_whole_model_is_refused_before_anything_is_encoded(spoil: Callable[[Path], str], trainer: Trainer) -> None:
    trainer.model = shutil.copytree(trainer.model, trainer.folder / "model")
    sentence = spoil(trainer.model)
    said = refusal(trainer.run())
    assert sentence in said
    assert not (trainer.folder / "out" / "dataset_report.json").exists()


# -- trained beside what is left out -------------------------------------------------------------------------------------

LEFT_OUT = {
    "aa_truncated.jpg": "unreadable: ",  # first of its shape: the encoder's batches would be cut differently without it
    "empty.jpg": "unreadable: the file is empty",
    "page.jpg": "unreadable: this is a web page or XML, not an image",
    "bomb.png": "too large: 13000x13000, more than 128 megapixels",
    "no_caption.png": "no caption: no_caption.txt is missing",
    "empty_caption.png": "empty caption: empty_caption.txt holds no text",
    "latin_caption.png": "caption is not UTF-8: latin_caption.txt; save it as UTF-8 text",
    "tiny.png": "below 32 px: 16x16",
    "notes.md": "not an image: its name ends in .md",
}


def bad_files(folder: Path) -> Path:
    """Ten good images with captions, one of them in a folder that is named like an image, and all of LEFT_OUT."""
    draw_images(folder, count=9)
    draw_images(folder / "folder.png", count=1)
    Image.effect_noise((64, 64), 80).convert("RGB").save(folder / "aa_truncated.jpg")
    whole = (folder / "aa_truncated.jpg").read_bytes()
    (folder / "aa_truncated.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    (folder / "empty.jpg").touch()
    (folder / "page.jpg").write_text("<!DOCTYPE html><html>404</html>")
    Image.new("1", (13_000, 13_000)).save(folder / "bomb.png")
    for name in ("no_caption", "empty_caption", "latin_caption"):
        Image.new("RGB", (64, 64)).save(folder / f"{name}.png")
    Image.new("RGB", (16, 16)).save(folder / "tiny.png")
    for image in [path for path in folder.rglob("*.*") if path.is_file()]:
        image.with_suffix(".txt").write_text(f"{ODD} {image.name}", encoding="utf-8")
    (folder / "no_caption.txt").unlink()
    (folder / "empty_caption.txt").write_text(" \n")
    (folder / "latin_caption.txt").write_bytes("été".encode("latin-1"))
    (folder / "notes.md").touch()
    return folder


@pytest.fixture(scope="module")
def beside_bad_files(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A trainer on `bad_files`, with a batch larger than any bucket, and an undisturbed run of 4 steps in "out"."""
    folder = tmp_path_factory.mktemp("bad")
    settings = {
        "train_batch_size": 50,
        "gradient_accumulation_steps": 1,
        "max_train_steps": 4,
        "validation_prompt": ODD,
        "cache_dtype": "fp32",
    }
    trainer = Trainer(bad_files(folder / "images"), folder, settings={**settings, "report_to": "tensorboard"})
    trainer.dataloader(caption_strategy="textfile", minimum_image_size=32)
    before = snapshot(trainer.images)
    ended = trainer.finish(variables=SECRETS)
    assert snapshot(trainer.images) == before, "the data folder was written to"
    assert no_secret_in(ended.printed, *(path.read_bytes() for path in ended.folder.rglob("*") if path.is_file()))
    return trainer


@pytest.fixture
def undisturbed(beside_bad_files: Trainer) -> Ended:
    return Ended(0, "", beside_bad_files.folder / "out")


@pytest.mark.slow
def test_every_bad_file_is_left_out_with_its_reason_and_the_rest_is_trained_on(undisturbed: Ended) -> None:
    [report] = json.loads((undisturbed.folder / "dataset_report.json").read_text())["datasets"]
    told = {entry["key"]: entry["reason"] for entry in report["left_out"] if not entry["key"].endswith(".txt")}
    assert told.keys() == LEFT_OUT.keys()
    assert all(told[key].startswith(reason) for key, reason in LEFT_OUT.items())
    assert report["used"] == 10
    assert report["found"] == report["used"] + len(report["left_out"])
    trained = {row["key"] for row in undisturbed.rows("samples.jsonl")}
    assert len(trained) == 10 and "folder.png/a_red_circle_00.png" in trained


@pytest.mark.slow
def test_a_batch_larger_than_any_bucket_trains_on_whole_buckets(undisturbed: Ended) -> None:
    """Four shapes, so an epoch is four steps, and each image stands in it once."""
    rows = undisturbed.rows("samples.jsonl")
    assert len(rows) == len({row["key"] for row in rows}) == 10
    assert all(len({tuple(row["target_size"]) for row in rows if row["step"] == step}) == 1 for step in (1, 2, 3, 4))


@pytest.mark.slow
def test_captions_and_prompts_arrive_byte_for_byte(undisturbed: Ended) -> None:
    captions = {row["key"]: row["caption"] for row in undisturbed.rows("samples.jsonl") if row["caption"]}
    assert captions and all(caption == f"{ODD} {Path(key).name}" for key, caption in captions.items())
    config = json.loads((undisturbed.folder / "config.json").read_text(encoding="utf-8"))
    assert config["settings"]["validation_prompt"]["value"] == ODD


@pytest.mark.slow
def test_a_resumed_run_keeps_the_plan_that_an_undecodable_image_was_part_of(beside_bad_files: Trainer, undisturbed: Ended) -> None:
    """Every cached latent is damaged in between; to get the same bytes again, the encoder must be given the same batches."""
    stopped = beside_bad_files.finish("stopped", max_train_steps=2)
    damage_records(stopped.folder / "cache" / "latents")
    resumed = beside_bad_files.finish("stopped")
    assert "resuming from checkpoint-2" in unwrapped(resumed.printed)
    assert "is encoded again" in unwrapped(resumed.printed)
    assert resumed.rows("samples.jsonl") == undisturbed.rows("samples.jsonl")
    assert same_weights(undisturbed, resumed)
    for name in ("cache/plan/plan.npy", "dataset_report.json"):
        assert (resumed.folder / name).read_bytes() == (undisturbed.folder / name).read_bytes()


# -- a model whose answers are no numbers ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_with_the_samples_named_and_nothing_saved(trainer: Trainer) -> None:
    trainer.model = shutil.copytree(trainer.model, trainer.folder / "model")
    weights = trainer.model / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    for tensor in tensors.values():
        tensor.fill_(6e4)  # finite, so the model is not refused; its predictions are not
    save_file(tensors, weights, {"format": "pt"})
    ended = trainer.run(max_train_steps=9, checkpointing_steps=1, variables=SECRETS, **NO_VALIDATION)
    assert ended.code == 1
    assert "was not finite for 4 steps in a row, the last at step 4 with images/a_red_circle_" in unwrapped(ended.printed)
    assert "Traceback" not in ended.printed
    assert no_secret_in(ended.printed)
    assert not list(ended.folder.glob("checkpoint-*"))
    assert [(row["step"], row["skipped"]) for row in ended.rows("metrics.jsonl")] == [(1, True), (2, True), (3, True)]
    assert {row["loss"] for row in ended.rows("samples.jsonl")} == {None}
