"""Record the golden runs, or renew some of them.

    python -m tests.golden.record                    all
    python -m tests.golden.record sdxl_lora resumed  these

A commit that renews a record says in its message and in CHANGELOG.md why the numbers had to change.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.golden.numbers import differences, measure, read_record, write_record
from tests.golden.runs import GOLDEN, ROOT, run, write_miniature

RECORDS = Path(__file__).with_name("records")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.golden.record", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"which runs: {', '.join(GOLDEN)} (default: all)")
    parser.add_argument("--checkout", type=Path, default=ROOT, help="record what the trainer in this folder computes (default: this one)")
    parser.add_argument("--compare", action="store_true", help="write nothing; print the differences from the records")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - GOLDEN.keys():
        parser.error(f"no such run: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as folder:
        for name in options.names or GOLDEN:
            _record(name, Path(folder), options.checkout.resolve(), options.compare)


def _record(name: str, folder: Path, checkout: Path, only_compare: bool) -> None:
    model = folder / "models" / GOLDEN[name].model
    model.parent.mkdir(exist_ok=True)
    if not model.exists():
        write_miniature(GOLDEN[name].model, model, checkout)
    record = measure(run(name, folder / name, model, checkout))
    before = RECORDS / name
    changes = list(differences(read_record(before), record)) if before.exists() else ["not recorded before"]
    print(f"{name}: {len(changes)} differences", *changes[:5], sep="\n    ", flush=True)
    if not only_compare:
        shutil.rmtree(before, ignore_errors=True)
        write_record(record, before)


if __name__ == "__main__":
    main()
