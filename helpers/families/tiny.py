"""Miniature models: the real architecture and file layout of a family, with random weights, in a megabyte or less.

    ./simpletuner miniature sdxl /tmp/tiny-sdxl

Use one to try settings or a change of the code in seconds. Tests train them, and the demo model (`demo/`) started as one. They are
generated from a seed, without a network connection, and plain diffusers loads them.
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
    parser.add_argument("family", choices=MINIATURES, help="the model family")
    parser.add_argument("folder", type=Path, help="folder to write the model to")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same weights (default: 0)")
    options = parser.parse_args(arguments)
    print(MINIATURES[options.family](options.folder, seed=options.seed))
    return 0


if __name__ == "__main__":
    main()
