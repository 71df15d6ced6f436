"""Runs a program whose VAE takes its time: `python slow_encoder.py SECONDS PROGRAM ARGUMENTS...`, so many for each batch."""

from __future__ import annotations

import runpy
import sys
import time
from typing import Any

from helpers.families.loading.vae import VaeCodec


def main() -> None:
    seconds, *program = sys.argv[1:]
    encode = VaeCodec.encode

    def slowly(self: VaeCodec, pixels: Any) -> Any:
        time.sleep(float(seconds))
        return encode(self, pixels)

    VaeCodec.encode = slowly  # type: ignore[method-assign]
    sys.argv = program
    runpy.run_path(program[0], run_name="__main__")


main()
