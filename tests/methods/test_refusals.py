"""What a method cannot do is refused with a reason before anything is loaded, fetched or cached."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from helpers.choices import known_axes
from helpers.config.read import read_config
from helpers.errors import ConfigError

REQUIRED = ("--pretrained_model_name_or_path=someone/model", "--data_backend_config=data.json", "--model_type=lora")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "data.json").write_text(json.dumps([{"id": "mine", "instance_data_dir": "images"}]))
    save_file({"unet.a.to_q.lora_A.weight": torch.zeros(8, 4)}, tmp_path / "first.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--use_bitfit", "--freeze_unet_strategy=bitfit trains the network's biases"),
        ("--lora_algorithm=lokr --freeze_unet_strategy=bitfit", "--freeze_unet_strategy=bitfit trains the network's biases"),
        ("--lora_targets=.*(to_q", "=.*(to_q is not a valid regular expression (missing ), unterminated subpattern at position 2)"),
        ("--lora_algorithm=loha --lora_targets=*to_q", "is not a valid regular expression (nothing to repeat at position 0); correct it"),
        ("--lora_init_type=pissa --use_dora", "changes the weights whose magnitudes --use_dora trains"),
        ("--lora_init_type=olora --lora_dropout=0.1", "set --lora_dropout=0"),
        ("--lora_init_type=orthogonal --lora_rank=3", "--lora_rank=3 is odd"),
        ("--lora_init_type=gaussian --init_lora=first.safetensors", "both set the initial matrices"),
        ("--lora_algorithm=lokr --use_dora", "--use_dora is for LoRA and LoCon"),
        ("--lora_algorithm=loha --lora_init_type=pissa", "--lora_init_type=pissa is for LoRA and LoCon; LoHa has its own initialization"),
        ("--lora_algorithm=loha --init_lora=first.safetensors", "LoHa cannot start from a file"),
        ("--lora_algorithm=lokr --lora_dropout=0.1", "set --lora_dropout=0"),
        ("--lora_algorithm=lokr --use_rslora", "--use_rslora scales by the rank, and some matrices of LoKr have none"),
        ("--model_type=full --base_quantization=nf4", "--base_quantization: nf4 quantizes a frozen base model"),
        ("--model_type=full --use_bitfit --base_quantization=int8", "use --model_type=lora, or --base_quantization=none"),
        ("--lora_init_type=loftq", "this base model is not quantized; set --base_quantization to int8, fp8"),
        ("--lora_init_type=loftq --base_quantization=int8 --use_dora", "changes the weights whose magnitudes --use_dora trains"),
        ("--lora_init_type=loftq --base_quantization=int8 --init_lora=first.safetensors", "both set the initial matrices"),
        ("--lora_init_type=loftq --base_quantization=int8 --lora_algorithm=lokr", "--lora_init_type=loftq is for LoRA and LoCon"),
        ("--lora_init_type=loftq --base_quantization=nf4 --model_type=full", "nf4 quantizes a frozen base model"),
    ],
)
def test_a_combination_that_cannot_be_is_named_with_the_remedy(flags: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config([*REQUIRED, *flags.split()], {}, known_axes())
    [problem] = caught.value.problems
    assert said in problem


@pytest.mark.parametrize(
    "flags",
    [
        "--lora_algorithm=locon --use_dora --use_rslora",
        "--lora_algorithm=loha --use_rslora --use_ema",
        "--lora_init_type=pissa --use_rslora --lora_algorithm=locon",
        "--init_lora=first.safetensors --lora_dropout=0.2",
        "--lora_init_type=orthogonal --use_dora",
        "--lora_init_type=loftq --base_quantization=fp8 --lora_algorithm=locon --use_rslora --lora_dropout=0.1 --use_ema",
    ],
)
def test_what_can_be_combined_is(flags: str) -> None:
    assert read_config([*REQUIRED, *flags.split()], {}, known_axes()).notes == ()
