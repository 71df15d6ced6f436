"""Which weights move. One file a method, one line here."""

from __future__ import annotations

from helpers.registry import Registry

METHODS: Registry = {
    "full": "helpers.methods.full:FullFineTune",
    "bitfit": "helpers.methods.bitfit:BitFit",
    "controlnet": "helpers.methods.controlnet:ControlNet",
    "lora": "helpers.methods.lora:Lora",
    "lycoris": "helpers.methods.lycoris:Lycoris",
}
