"""A precision that the device does not support is refused with the option that supports it."""

from __future__ import annotations

import pytest
import torch

from helpers.errors import ConfigError
from helpers.training import runtime


def test_a_precision_that_accelerate_refuses_is_a_mistake_in_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(**arguments: object) -> None:
        raise ValueError("bf16 mixed precision requires PyTorch >= 2.6 and a supported device")

    monkeypatch.setattr(runtime, "Accelerator", refuses)
    with pytest.raises(ConfigError, match="--mixed_precision=bf16 does not work on this mps device .*: use --mixed_precision=no"):
        runtime.make_accelerator("bf16", torch.device("mps"))
    with pytest.raises(ValueError, match="requires PyTorch"):  # no precision was asked for: not the user's mistake
        runtime.make_accelerator("no", torch.device("mps"))
