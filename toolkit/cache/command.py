"""Inspect the caches of a run.

    ./simpletuner cache verify --output_dir=OUTPUT_DIR         check every byte, every shard, and the index
    ./simpletuner cache why FILE --output_dir=OUTPUT_DIR       explain an image's cache entry, and whether the next start uses it
    ./simpletuner cache gc --output_dir=OUTPUT_DIR [--delete]  list or delete what the run no longer needs
    ./simpletuner cache stats --output_dir=OUTPUT_DIR          count records, bytes, tensor shapes, encoders
    ./simpletuner cache export FILE OUT.png --output_dir=OUTPUT_DIR
                                                               decode an image's cached latents

FILE is an image's path, or DATASET/FILE as in dataset_report.json. verify and stats also take --cache_dir=FOLDER. If the run used
relative paths, start this in the folder where the run was started. Only `gc --delete` changes anything: it deletes shards of the cache.
Exit codes: 0 no problem, 1 a problem was found or an entry is not current, 2 refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.errors import ConfigError, DataError, StorageError, UserError

if TYPE_CHECKING:
    from helpers.data.sources import CachePlace

WELL, WRONG, REFUSED = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = _parser().parse_args(arguments)
    try:
        return chosen.command(chosen)
    except ConfigError as error:
        print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
    except (UserError, StorageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    return REFUSED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="./simpletuner cache", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=help)
        added.set_defaults(command=run)
        return added

    for name, run, help in (
        ("verify", _verify, "Read every byte of the caches and compare it with its checksum."),
        ("stats", _stats, "Count records, bytes, tensor shapes and encoders."),
    ):
        place = command(name, run, help).add_mutually_exclusive_group(required=True)
        place.add_argument("--output_dir", type=Path, help="OUTPUT_DIR of a run; its config.json says where the caches are")
        place.add_argument("--cache_dir", type=Path, help="a cache, or a folder with caches in it")
    why = command("why", _why, "Explain an image's cache entry, and say whether the next start of the run uses it.")
    export = command("export", _export, "Decode the cached latents of an image with the model's VAE.")
    for each in (why, export):
        each.add_argument("file", metavar="FILE", help="path of an image, or DATASET/FILE")
        each.add_argument("--output_dir", type=Path, required=True, help="OUTPUT_DIR of the run")
    export.add_argument("out", metavar="OUT.png", type=Path, help="the image file to write")
    gc = command("gc", _gc, "List the records that the next start of these runs would not use, and the shards that are not in the index.")
    gc.add_argument("--output_dir", type=Path, required=True, action="append", help="OUTPUT_DIR; repeat for each run that shares the cache")
    gc.add_argument("--delete", action="store_true", help="delete them; name every run that shares the cache, or it loses its records")
    return parser


def _verify(chosen: argparse.Namespace) -> int:
    from toolkit.cache.verify import verify
    from toolkit.cache.view import view_of

    wrong = 0
    for place in _places(chosen):
        folder = place.folder
        shards, records, size, unread = 0, 0, 0, ""
        try:
            with view_of(place) as view:
                known = view.shards()
                shards, records, size = len(known), sum(len(view.records(shard)) for shard in known), sum(shard.size for shard in known)
                if view.store is None and (elsewhere := len(view.elsewhere())):
                    unread = f"not read, because there is no local copy: {elsewhere:,} of the {shards:,} shards in {view.stored_in}"
        except UserError:
            pass  # `verify` reports it
        with _bar(f"verify {folder.name}", size) as advance:
            problems = list(verify(place, advance))
        print(f"{folder}: {records:,} records in {shards:,} shards, {size / 1e6:,.2f} MB: {_count(len(problems))}")
        if unread:
            print(f"  {unread}; with --output_dir of a run that uses the bucket, they are read too")
        for problem in problems:
            print(f"  {problem}")
        wrong += len(problems)
    return WRONG if wrong else WELL


def _stats(chosen: argparse.Namespace) -> int:
    from toolkit.cache.stats import describe

    for place in _places(chosen):
        print("\n".join(describe(place.folder)))
    return WELL


def _why(chosen: argparse.Namespace) -> int:
    from toolkit.cache.current_run import open_run
    from toolkit.cache.why import explain

    with _late_bar("scan") as progress, open_run(chosen.output_dir, progress) as run:
        answers = [explain(image) for image in run.images(chosen.file)]
    for _, lines in answers:
        print("\n".join(lines))
    return WELL if all(current for current, _ in answers) else WRONG


def _export(chosen: argparse.Namespace) -> int:
    from toolkit.cache.current_run import open_run
    from toolkit.cache.export import export

    with _late_bar("scan") as progress, open_run(chosen.output_dir, progress) as run:
        image, *others = run.images(chosen.file)
        if others:
            names = ", ".join(f"{each.sample.dataset}/{each.sample.key}" for each in (image, *others))
            raise UserError(f"{chosen.file} is in several datasets: name it as one of {names}.")
        width, height = export(run, image, chosen.out)
    print(f"{chosen.out}: {width}x{height}")
    return WELL


def _gc(chosen: argparse.Namespace) -> int:
    from toolkit.cache.collect import remove, surplus, together
    from toolkit.cache.current_run import open_run

    def needs() -> Iterator[dict[Path, dict[bytes, str]]]:
        for output_dir in chosen.output_dir:
            with _late_bar(f"scan for {output_dir}") as progress, open_run(output_dir, progress) as run:
                run.require_local_caches()
                yield run.needed()

    needed = together(needs())
    found = {folder: surplus(folder, needed[folder]) for folder in needed}
    for each in (item for items in found.values() for item in items):
        print(each)
    records = sum(each.records for items in found.values() for each in items)
    freed = sum(each.bytes for items in found.values() for each in items)
    if chosen.delete:
        with _bar("clean up", sum(map(len, found.values()))) as advance:
            for folder in needed:
                remove(folder, needed[folder], advance)
    print(f"{records:,} records, {freed / 1e6:,.2f} MB {'deleted' if chosen.delete else 'not needed; --delete deletes them'}")
    return WELL


def _places(chosen: argparse.Namespace) -> list[CachePlace]:
    """The existing caches, each once. DataError if there is none."""
    from helpers.choices import known_axes
    from helpers.config.saved import read_saved_config
    from helpers.data.sources import CachePlace, extra_texts_place, latents_place, texts_place
    from toolkit.cache.view import caches_below

    if chosen.cache_dir is not None:
        if found := [CachePlace(folder) for folder in caches_below(chosen.cache_dir)]:
            return found
        raise DataError(f"{chosen.cache_dir} contains no cache; name the --cache_dir of a run, or a folder of latents or text embeddings.")
    config = read_saved_config(chosen.output_dir, known_axes())
    places = [place(dataset, config.cache.cache_dir) for dataset in config.datasets for place in (latents_place, texts_place)]
    extras = extra_texts_place(config.datasets, config.cache.cache_dir_text, config.cache.cache_dir)
    unique = {place.folder: place for place in (*places, extras)}
    below = {cache: replace(place, folder=cache) for place in unique.values() for cache in caches_below(place.folder)}
    if found := list((below | {folder: place for folder, place in unique.items() if folder in below}).values()):
        return found
    raise DataError(f"The run of {chosen.output_dir} has no cache yet, or it was deleted.")


def _count(problems: int) -> str:
    return f"{problems:,} problem{'s' if problems != 1 else ''}" if problems else "no problems"


@contextmanager
def _bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    from helpers.reporting.console import Console

    with Console().progress(title, total, "bytes" if title.startswith("verify") else "shards") as advance:
        yield advance


@contextmanager
def _late_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A callback (done, total) with a progress bar that appears at the first call."""
    from helpers.reporting.console import Console

    with ExitStack() as shown:
        advance: Callable[[int], None] | None = None
        before = 0

        def update(done: int, total: int) -> None:
            nonlocal advance, before
            if advance is None:
                advance = shown.enter_context(Console().progress(title, total, "files"))
            advance(done - before)
            before = done

        yield update
