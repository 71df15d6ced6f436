"""Look into the caches of a run.

    ./simpletuner cache verify --output_dir=OUTPUT_DIR         every checksum, every shard, the index against the shards
    ./simpletuner cache why FILE --output_dir=OUTPUT_DIR       the entry of a picture, and whether the next start uses it
    ./simpletuner cache gc --output_dir=OUTPUT_DIR [--delete]  what the run does not need any more; without --delete only a list
    ./simpletuner cache stats --output_dir=OUTPUT_DIR          records, bytes, shapes, encoders
    ./simpletuner cache export FILE OUT.png --output_dir=OUTPUT_DIR

FILE is a picture's path, or DATASET/FILE as dataset_report.json names it. verify and stats take --cache_dir=FOLDER as well. Start
it in the folder that the run was started in, if its paths are relative. Nothing but `gc --delete` changes anything, and that only
shards of the cache. Exit codes: 0 all well, 1 something is wrong or not current, 2 it cannot be told.
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
        ("verify", _verify, "Read every byte of the caches and compare it with what was written."),
        ("stats", _stats, "Count records, bytes, shapes and encoders."),
    ):
        place = command(name, run, help).add_mutually_exclusive_group(required=True)
        place.add_argument("--output_dir", type=Path, help="OUTPUT_DIR of a run: its config.json tells where the caches are")
        place.add_argument("--cache_dir", type=Path, help="a folder with caches in it, or a cache")
    why = command("why", _why, "Tell what the cache holds of a picture, and whether the next start of the run uses it.")
    export = command("export", _export, "Decode the cached latents of a picture with the model's VAE.")
    for each in (why, export):
        each.add_argument("file", metavar="FILE", help="path of a picture, or DATASET/FILE")
        each.add_argument("--output_dir", type=Path, required=True, help="OUTPUT_DIR of the run")
    export.add_argument("out", metavar="OUT.png", type=Path, help="where the picture is written to")
    gc = command("gc", _gc, "List the records that the next starts of some runs do not need, and the shards that nobody knows.")
    gc.add_argument("--output_dir", type=Path, required=True, action="append", help="OUTPUT_DIR; once for each run that shares a cache")
    gc.add_argument("--delete", action="store_true", help="remove them; name every run that shares a cache, or it loses its records")
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
                    unread = f"not read, since no copy is here: {elsewhere:,} of the {shards:,} shards in {view.stored_in}"
        except UserError:
            pass  # `verify` says it
        with _bar(f"verify {folder.name}", size) as advance:
            problems = list(verify(place, advance))
        print(
            f"{folder}: {records:,} records in {shards:,} shards, {size / 1e6:,.2f} MB: {_count(len(problems)) if problems else 'all well'}"
        )
        if unread:
            print(f"  {unread}; with the --output_dir of a run that uses them they are")
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
    from toolkit.cache.present import present
    from toolkit.cache.why import explain

    with _late_bar("scan") as told, present(chosen.output_dir, told) as run:
        answers = [explain(picture) for picture in run.pictures(chosen.file)]
    for _, lines in answers:
        print("\n".join(lines))
    return WELL if all(current for current, _ in answers) else WRONG


def _export(chosen: argparse.Namespace) -> int:
    from toolkit.cache.export import export
    from toolkit.cache.present import present

    with _late_bar("scan") as told, present(chosen.output_dir, told) as run:
        picture, *others = run.pictures(chosen.file)
        if others:
            names = ", ".join(f"{each.sample.dataset}/{each.sample.key}" for each in (picture, *others))
            raise UserError(f"{chosen.file} is in several data sets: name it as one of {names}.")
        width, height = export(run, picture, chosen.out)
    print(f"{chosen.out}: {width}x{height}")
    return WELL


def _gc(chosen: argparse.Namespace) -> int:
    from toolkit.cache.collect import remove, surplus, together
    from toolkit.cache.present import present

    def needs() -> Iterator[dict[Path, dict[bytes, str]]]:
        for output_dir in chosen.output_dir:
            with _late_bar(f"scan for {output_dir}") as told, present(output_dir, told) as run:
                run.require_caches_here()
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
    print(f"{records:,} records, {freed / 1e6:,.2f} MB {'removed' if chosen.delete else 'not needed; --delete removes them'}")
    return WELL


def _places(chosen: argparse.Namespace) -> list[CachePlace]:
    """The caches that exist, each once. DataError where there is none."""
    from helpers.choices import known_axes
    from helpers.config.saved import read_saved_config
    from helpers.data.sources import CachePlace, extra_texts_place, latents_place, texts_place
    from toolkit.cache.view import caches_below

    if chosen.cache_dir is not None:
        if found := [CachePlace(folder) for folder in caches_below(chosen.cache_dir)]:
            return found
        raise DataError(f"{chosen.cache_dir} holds no cache; name the --cache_dir of a run, or a folder of latents or text embeddings.")
    config = read_saved_config(chosen.output_dir, known_axes())
    places = [place(dataset, config.cache.cache_dir) for dataset in config.datasets for place in (latents_place, texts_place)]
    extras = extra_texts_place(config.datasets, config.cache.cache_dir_text, config.cache.cache_dir)
    unique = {place.folder: place for place in (*places, extras)}
    below = {cache: replace(place, folder=cache) for place in unique.values() for cache in caches_below(place.folder)}
    if found := list((below | {folder: place for folder, place in unique.items() if folder in below}).values()):
        return found
    raise DataError(f"The run of {chosen.output_dir} has no cache: none was filled yet, or it was removed.")


def _count(problems: int) -> str:
    return f"{problems:,} problem{'s' if problems != 1 else ''}"


@contextmanager
def _bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    from helpers.reporting.console import Console

    with Console().progress(title, total, "bytes" if title.startswith("verify") else "shards") as advance:
        yield advance


@contextmanager
def _late_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for work that tells (done, total), shown when it is first told of."""
    from helpers.reporting.console import Console

    with ExitStack() as shown:
        advance: Callable[[int], None] | None = None
        before = 0

        def told(done: int, total: int) -> None:
            nonlocal advance, before
            if advance is None:
                advance = shown.enter_context(Console().progress(title, total, "files"))
            advance(done - before)
            before = done

        yield told
