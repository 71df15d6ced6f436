"""Training methods: which weights are trained. One file a method, one line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from helpers.registry import Registry

if TYPE_CHECKING:
    from helpers.protocols import MethodClass

METHODS: Registry[MethodClass] = Registry(
    {
        "full": "helpers.methods.full:FullFineTune",
        "bitfit": "helpers.methods.bitfit:BitFit",
        "controlnet": "helpers.methods.controlnet:ControlNet",
        "lora": "helpers.methods.lora:Lora",
        "lycoris": "helpers.methods.lycoris:Lycoris",
    }
)
