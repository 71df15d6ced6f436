"""Miniature models: the real architecture and file layout of a family, with random weights, in a megabyte or less.

    ./simpletuner miniature sdxl /tmp/tiny-sdxl

Tests train them, the embedded default (`demo/`) starts from one, and with them a change can be tried on a family in seconds. Everything
is made offline and from a seed; the folders load with plain diffusers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from helpers.families import family_facts
from helpers.registry import Registry

MINIATURES: Registry[Callable[..., Path]] = Registry(  # each writes a model into a folder: (folder, seed=) => the folder
    {miniature.name: miniature.writer for facts in family_facts().values() for miniature in facts.miniatures}
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="./simpletuner miniature", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("family", choices=MINIATURES, help="whose architecture and files")
    parser.add_argument("folder", type=Path, help="where the model is written to")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same weights (default: 0)")
    options = parser.parse_args(arguments)
    print(MINIATURES[options.family](options.folder, seed=options.seed))
    return 0


if __name__ == "__main__":
    main()
