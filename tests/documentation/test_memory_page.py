"""The page on memory: its examples are settings that can be used, and its figures of rounding are those of the code."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers.choices import known_axes
from helpers.config.options import OPTIONS
from helpers.config.read import read_config
from helpers.methods.quantized_base import KINDS, QuantizedLinear, bytes_of
from tests.documentation.pages import Page

PAGE = Page.named("documentation/MEMORY.md")
EXAMPLES = PAGE.blocks("bash")


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_can_be_trained_with(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "data.json").write_text(json.dumps([{"id": "pictures", "instance_data_dir": "images"}]))
    monkeypatch.chdir(tmp_path)
    variables = dict(line.split("=", 1) for line in shlex.split(EXAMPLES[number].text, comments=True))
    flags = ["--pretrained_model_name_or_path=someone/model", "--data_backend_config=data.json"]
    config = read_config(flags, variables, known_axes())
    assert config.notes == ()
    assert {name.lower() for name in variables} & config.given


def test_the_table_of_kinds_holds_them_all_with_their_bits_and_errors() -> None:
    table = next(PAGE.section("Quantize the base model").tables())
    rows = {row[0].strip("` "): row for row in table[1:]}
    assert rows.keys() == KINDS.keys() == set(OPTIONS["base_quantization"].choices) - {"none"}
    plain = nn.Linear(2048, 512, bias=False)
    plain.weight.data.copy_(torch.randn(512, 2048, generator=torch.Generator().manual_seed(0)))
    for kind, (_, _, bits, error) in rows.items():
        layer = QuantizedLinear(plain, kind, torch.device("cpu"))
        assert 8 * bytes_of(layer) / plain.weight.numel() == pytest.approx(float(bits), rel=0.01)
        found = float((layer.weight - plain.weight.detach()).norm() / plain.weight.detach().norm())
        assert found == pytest.approx(float(error.strip(" %")) / 100, rel=0.15)
