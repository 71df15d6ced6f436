"""What a LoRA's header tells is taken where nobody said otherwise, and compared where somebody did."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from helpers.config.config import Config
from helpers.config.lora_file import LoraFile, read_lora_file

Read = Callable[..., Config]
Refuse = Callable[..., str]
LORA = "--model_type=lora"


def diffusers(path: Path, rank: int = 4, **settings: Any) -> Path:
    tensors = {"unet.a.to_q.lora_A.weight": torch.zeros(rank, 8), "unet.a.to_q.lora_B.weight": torch.zeros(8, rank)}
    told = {f"unet.{name}": value for name, value in settings.items()}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(told)} if told else None)
    return path


def kohya(path: Path, alpha: torch.Tensor, **more: torch.Tensor) -> Path:
    tensors = {"lora_unet_a_to_q.lora_down.weight": torch.zeros(4, 8), "lora_unet_a_to_q.lora_up.weight": torch.zeros(8, 4)}
    save_file({**tensors, "lora_unet_a_to_q.alpha": alpha, **more}, path)
    return path


def test_both_layouts_tell_rank_and_scale(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    assert read_lora_file(diffusers(path)) == LoraFile(4, 4.0, False, False, False)  # without an alpha it is the rank
    assert read_lora_file(diffusers(path, lora_alpha=1.5, use_rslora=True)) == LoraFile(4, 1.5, False, True, False)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        assert read_lora_file(kohya(path, torch.tensor(1.5, dtype=dtype))) == LoraFile(4, 1.5, False, False, False)
    dora = {"lora_unet_a_to_q.dora_scale": torch.zeros(8, 1)}
    assert read_lora_file(kohya(path, torch.tensor(2.0), **dora)).use_dora


def test_the_files_rank_and_alpha_are_taken_or_compared(tmp_path: Path, read: Read, refuse: Refuse) -> None:
    start = f"--init_lora={diffusers(tmp_path / 'first.safetensors', rank=3, lora_alpha=1.5)}"
    config = read(LORA, start)
    assert (config.adapter.lora_rank, config.adapter.lora_alpha) == (3, 1.5)
    assert config.origins["lora_rank"] == "from first.safetensors"
    assert read(LORA, start, "--lora_rank=3").adapter.lora_rank == 3
    assert "--lora_rank is 16, but " in refuse(LORA, start, "--lora_rank=16")
    assert "LORA_ALPHA is 3, but " in refuse(LORA, start, LORA_ALPHA="3")
    assert "has false; leave it out" in refuse(LORA, start, "--use_dora")


def test_text_encoders_are_gone_on_with_where_the_file_has_them(tmp_path: Path, read: Read, refuse: Refuse) -> None:
    both = kohya(tmp_path / "both.safetensors", torch.tensor(2.0), **{"lora_te1_b.alpha": torch.tensor(2.0)})
    assert read(LORA, f"--init_lora={both}", "--train_text_encoder").text_encoder.train_text_encoder
    alone = kohya(tmp_path / "alone.safetensors", torch.tensor(2.0))
    said = refuse(LORA, f"--init_lora={alone}", "--train_text_encoder")
    assert said == f"--init_lora: {alone} is a LoRA of the network alone; leave out one of it and --train_text_encoder."


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"lora_te1_b.alpha": torch.tensor(2.0)}, "of the text encoders too; set --train_text_encoder to go on with them"),
        ({"lora_unet_b.lokr_w1": torch.zeros(2, 2)}, "is a LyCORIS file"),
    ],
)
def test_a_lora_that_cannot_be_gone_on_with_is_refused_by_name(
    tensors: dict[str, torch.Tensor], said: str, tmp_path: Path, refuse: Refuse
) -> None:
    path = kohya(tmp_path / "lora.safetensors", torch.tensor(2.0), **tensors)
    told = refuse(LORA, f"--init_lora={path}")
    assert told.startswith(f"--init_lora: {path}")
    assert said in told


def test_layers_keep_the_ranks_and_alphas_that_they_have(tmp_path: Path, read: Read, refuse: Refuse) -> None:
    other = {"lora_unet_b.lora_down.weight": torch.zeros(8, 8), "lora_unet_b.alpha": torch.tensor(1.0)}
    path = kohya(tmp_path / "lora.safetensors", torch.tensor(2.0), **other)
    assert read(LORA, f"--init_lora={path}").adapter.lora_rank in (4, 8)
    said = refuse(LORA, f"--init_lora={path}", "--lora_rank=4")
    assert said == f"--lora_rank: the layers of {path} have ranks 4 and 8 and alphas 1 and 2, which they keep; remove it."
    [note] = read(LORA, f"--init_lora={path}", LORA_RANK="4", LORA_ALPHA="4").notes  # as example env files have them
    assert note == f"LORA_RANK and LORA_ALPHA do nothing: the layers of {path} have ranks 4 and 8 and alphas 1 and 2, which they keep."


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not valid JSON"),
        ("{}", "holds no rules"),
        ('{"attn": {"rank": 4}, "attn": {"rank": 8}}', "the key 'attn' is there twice"),
        ('{"(attn": {"rank": 4}}', "'(attn' is not a valid regular expression"),
        ('{"attn": {"ranks": 4}}', "'attn' has the key 'ranks', which is not one of rank, alpha, lr_scale"),
        ('{"attn": {"rank": 1.5}}', "'attn': rank is 1.5 and must be a whole number"),
        ('{"attn": {"rank": 0}}', "'attn': rank is 0 and must be a number above 0"),
        ('{"attn": {"alpha": true}}', "'attn': alpha is true and must be a number above 0"),
        ('{"attn": 4}', "'attn' needs an object with rank, alpha, lr_scale"),
        (None, "No such file or directory; check the path"),
    ],
)
def test_rules_for_layers_are_checked_with_file_and_key(content: str | None, said: str, tmp_path: Path, refuse: Refuse) -> None:
    path = tmp_path / "layers.json"
    if content is not None:
        path.write_text(content)
    told = refuse(LORA, f"--lora_layers={path}")
    assert told.startswith(f"--lora_layers: {path}") and said in told


def test_rules_for_layers_agree_with_other_settings(tmp_path: Path, refuse: Refuse) -> None:
    rules = tmp_path / "layers.json"
    rules.write_text('{"attn": {"rank": 4, "lr_scale": 2}}')
    flag = f"--lora_layers={rules}"
    start = kohya(tmp_path / "lora.safetensors", torch.tensor(2.0))
    assert "'attn' sets rank or alpha, which --init_lora takes from its file" in refuse(LORA, flag, f"--init_lora={start}")
    assert "--lora_layers is for LoRA and LoCon" in refuse(LORA, flag, "--lora_algorithm=loha")
    assert "against lr_scale in --lora_layers" in refuse(LORA, flag, "--optimizer=adafactor", "--adafactor_relative_step")


def test_what_is_no_lora_is_refused_by_name(tmp_path: Path, refuse: Refuse) -> None:
    path = tmp_path / "x.safetensors"
    assert f"{path}: No such file or directory; check the path" in refuse(LORA, f"--init_lora={path}")
    for content in (b"", b"PK\3\4 a zip file of another library", b"\2\0\0\0\0\0\0\0[]", b"\xff" * 40):
        path.write_bytes(content)
        assert "is not a .safetensors file" in refuse(LORA, f"--init_lora={path}")
    save_file({"weights": torch.zeros(2)}, path)
    assert "holds no LoRA" in refuse(LORA, f"--init_lora={path}")


def test_several_options_choose_the_method_together(read: Read) -> None:
    def chosen(*flags: str) -> str:
        return read(*flags).method_name

    assert chosen() == "full"
    assert chosen("--use_bitfit") == chosen("--freeze_unet_strategy=bitfit") == "bitfit"
    assert chosen(LORA) == chosen(LORA, "--lora_algorithm=locon") == "lora"
    assert chosen(LORA, "--lora_algorithm=lokr") == chosen(LORA, "--lora_algorithm=loha") == "lycoris"


def test_dropout_is_off_by_itself_where_it_cannot_be(read: Read) -> None:
    for flag in ("--lora_algorithm=lokr", "--lora_algorithm=loha", "--lora_init_type=pissa", "--lora_init_type=olora"):
        assert read(LORA, flag).adapter.lora_dropout == 0
    assert read(LORA, "--lora_algorithm=locon").adapter.lora_dropout == 0.1


def test_a_base_lora_needs_an_adapter_beside_frozen_weights(tmp_path: Path, refuse: Refuse) -> None:
    flag = f"--base_lora={kohya(tmp_path / 'lora.safetensors', torch.tensor(2.0))}"
    assert refuse("--model_type=full", flag).startswith(
        "--base_lora: it is added to a frozen base model, beside which an adapter is trained"
    )
    assert "--use_dora trains the magnitudes of weights that would contain it" in refuse(LORA, flag, "--use_dora")
    assert "--lora_init_type=loftq starts from the weights without it" in refuse(
        LORA, flag, "--lora_init_type=loftq", "--base_quantization=int8"
    )
    assert refuse(LORA, "--base_lora=/nowhere.safetensors") == "--base_lora: there is no file /nowhere.safetensors; check the path."
