"""From a folder of files to a catalogue: list everything, open what is new or changed, judge every image under the rules.

Found = used + left out. What counts as found is every file outside system folders, but for a .txt beside an image of the same
name, which is part of that image, and the tables that the data set names. A .txt without an image is left out like any other stray
file.

Where the images of a data set have conditions, pictures of the same names in another set, that set is refreshed first: what an image
is paired with is a part of its verdict. The other set is judged last, when it is known which of its pictures have an image.
"""

from __future__ import annotations

import io
import json
import sqlite3
import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from helpers.data.base.images import ImageError, read_size
from helpers.data.base.sample import Size
from helpers.data.catalogue.captions import MAX_CAPTION_BYTES, Captioner, CaptionError, CaptionRule, decode_caption, json_list
from helpers.data.catalogue.catalogue import Catalogue, new_token
from helpers.data.catalogue.listing import Listing
from helpers.data.catalogue.table_join import JoinedTable, join_tables
from helpers.data.catalogue.tables import TableRule
from helpers.data.plan.targets import ResolutionRule, too_small
from helpers.errors import DataError, Interrupted, StorageError
from helpers.storage.backend import RemoteSource, SourceBackend

_BLOCK = 2048  # files read, or images judged, between two commits: what a kill can lose
_STOPPED = "stopped while the data sets were scanned; start again to go on"
_SHARE = 64  # most files a thread takes at once, and the longest wait for a stop to be noticed
_TIMED = 32  # files of a block that one thread reads, to see how many threads the rest of it needs
_MOST_THREADS = 32
_NEVER = -1  # a modification time that no listing shows, so that the file is tried again by the next scan
_VERSION = "c.size || ' ' || c.modified_ns || ' ' || c.etag"  # see `Catalogue.file_version`
_File = tuple[int, str, str]  # a file to open: id, kind and key
_Facts = dict[str, Any]  # what it says, by column
_LEFT_OUT_BEFORE = "unreadable: it could not be decoded when this run began, and stays left out to its end"


@dataclass(frozen=True)
class DatasetRules:
    """What decides which images of a data set are trained on, and under what caption."""

    dataset: str  # id
    resolution: ResolutionRule
    captions: CaptionRule
    tables: tuple[TableRule, ...] = ()  # of sizes, of captions, or one of both
    condition: str = ""  # the data set that holds a condition for each image, "" where they have none
    conditions_for: tuple[str, ...] = ()  # of a data set of conditions, those whose images they are for

    @property
    def opens_images(self) -> bool:
        """Whether sizes come from the images themselves."""
        return not any(table.width_column for table in self.tables)


@dataclass(frozen=True)
class ScanOptions:
    """How a data set is looked at; what is found does not depend on it."""

    threads: int | None = None  # that read; None: as many as the store needs
    on_progress: Callable[[int, int], None] = lambda done, total: None  # counts the files to open
    should_stop: Callable[[], bool] = lambda: False  # once it is true, Interrupted is raised after what was read has been kept
    trust_listing: bool = False  # a data set that has been listed before is as it was, and is not listed again


@dataclass(frozen=True)
class ScanResult:
    """What a scan found: numbers of files. found = used + left_out."""

    dataset: str
    found: int
    used: int
    left_out: int
    kinds: dict[str, int]  # files left out for each kind of reason, most frequent first
    new: int  # files the catalogue had not seen, captions included
    changed: int
    removed: int
    opened: int  # files opened by this scan; 0 on a warm start
    tables: tuple[JoinedTable, ...] = ()


@dataclass(frozen=True)
class Refreshed:
    """What the catalogue had to take over from a data set's files: numbers of them, as in `ScanResult`."""

    new: int
    changed: int
    removed: int
    opened: int
    tables: tuple[JoinedTable, ...]


def scan(
    backend: SourceBackend,
    rules: DatasetRules,
    catalogue: Catalogue,
    options: ScanOptions = ScanOptions(),
    undecodable: Collection[str] | None = None,
) -> ScanResult:
    """Bring the catalogue's rows of one data set up to date: `refresh`, then `judge`. Source files are read, never written.

    Killed at any moment it loses at most the last `_BLOCK` files read. `undecodable` is that of `judge`. DataError when there is
    nothing to train on; StorageError when the store fails while it is read.
    """
    return judge(backend, rules, catalogue, refresh(backend, rules, catalogue, options), options, undecodable)


def refresh(backend: SourceBackend, rules: DatasetRules, catalogue: Catalogue, options: ScanOptions = ScanOptions()) -> Refreshed:
    """List the files, and read what is new or changed."""
    if options.trust_listing and catalogue.was_listed(rules.dataset):
        new = changed = removed = 0
    else:
        new, changed, removed = _compare(backend, rules.dataset, catalogue)
    tables = join_tables(backend, rules.dataset, rules.tables, catalogue, options.should_stop)
    opened = 0
    pending = _count_pending(catalogue, rules)
    for block in _pending(catalogue, rules):
        for files in _read_block(backend, rules.dataset, block, catalogue, options):
            opened += files
            options.on_progress(opened, pending)
    return Refreshed(new, changed, removed, opened, tuple(tables))


def judge(
    backend: SourceBackend,
    rules: DatasetRules,
    catalogue: Catalogue,
    refreshed: Refreshed,
    options: ScanOptions = ScanOptions(),
    undecodable: Collection[str] | None = None,
) -> ScanResult:
    """Decide of each file whether it is used. Sets that it is paired with must have been refreshed, or for conditions judged.

    `undecodable` are the keys that were left out as such when the run began, so that its plan stays the same to its end; None begins a
    new run, and leaves out what earlier ones could not decode (`Catalogue.leave_out_undecodable`).
    """
    _judge(catalogue, rules, undecodable, options.should_stop)
    used, kinds = catalogue.totals(rules.dataset)
    left_out = kinds.total()
    if not used:
        raise DataError(_nothing_left(backend, rules.dataset, catalogue, kinds))
    return ScanResult(rules.dataset, used + left_out, used, left_out, dict(kinds.most_common()), **vars(refreshed))


# 1. The listing against the catalogue.


def _compare(backend: SourceBackend, dataset: str, catalogue: Catalogue) -> tuple[int, int, int]:
    """Take over the listing in one transaction: numbers of new, changed and removed files. Changed files lose their facts."""
    with Listing(backend, catalogue.path.parent) as listing, catalogue.transaction() as database:
        if database.execute("SELECT digest FROM listings WHERE dataset = ?", (dataset,)).fetchone() == (listing.digest,):
            return 0, 0, 0
        database.execute("DROP TABLE IF EXISTS temp.listed")
        database.execute(
            "CREATE TEMP TABLE listed"
            " (key TEXT PRIMARY KEY, kind TEXT, stem TEXT, size INTEGER, modified_ns INTEGER, etag TEXT, problem TEXT)"
        )
        database.executemany("INSERT OR REPLACE INTO listed VALUES (?, ?, ?, ?, ?, ?, ?)", listing.rows())
        removed = database.execute("DELETE FROM files WHERE dataset = ? AND key NOT IN (SELECT key FROM listed)", (dataset,)).rowcount
        if removed:  # before a row gets the number of one that is gone
            gone = "NOT IN (SELECT id FROM files)"
            database.execute(f"DELETE FROM pairs WHERE id {gone} OR condition {gone}")
        changed = database.execute(
            "UPDATE files SET size = l.size, modified_ns = l.modified_ns, etag = l.etag, was_read = 0, width = NULL, height = NULL,"
            " text = NULL, text_problem = NULL, problem = l.problem, undecodable = NULL, content = NULL, captions = NULL, left_out = NULL"
            " FROM listed l WHERE dataset = ? AND files.key = l.key"
            " AND (files.size, files.modified_ns, files.etag) IS NOT (l.size, l.modified_ns, l.etag)",
            (dataset,),
        ).rowcount
        new = database.execute(
            "INSERT OR IGNORE INTO files (dataset, key, kind, stem, size, modified_ns, etag, problem)"
            " SELECT ?, key, kind, stem, size, modified_ns, etag, problem FROM listed ORDER BY key",
            (dataset,),
        ).rowcount
        database.execute("DROP TABLE temp.listed")
        database.execute("INSERT OR REPLACE INTO listings VALUES (?, ?)", (dataset, listing.digest))
        if new or changed or removed:
            # In the same transaction: whoever is killed from here on leaves a catalogue that knows it has to be judged again.
            database.execute("DELETE FROM verdicts WHERE dataset = ?", (dataset,))
            database.execute("DELETE FROM joined WHERE dataset = ?", (dataset,))
    return new, changed, removed


# 2. Facts from files.

_PENDING = "dataset = ? AND was_read = 0 AND ((kind = 'image' AND ?) OR (kind = 'caption' AND ?))"


def _pending_values(rules: DatasetRules) -> tuple[str, bool, bool]:
    """What stands for the question marks of `_PENDING`."""
    return rules.dataset, rules.opens_images, rules.captions.reads_files


def _count_pending(catalogue: Catalogue, rules: DatasetRules) -> int:
    with catalogue.transaction() as database:
        return database.execute(f"SELECT count(*) FROM files WHERE {_PENDING}", _pending_values(rules)).fetchone()[0]


def _pending(catalogue: Catalogue, rules: DatasetRules) -> Iterator[list[_File]]:
    """Blocks of the files to open."""
    last = -1
    query = f"SELECT id, kind, key FROM files WHERE {_PENDING} AND id > ? ORDER BY id LIMIT {_BLOCK}"
    while True:
        with catalogue.transaction() as database:
            block = database.execute(query, (*_pending_values(rules), last)).fetchall()
        if not block:
            return
        yield block
        last = block[-1][0]


def _read_block(backend: SourceBackend, dataset: str, block: list[_File], catalogue: Catalogue, options: ScanOptions) -> Iterator[int]:
    """Read a block of files and keep what they say. Yields the number of files read since it last did."""
    facts: list[_Facts] = []
    try:
        for told in _read(backend, block, options):
            facts += told
            yield len(told)
    finally:
        with catalogue.transaction() as database:
            database.executemany(
                "UPDATE files SET was_read = 1, width = :width, height = :height, problem = :problem,"
                " text = CASE kind WHEN 'caption' THEN :text ELSE text END,"  # an image's is what a table said
                " modified_ns = coalesce(:modified_ns, modified_ns) WHERE id = :id",
                facts,
            )
            if any(fact["modified_ns"] == _NEVER for fact in facts):
                database.execute("DELETE FROM listings WHERE dataset = ?", (dataset,))  # the next scan has to look at every row
    if options.should_stop():
        raise Interrupted(_STOPPED)


def _read(backend: SourceBackend, block: list[_File], options: ScanOptions) -> Iterator[list[_Facts]]:
    """What the files of a block say, some at a time and in their order. Ends early, without a word, where a stop is asked for."""

    def read(files: list[_File]) -> list[_Facts]:
        return [] if options.should_stop() else [_facts(backend, *file) for file in files]

    threads = options.threads or (2 * backend.reads_at_once if isinstance(backend, RemoteSource) else 0)
    if not threads:
        timed = [_timed(backend, file) for file in block[:_TIMED] if not options.should_stop()]
        yield [facts for facts, _ in timed]
        threads = _threads_for([longer for _, longer in timed])
        block = block[_TIMED:]
    share = max(1, min(_SHARE, _BLOCK // threads))
    with ThreadPoolExecutor(threads, thread_name_prefix="scan") as pool:
        yield from pool.map(read, (block[start : start + share] for start in range(0, len(block), share)))


def _timed(backend: SourceBackend, file: _File) -> tuple[_Facts, float]:
    """What a file says, and how many times as long as this thread computed that took."""
    began, began_computing = time.perf_counter(), time.thread_time()
    facts = _facts(backend, *file)
    seconds, computing = time.perf_counter() - began, time.thread_time() - began_computing
    return facts, seconds / max(computing, 1e-6)


def _threads_for(longer: list[float]) -> int:
    """How many threads read fastest, if files took that many times as long as computing alone: no two threads compute at once.

    The median, since another program that takes the core away does so for a few files and not for most.
    """
    return max(1, min(_MOST_THREADS, round(statistics.median(longer)))) if longer else 1


def _facts(backend: SourceBackend, row: int, kind: str, key: str) -> _Facts:
    """What one file says: an image's size or a caption's text, or the problem with it."""
    facts: _Facts = dict.fromkeys(("width", "height", "text", "problem", "modified_ns"))
    facts["id"] = row
    try:
        if kind == "image":
            facts["width"], facts["height"] = _size(backend, key)
        else:
            with backend.open(key) as stream:
                facts["text"] = decode_caption(stream.read(MAX_CAPTION_BYTES + 1), key)
    except (ImageError, CaptionError) as error:
        facts["problem"] = str(error)
    except (FileNotFoundError, PermissionError) as error:
        what = "caption cannot be opened" if kind == "caption" else "cannot be opened"
        facts["problem"] = f"{what}: {error.strerror or error}"
        facts["modified_ns"] = _NEVER
    except OSError as error:
        raise StorageError(f"{backend.name}: {key} could not be read: {error.strerror or error}") from error
    return facts


def _size(backend: SourceBackend, key: str) -> Size:
    """An image's size from its header. What came over a network counts as damaged only after the whole file, which is checked, was read."""
    try:
        with backend.open(key) as stream:
            return read_size(stream)
    except ImageError:
        if not isinstance(backend, RemoteSource):
            raise
    return read_size(io.BytesIO(backend.read(key)))


# 3. The verdict.


def _judge(catalogue: Catalogue, rules: DatasetRules, undecodable: Collection[str] | None, should_stop: Callable[[], bool]) -> None:
    """Give every file its captions or its reason, unless that was done under the same rules and nothing has changed since."""
    partners = [catalogue.listing(name) for name in (rules.condition, *rules.conditions_for) if name]
    with catalogue.transaction() as database:
        _forget_conditions(database, rules)
        if undecodable is None:
            known = database.execute("SELECT key FROM files WHERE dataset = ? AND undecodable IS NOT NULL", (rules.dataset,))
            undecodable = [key for (key,) in known]
        stated = json.dumps([asdict(rules), sorted(undecodable), *partners], sort_keys=True)
        judged = database.execute("SELECT rules FROM verdicts WHERE dataset = ?", (rules.dataset,)).fetchone()
        if judged == (stated,):
            return
        captioner, left_out_before = Captioner(rules.captions, rules.dataset), frozenset(undecodable)
        database.execute("UPDATE files SET left_out = problem WHERE dataset = ? AND kind = 'other'", (rules.dataset,))
        database.execute(
            "UPDATE files SET left_out = CASE WHEN EXISTS (SELECT 1 FROM files image WHERE image.dataset = files.dataset"
            " AND image.stem = files.stem AND image.kind = 'image') THEN NULL ELSE 'caption without an image: no image has this name' END"
            " WHERE dataset = ? AND kind = 'caption'",
            (rules.dataset,),
        )
        for table in rules.tables:
            database.execute("UPDATE files SET left_out = NULL WHERE dataset = ? AND key = ?", (rules.dataset, table.path))
        _pair(database, rules)
        for images in _images(database, rules):
            verdicts = (_verdict(image, rules, captioner, left_out_before) for image in images)
            database.executemany("UPDATE files SET captions = ?, left_out = ? WHERE id = ?", verdicts)
            if should_stop():
                raise Interrupted(_STOPPED)
        if rules.conditions_for:
            database.execute(
                "UPDATE files SET captions = NULL, left_out = 'condition without an image: no image has this name'"
                " WHERE dataset = ? AND captions IS NOT NULL AND id NOT IN (SELECT condition FROM pairs)",
                (rules.dataset,),
            )
        (used,) = database.execute("SELECT count(*) FROM used WHERE dataset = ?", (rules.dataset,)).fetchone()
        reasons = database.execute("SELECT left_out FROM files WHERE dataset = ? AND left_out IS NOT NULL ORDER BY key", (rules.dataset,))
        kinds = Counter(reason.partition(":")[0] for (reason,) in reasons)
        database.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?, ?)", (rules.dataset, stated, used, json.dumps(kinds)))
        database.execute("INSERT OR REPLACE INTO marks VALUES (?, ?)", (rules.dataset, new_token()))


def _forget_conditions(database: sqlite3.Connection, rules: DatasetRules) -> None:
    """What could not be decoded of an image's condition says nothing of the file that is there now, nor of a run without conditions."""
    is_same = f"p.id = files.id AND p.version = {_VERSION} AND c.dataset = ?"
    database.execute(
        "UPDATE files SET undecodable = NULL WHERE dataset = ? AND undecodable LIKE 'condition %'"
        f" AND NOT EXISTS (SELECT 1 FROM pairs p JOIN files c ON c.id = p.condition WHERE {is_same})",
        (rules.dataset, rules.condition),
    )


def _pair(database: sqlite3.Connection, rules: DatasetRules) -> None:
    """Find the condition of each image: the picture of the same name in the other set, whatever the ending, the same ending first."""
    database.execute("DELETE FROM pairs WHERE id IN (SELECT id FROM files WHERE dataset = ?)", (rules.dataset,))
    if rules.condition:
        named = "SELECT id FROM files o WHERE o.dataset = :condition AND o.kind = 'image'"
        database.execute(
            f"INSERT INTO pairs SELECT i.id, c.id, {_VERSION} FROM files i JOIN files c ON c.id ="
            f" coalesce(({named} AND o.key = i.key), ({named} AND o.stem = i.stem ORDER BY o.key LIMIT 1))"
            " WHERE i.dataset = :dataset AND i.kind = 'image'",
            {"dataset": rules.dataset, "condition": rules.condition},
        )


def _images(database: sqlite3.Connection, rules: DatasetRules) -> Iterator[list[tuple[Any, ...]]]:
    """Blocks of images with what is said of them; the rows of a block may be updated before the next is asked for."""
    last = ""
    said = "i.text, i.text_problem" if rules.captions.table else "t.text, t.problem"
    query = (
        f"SELECT i.key, i.id, i.width, i.height, i.problem, i.undecodable, {said}, c.id, c.width, c.height, c.problem"
        " FROM (SELECT * FROM files WHERE dataset = :dataset AND kind = 'image' AND key > :last ORDER BY key LIMIT :block) i"
        # "cat.TXT" may stand beside "cat.txt": the first by name counts.
        " LEFT JOIN files t ON t.id = (SELECT id FROM files c WHERE c.dataset = :dataset AND c.stem = i.stem AND c.kind = 'caption'"
        " ORDER BY c.key LIMIT 1) LEFT JOIN pairs ON pairs.id = i.id LEFT JOIN files c ON c.id = pairs.condition ORDER BY i.key"
    )
    while block := database.execute(query, {"dataset": rules.dataset, "last": last, "block": _BLOCK}).fetchall():
        yield block
        last = block[-1][0]


def _verdict(
    image: tuple[Any, ...], rules: DatasetRules, captioner: Captioner, undecodable: frozenset[str]
) -> tuple[str | None, str | None, int]:
    """Captions as a JSON list, or a reason, and the row id."""
    key, row, width, height, problem, found_undecodable, text, text_problem, *condition = image
    reason = problem
    if reason is None and key in undecodable:
        reason = found_undecodable or _LEFT_OUT_BEFORE
    reason = reason or too_small(Size(width, height), rules.resolution)
    if reason is None and rules.condition:
        reason = _problem_of_condition(Size(width, height), rules.condition, *condition)
    if reason is None and (rules.captions.reads_files or rules.captions.table):
        reason = text_problem
    if reason is not None:
        return None, reason, row
    texts = text if text is None else json.loads(text) if rules.captions.table else [text]
    try:
        return json_list(captioner.captions(key, texts)), None, row
    except CaptionError as error:
        return None, str(error), row


def _problem_of_condition(
    image: Size, dataset: str, row: int | None, width: int | None, height: int | None, problem: str | None
) -> str | None:
    """Why an image cannot be trained with its condition, as "kind: detail", or None. `dataset` is the one that should have it."""
    if row is None:
        return f"no condition: no picture of {dataset!r} has this name"
    if problem is not None or width is None or height is None:
        return f"condition {problem or 'unreadable: its size is not known'}"
    if not same_shape(image, Size(width, height)):
        return f"condition of another shape: it is {Size(width, height)}, and the image {image}"
    return None


def same_shape(image: Size, other: Size) -> bool:
    """Whether one picture is the other at another scale, each edge to the nearest pixel or the next one."""
    across, down = image.width * other.height, image.height * other.width
    return abs(across - down) <= max(image.width, image.height, other.width, other.height)


def _nothing_left(backend: SourceBackend, dataset: str, catalogue: Catalogue, kinds: Counter[str]) -> str:
    if not kinds:
        return f"data set {dataset!r}: {backend.name} holds no files; put images there, or point the data set elsewhere."
    first = next(catalogue.left_out(dataset))
    counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
    return (
        f"data set {dataset!r}: all {kinds.total():,} files in {backend.name} are left out ({counts}), such as {first.key}: {first.reason}."
    )
