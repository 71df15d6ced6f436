"""Which network. One file a family, one line here."""

from __future__ import annotations

from helpers.registry import Registry

FAMILIES: Registry = {
    "sdxl": "helpers.families.sdxl:SDXL",
}
