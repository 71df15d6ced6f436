"""Write the pages that are generated from the options: OPTIONS.md and the schema of the dataloader JSON.

Run it after a change of an option or of a key:

    ./simpletuner document            writes OPTIONS.md and documentation/dataloader.schema.json
    ./simpletuner document --check    exits 1 if one of them is not what the code declares
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from helpers.choices import known_axes
from helpers.config.document import options_page
from helpers.config.schema import SCHEMA_JSON, schema_text
from helpers.config.sources import REPOSITORY

OPTIONS_MD = REPOSITORY / "OPTIONS.md"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="./simpletuner document", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, only compare")
    pages = {OPTIONS_MD: options_page(known_axes()), SCHEMA_JSON: schema_text()}
    if parser.parse_args(arguments).check:
        old = [path for path, text in pages.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
        for path in pages:
            print(f"{path.name} is {'not current: run ./simpletuner document' if path in old else 'current'}")
        return 1 if old else 0
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
