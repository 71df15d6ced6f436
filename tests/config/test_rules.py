from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.config.config import Config

Read = Callable[..., Config]
Refuse = Callable[..., str]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--resolution=1024",), "--resolution: 1024 megapixels; did you mean --resolution_type=pixel?"),
        (("--resolution=1", "--resolution_type=pixel"), "1 pixels; did you mean --resolution_type=area?"),
        (("--minimum_image_size=512",), "--minimum_image_size: 512 megapixels; did you mean --resolution_type=pixel?"),
        (("--lr_scheduler=sine", "--lr_warmup_steps=0"), "needs --lr_warmup_steps above 0"),
        (("--lr_scheduler=polynomial", "--learning_rate=1e-6", "--lr_end=1e-6"), "must be below --learning_rate"),
        (("--lr_scheduler=cosine", "--learning_rate=1e-6", "--lr_end=1e-5"), "is above --learning_rate"),
        (("--lr_scheduler=cosine", "--max_train_steps=100", "--lr_warmup_steps=100"), "leaves no step"),
        (("--optimizer=adamw_bf16", "--mixed_precision=fp16"), "needs --mixed_precision=bf16"),
        (("--caption_strategy=instanceprompt",), "dataset 'pictures': caption_strategy=instanceprompt needs an instance_prompt."),
        (("--only_instance_prompt",), "only_instance_prompt needs an instance_prompt"),
        (("--only_instance_prompt", "--prepend_instance_prompt", "--instance_prompt=x"), "exclude each other"),
        (("--user_prompt_library=no.json",), "--user_prompt_library: there is no file no.json"),
        (("--pretrained_model_name_or_path=./nowhere",), "there is no folder ./nowhere"),
        *(
            ((f"--{option}={address}",), f"--{option}: {address} is a web address; {remedy}.")
            for option in ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "single_file_config")
            for address, remedy in (
                ("https://huggingface.co/some-one/tiny.model", "write the name of the model alone: some-one/tiny.model"),
                ("huggingface.co/someone/tiny/", "write the name of the model alone: someone/tiny"),
                ("https://hf.co/someone/tiny/tree/main?x=1", "write the name of the model alone: someone/tiny"),
                ("https://huggingface.co/someone/tiny/resolve/main/a.safetensors", "download the file and name its path"),
                ("https://civitai.com/models/1?modelVersionId=2", "download the file and name its path"),
                ("HTTP://127.0.0.1/x", "download the file and name its path"),
            )
        ),
        (("--pretrained_model_name_or_path=https://huggingface.co/datasets/a/b",), "the address of something else than a model"),
        (("--model_type=lora", "--init_lora=https://civitai.com/api/download/models/1"), "is a web address; download the file"),
        (("--pretrained_model_name_or_path=mine.safetensors",), "there is no folder mine.safetensors; check the path"),
        ((r"--pretrained_model_name_or_path=C:\models\mine",), r"there is no folder C:\models\mine; check the path"),
        (("--pretrained_vae_model_name_or_path=data.json",), "data.json is a file; name a folder in diffusers layout"),
        (("--output_dir=data.json",), "--output_dir: data.json is a file"),
        (("--output_dir=images/out",), "--output_dir: images/out is inside the images of dataset 'pictures'"),
        (("--output_dir=images",), "--output_dir: images is inside the images of dataset 'pictures'"),
        (("--cache_dir_vae=images/cache",), "--cache_dir_vae: images/cache is inside the images"),
        (("--validation_resolution=512,big",), "--validation_resolution: 'big' is not a size"),
        (("--validation_resolution=0x64",), "'0x64' is not a size"),
        (("--validation_using_datasets", "--eval_dataset_id=faces"), "has the id 'faces'; it can be pictures."),
        (("--report_to=none,tensorboard",), "none stands alone"),
        (("--training_num_machines=2",), "cannot be below training_num_machines"),
        (("--accelerate_extra_args='",), "--accelerate_extra_args: cannot be split into words"),
        (("--data_backend_config=no.json",), "--data_backend_config: there is no file no.json"),
        (("--learning_rate=nan",), "--learning_rate: nan is not a finite number."),
        (("--learning_rate=0",), "--learning_rate: 0.0 is not above 0."),
        (("--caption_dropout_probability=1.5",), "--caption_dropout_probability: 1.5 is above 1."),
        ((f"--seed={'9' * 400}",), "is above 4294967295."),
        ((f"--data_backend_config={'x' * 5000}",), "there is no file xxx"),
        ((f"--output_dir={'x' * 5000}", "--train_batch_size=0"), "is below 1"),
        (("--train_batch_size=0",), "--train_batch_size: 0 is below 1."),
    ],
)
def test_an_impossible_setting_is_refused_with_the_remedy(flags: tuple[str, ...], said: str, refuse: Refuse) -> None:
    assert said in refuse(*flags)


def test_an_output_folder_reached_by_a_link_is_still_inside_the_images(folder: Path, refuse: Refuse) -> None:
    (folder / "link").symlink_to(folder / "images")
    assert "link/out is inside the images" in refuse("--output_dir=link/out")


def test_images_beside_or_inside_the_output_folder_are_fine(folder: Path, read: Read) -> None:
    (folder / "images2").mkdir()
    assert read("--output_dir=images2").run.output_dir == Path("images2")
    assert read("--output_dir=.").run.output_dir == Path(".")


def test_a_size_that_fits_its_unit_is_accepted(read: Read) -> None:
    assert read("--resolution=64", "--resolution_type=pixel").datasets[0].aspect_bucket_alignment == 8
    assert read("--resolution=512", "--resolution_type=pixel").datasets[0].aspect_bucket_alignment == 64
    assert read("--resolution=0.2").datasets[0].aspect_bucket_alignment == 8
    assert read("--resolution=0.25").datasets[0].aspect_bucket_alignment == 64
    assert read("--resolution=0.2", "--aspect_bucket_alignment=64").datasets[0].aspect_bucket_alignment == 64


def test_the_sizes_of_each_data_set_are_judged_in_its_own_unit(folder: Path, refuse: Refuse) -> None:
    entry = {"id": "a", "instance_data_dir": "images", "resolution_type": "pixel"}
    (folder / "data.json").write_text(json.dumps([entry]))
    assert refuse() == "dataset 'a', resolution: 1 pixels; did you mean resolution_type area?"


def test_a_default_that_no_data_set_falls_back_to_is_not_judged(folder: Path, read: Read, refuse: Refuse) -> None:
    """The default resolution is an area: beside --resolution_type=pixel it is wrong only for who uses it."""

    def write(*entries: dict[str, object]) -> None:
        sets = [{"id": f"set{number}", "instance_data_dir": "images", **entry} for number, entry in enumerate(entries)]
        (folder / "data.json").write_text(json.dumps(sets))

    write({"resolution": 512}, {"resolution": 0.5, "resolution_type": "area"})
    assert [(dataset.resolution, dataset.resolution_type) for dataset in read("--resolution_type=pixel").datasets] == [
        (512, "pixel"),
        (0.5, "area"),
    ]
    said = "--resolution: 1 pixels; did you mean --resolution_type=area?"
    assert refuse("--resolution=1", "--resolution_type=pixel") == said
    write({"resolution": 512}, {})
    assert refuse("--resolution_type=pixel") == said


def test_validation_is_refused_where_no_data_set_may_be_used_for_it(folder: Path, refuse: Refuse) -> None:
    entry = {"id": "pictures", "instance_data_dir": "images", "disable_validation": True}
    (folder / "data.json").write_text(json.dumps([entry]))
    assert "every dataset has disable_validation" in refuse("--validation_using_datasets")
    assert "all of them have disable_validation" in refuse("--validation_using_datasets", "--eval_dataset_id=pictures")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--base_quantization=nf4",), "--base_quantization: nf4 needs the library bitsandbytes; {} bitsandbytes, or choose int8."),
        (("--lora_algorithm=lokr",), "--lora_algorithm: lokr needs the library lycoris-lora; {} lycoris-lora, or choose lora."),
        (("--report_to=comet",), "--report_to: comet needs the library comet-ml; {} comet-ml, or choose another."),
    ],
)
def test_a_library_that_is_not_installed_is_named_before_anything_is_cached(
    flags: tuple[str, ...], said: str, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: object() if module == "torch" else None)
    assert said.format(".venv/bin/pip install -c constraints/pins.txt") in refuse("--report_to=none", "--model_type=lora", *flags)
