"""The scan: list the files of a dataset, open new and changed ones, and decide for every file whether it is used, and why not.

    result = scan(LocalSource("/data/photos"), DatasetRules("photos", ResolutionRule(), CaptionRule("textfile")), catalogue)
    result.found, result.used, result.left_out  # found = used + left out

Every file counts as found, except those in system folders, tables named in the settings, and caption files that belong to an image. A
caption file without an image is left out, with a reason, like any other file.

A dataset is paired with those of its companions, such as the conditioning images of a ControlNet or loss masks, by file name. Companions
are refreshed first, because an image without a usable one is left out. They are judged last, when it is known which of them have an image.
"""

from __future__ import annotations

import functools
import io
import json
import posixpath
import sqlite3
import statistics
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from helpers.data.base.images import ImageError, read_size
from helpers.data.base.sample import MASK, ROLES, Size
from helpers.data.catalogue.captions import (
    MAX_CAPTION_BYTES,
    Captioner,
    CaptionError,
    CaptionRule,
    captions_in_json,
    decode_caption,
    json_list,
)
from helpers.data.catalogue.catalogue import Catalogue, joined_companions, new_token
from helpers.data.catalogue.listing import Listing
from helpers.data.catalogue.masks import known_masks, problem_of_mask
from helpers.data.catalogue.table_join import JoinedTable, join_tables
from helpers.data.catalogue.tables import TableRule
from helpers.data.plan.targets import ResolutionRule, unsuitable_size
from helpers.errors import DataError, Interrupted, StorageError, quoted
from helpers.storage.backend import RemoteSource, SourceBackend

_BLOCK = 2048  # files read, or images judged, in one transaction: a kill loses at most these
_STOPPED = "stopped while the datasets were scanned; start again to continue"
_SHARE = 64  # files that a thread takes at once; a stop is noticed between two shares
_TIMED = 32  # files of a block that are read one by one, to measure how many threads are useful
_MOST_THREADS = 32
_NEVER = -1  # a modification time that no file has, so that the next scan reads the file again
_VERSION = "c.size || ' ' || c.modified_ns || ' ' || c.etag"  # see `Catalogue.file_version`
_File = tuple[int, str, str]  # a file to read: id, kind and key
_Facts = dict[str, Any]  # what was read from it, by column
_LEFT_OUT_BEFORE = "unreadable: it could not be decoded when this run started, and stays left out"


@dataclass(frozen=True)
class DatasetRules:
    """The settings that decide which images of a dataset are used, and with which captions."""

    dataset: str  # id
    resolution: ResolutionRule
    captions: CaptionRule
    tables: tuple[TableRule, ...] = ()  # with sizes, with captions, or with both
    companions: tuple[tuple[str, str], ...] = ()  # (role, id of the dataset that has them), in the order of ROLES
    alpha_is_mask: bool = False  # the images' own alpha channels are their loss masks
    role: str = ""  # for a dataset of companions: its role ...
    users: tuple[str, ...] = ()  # ... and the ids of the datasets that use it

    @property
    def is_masked(self) -> bool:
        return self.alpha_is_mask or MASK in dict(self.companions)

    @property
    def opens_images(self) -> bool:
        """Whether sizes are read from the images, and not from a table."""
        return not any(table.width_column for table in self.tables)


@dataclass(frozen=True)
class ScanOptions:
    """How to scan. The result does not depend on these options."""

    threads: int | None = None  # reading threads; None measures how many are useful
    on_progress: Callable[[int, int], None] = lambda done, total: None  # in files to read
    should_stop: Callable[[], bool] = lambda: False  # if true, what was read is stored and Interrupted raised
    trust_listing: bool = False  # do not list a dataset again that was listed before


@dataclass(frozen=True)
class ScanResult:
    """The result of a scan, in numbers of files. found = used + left_out."""

    dataset: str
    found: int
    used: int
    left_out: int
    kinds: dict[str, int]  # files left out by kind of reason, most frequent first
    new: int  # files that were not in the catalogue before, caption files included
    changed: int
    removed: int
    opened: int  # files read by this scan; 0 if nothing has changed
    tables: tuple[JoinedTable, ...] = ()
    skipped_folders: int = 0  # system folders, such as recycle bins, that were not entered


@dataclass(frozen=True)
class Refreshed:
    """What `refresh` changed in the catalogue, in numbers of files as in `ScanResult`."""

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
    """Update the catalogue for one dataset: `refresh`, then `judge`. Source files are only read.

    A kill loses at most the last `_BLOCK` files read. For `undecodable` see `judge`. DataError if no image is left to train on,
    StorageError if the source fails.
    """
    return judge(backend, rules, catalogue, refresh(backend, rules, catalogue, options), options, undecodable)


def refresh(backend: SourceBackend, rules: DatasetRules, catalogue: Catalogue, options: ScanOptions = ScanOptions()) -> Refreshed:
    """List the files, and read those that are new or changed."""
    if options.trust_listing and catalogue.was_listed(rules.dataset):
        new = changed = removed = 0
    else:
        new, changed, removed = _compare(backend, rules, catalogue)
    tables = join_tables(backend, rules.dataset, rules.tables, catalogue, functools.partial(_known_size, backend), options.should_stop)
    opens_images = rules.opens_images or any(table.swapped for table in tables)
    opened = 0
    which = (rules.dataset, opens_images, rules.captions.reads_files)
    pending = _count_pending(catalogue, which)
    for block in _pending(catalogue, which):
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
    """Decide for each file whether it is used.

    Before, the dataset's companions must be refreshed, and its masks measured (masks.py); for a dataset of companions, the datasets that
    use it judged.
    `undecodable` are the keys that were left out as undecodable when the run started, so that the plan stays the same until the run ends.
    None starts a new run, which leaves out what earlier runs could not decode (`Catalogue.leave_out_undecodable`).
    """
    _judge(catalogue, rules, undecodable, options.should_stop)
    used, kinds = catalogue.totals(rules.dataset)
    left_out = kinds.total()
    if not used:
        raise DataError(_nothing_left(backend, rules, catalogue, kinds))
    return ScanResult(
        dataset=rules.dataset,
        found=used + left_out,
        used=used,
        left_out=left_out,
        kinds=dict(kinds.most_common()),
        skipped_folders=len(catalogue.skipped_folders(rules.dataset)),
        **vars(refreshed),
    )


# -- 1. compare the listing with the catalogue -------------------------------------------------------------------------------


def _compare(backend: SourceBackend, rules: DatasetRules, catalogue: Catalogue) -> tuple[int, int, int]:
    """Apply the listing in one transaction. Returns the numbers of new, changed and removed files. Changed files are read again."""
    dataset = rules.dataset
    with Listing(backend, catalogue.path.parent, rules.captions.extensions) as listing, catalogue.transaction() as database:
        if database.execute("SELECT digest FROM listings WHERE dataset = ?", (dataset,)).fetchone() == (listing.digest,):
            return 0, 0, 0
        database.execute("DELETE FROM skipped WHERE dataset = ?", (dataset,))
        database.executemany("INSERT INTO skipped VALUES (?, ?)", ((dataset, folder) for folder in listing.folders))
        database.execute("DROP TABLE IF EXISTS temp.listed")
        database.execute(
            "CREATE TEMP TABLE listed"
            " (key TEXT PRIMARY KEY, kind TEXT, stem TEXT, size INTEGER, modified_ns INTEGER, etag TEXT, problem TEXT)"
        )
        database.executemany("INSERT OR REPLACE INTO listed VALUES (?, ?, ?, ?, ?, ?, ?)", listing.rows())
        removed = database.execute("DELETE FROM files WHERE dataset = ? AND key NOT IN (SELECT key FROM listed)", (dataset,)).rowcount
        if removed:  # before a new row reuses the id of a removed one
            gone = "NOT IN (SELECT id FROM files)"
            database.execute(f"DELETE FROM companions WHERE id {gone} OR companion {gone}")
        changed = database.execute(
            "UPDATE files SET kind = l.kind, size = l.size, modified_ns = l.modified_ns, etag = l.etag, was_read = 0, width = NULL,"
            " height = NULL,"
            " text = NULL, text_problem = NULL, problem = l.problem, undecodable = NULL, content = NULL, captions = NULL, left_out = NULL"
            " FROM listed l WHERE dataset = ? AND files.key = l.key"
            " AND (files.size, files.modified_ns, files.etag, files.kind) IS NOT (l.size, l.modified_ns, l.etag, l.kind)",
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
            # In the same transaction, so that a kill from here on leaves a catalogue that will be judged again.
            database.execute("DELETE FROM verdicts WHERE dataset = ?", (dataset,))
            database.execute("DELETE FROM joined WHERE dataset = ?", (dataset,))
            _pair_captions(database, dataset)
    return new, changed, removed


def _pair_captions(database: sqlite3.Connection, dataset: str) -> None:
    """Give caption files without an image the stem of the image whose name is the same text in another Unicode form.

    Macs write `é` as two characters, other systems as one. An image that has a caption file of exactly its name keeps that.
    """
    database.create_function("own_stem", 1, lambda key: posixpath.splitext(key)[0], deterministic=True)
    database.execute("UPDATE files SET stem = own_stem(key) WHERE dataset = ? AND kind = 'caption' AND stem <> own_stem(key)", (dataset,))
    alone = "SELECT id, stem FROM files f WHERE dataset = ? AND kind = ? AND stem GLOB '*[^ -~]*' AND NOT EXISTS ({})"
    partner = "SELECT 1 FROM files o WHERE o.dataset = f.dataset AND o.stem = f.stem AND o.kind = '{}'"
    captions = database.execute(alone.format(partner.format("image")), (dataset, "caption")).fetchall()
    if captions:
        images = database.execute(alone.format(partner.format("caption")), (dataset, "image"))
        stems = {unicodedata.normalize("NFC", stem): stem for _, stem in images}
        found = ((stems.get(unicodedata.normalize("NFC", stem), stem), row) for row, stem in captions)
        database.executemany("UPDATE files SET stem = ? WHERE id = ?", found)


# -- 2. read new and changed files -------------------------------------------------------------------------------------------

_Which = tuple[str, bool, bool]  # the dataset, and whether its images and its caption files are read
_PENDING = "dataset = ? AND was_read = 0 AND ((kind = 'image' AND ?) OR (kind = 'caption' AND ?))"


def _count_pending(catalogue: Catalogue, which: _Which) -> int:
    with catalogue.transaction() as database:
        return database.execute(f"SELECT count(*) FROM files WHERE {_PENDING}", which).fetchone()[0]


def _pending(catalogue: Catalogue, which: _Which) -> Iterator[list[_File]]:
    """The files to read, in blocks."""
    last = -1
    query = f"SELECT id, kind, key FROM files WHERE {_PENDING} AND id > ? ORDER BY id LIMIT {_BLOCK}"
    while True:
        with catalogue.transaction() as database:
            block = database.execute(query, (*which, last)).fetchall()
        if not block:
            return
        yield block
        last = block[-1][0]


def _read_block(backend: SourceBackend, dataset: str, block: list[_File], catalogue: Catalogue, options: ScanOptions) -> Iterator[int]:
    """Read a block of files and store the result. Yields the number of files read since the last yield."""
    facts: list[_Facts] = []
    try:
        for read in _read(backend, block, options):
            facts += read
            yield len(read)
    finally:
        with catalogue.transaction() as database:
            database.executemany(
                "UPDATE files SET was_read = 1, width = :width, height = :height, problem = :problem,"
                " text = CASE kind WHEN 'caption' THEN :text ELSE text END,"  # for an image it comes from a table
                " modified_ns = coalesce(:modified_ns, modified_ns) WHERE id = :id",
                facts,
            )
            if any(fact["modified_ns"] == _NEVER for fact in facts):
                database.execute("DELETE FROM listings WHERE dataset = ?", (dataset,))  # so that the next scan compares every row
    if options.should_stop():
        raise Interrupted(_STOPPED)


def _read(backend: SourceBackend, block: list[_File], options: ScanOptions) -> Iterator[list[_Facts]]:
    """Read the files of a block, in order, some at a time. Ends early if a stop is requested; the caller raises."""

    def read_share(files: list[_File]) -> list[_Facts]:
        return [] if options.should_stop() else [_facts(backend, *file) for file in files]

    threads = options.threads or (2 * backend.reads_at_once if isinstance(backend, RemoteSource) else 0)
    if not threads:
        timed = [_read_timed(backend, file) for file in block[:_TIMED] if not options.should_stop()]
        yield [facts for facts, _ in timed]
        threads = _useful_threads([ratio for _, ratio in timed])
        block = block[_TIMED:]
    share = max(1, min(_SHARE, _BLOCK // threads))
    with ThreadPoolExecutor(threads, thread_name_prefix="scan") as pool:
        yield from pool.map(read_share, (block[start : start + share] for start in range(0, len(block), share)))


def _read_timed(backend: SourceBackend, file: _File) -> tuple[_Facts, float]:
    """Read a file. Also returns the ratio of the time it took to the time this thread was computing."""
    began, began_computing = time.perf_counter(), time.thread_time()
    facts = _facts(backend, *file)
    seconds, computing = time.perf_counter() - began, time.thread_time() - began_computing
    return facts, seconds / max(computing, 1e-6)


def _useful_threads(ratios: list[float]) -> int:
    """The number of threads that read fastest. Only one of Python's threads computes at a time, so waiting is all they can share.

    The median ratio, because another program may have taken the core away for some of the files.
    """
    return max(1, min(_MOST_THREADS, round(statistics.median(ratios)))) if ratios else 1


def _facts(backend: SourceBackend, row: int, kind: str, key: str) -> _Facts:
    """Read one file: an image's size, or a caption file's text, or the reason why it cannot be used."""
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
    """An image's size from its header. A remote image counts as damaged only after the whole file, whose checksum is verified, was read."""
    try:
        with backend.open(key) as stream:
            return read_size(stream)
    except ImageError:
        if not isinstance(backend, RemoteSource):
            raise
    return read_size(io.BytesIO(backend.read(key)))


def _known_size(backend: SourceBackend, key: str) -> Size | None:
    """The size of an image from its header, or None. StorageError if the source fails."""
    try:
        return _size(backend, key)
    except (ImageError, FileNotFoundError, PermissionError):
        return None
    except OSError as error:
        if error.errno is None:  # a stream that cannot seek
            return None
        raise StorageError(f"{backend.name}: {key} could not be read: {error.strerror or error}") from error


# -- 3. decide ---------------------------------------------------------------------------------------------------------------


def _judge(catalogue: Catalogue, rules: DatasetRules, undecodable: Collection[str] | None, should_stop: Callable[[], bool]) -> None:
    """Store captions or a reason for every file, unless this was done with the same rules and nothing has changed since."""
    partners = [catalogue.listing(name) for name in (*dict(rules.companions).values(), *rules.users)]
    with catalogue.transaction() as database:
        _retry_changed_companions(database, rules)
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
        if rules.role:
            database.execute(
                "UPDATE files SET captions = NULL, left_out = ? WHERE dataset = ? AND captions IS NOT NULL"
                " AND id NOT IN (SELECT companion FROM companions)",
                (f"{rules.role} without an image: no image has this name", rules.dataset),
            )
        (used,) = database.execute("SELECT count(*) FROM used WHERE dataset = ?", (rules.dataset,)).fetchone()
        reasons = database.execute("SELECT left_out FROM files WHERE dataset = ? AND left_out IS NOT NULL ORDER BY key", (rules.dataset,))
        kinds = Counter(reason.partition(":")[0] for (reason,) in reasons)
        verdict = "INSERT OR REPLACE INTO verdicts (dataset, rules, used, left_out) VALUES (?, ?, ?, ?)"
        database.execute(verdict, (rules.dataset, stated, used, json.dumps(kinds)))
        database.execute("INSERT OR REPLACE INTO marks VALUES (?, ?)", (rules.dataset, new_token()))


def _retry_changed_companions(database: sqlite3.Connection, rules: DatasetRules) -> None:
    """Forget that a companion was undecodable if its file has changed since, or the dataset no longer uses one."""
    is_same = f"p.id = files.id AND p.role = :role AND p.version = {_VERSION} AND c.dataset = :companions"
    for role in ROLES:
        database.execute(
            "UPDATE files SET undecodable = NULL WHERE dataset = :dataset AND undecodable LIKE :role || ' %'"
            f" AND NOT EXISTS (SELECT 1 FROM companions p JOIN files c ON c.id = p.companion WHERE {is_same})",
            {"dataset": rules.dataset, "role": role, "companions": dict(rules.companions).get(role, "")},
        )


def _pair(database: sqlite3.Connection, rules: DatasetRules) -> None:
    """Pair each image with the companions of the same name; of several with other extensions, the same extension first."""
    database.execute("DELETE FROM companions WHERE id IN (SELECT id FROM files WHERE dataset = ?)", (rules.dataset,))
    for role, companions in rules.companions:
        named = "SELECT id FROM files o WHERE o.dataset = :companions AND o.kind = 'image'"
        database.execute(
            f"INSERT INTO companions (id, role, companion, version) SELECT i.id, :role, c.id, {_VERSION} FROM files i JOIN files c"
            " ON c.id ="
            f" coalesce(({named} AND o.key = i.key), ({named} AND o.stem = i.stem ORDER BY o.key LIMIT 1))"
            " WHERE i.dataset = :dataset AND i.kind = 'image'",
            {"dataset": rules.dataset, "role": role, "companions": companions},
        )


def _images(database: sqlite3.Connection, rules: DatasetRules) -> Iterator[list[tuple[Any, ...]]]:
    """The images in blocks, with their captions and companions. A block may be updated before the next one is read."""
    last = ""
    caption = "i.text, i.text_problem" if rules.captions.table else "t.text, t.problem"
    roles = [role for role, _ in rules.companions]
    companions = "".join(f", {role}.id, {role}.width, {role}.height, {role}.problem" for role in roles)
    joined = joined_companions("i", roles)
    if rules.is_masked:
        companions += ", known.mean, known.problem"
        joined += f" LEFT JOIN {known_masks('i', rules.alpha_is_mask)}"
    values = {"dataset": rules.dataset, "block": _BLOCK}
    query = (
        f"SELECT i.key, i.id, i.width, i.height, i.problem, i.undecodable, {caption}{companions}"
        " FROM (SELECT * FROM files WHERE dataset = :dataset AND kind = 'image' AND key > :last ORDER BY key LIMIT :block) i"
        # Of several caption files, that with the first extension in the settings is used; of "cat.TXT" and "cat.txt", the first by name.
        " LEFT JOIN files t ON t.id = (SELECT id FROM files c WHERE c.dataset = :dataset AND c.stem = i.stem AND c.kind = 'caption'"
        f" ORDER BY extension_rank(c.key), c.key LIMIT 1) {joined} ORDER BY i.key"
    )
    ranks = {extension: rank for rank, extension in enumerate(rules.captions.extensions)}
    database.create_function("extension_rank", 1, lambda key: ranks.get(posixpath.splitext(key)[1].lower(), 0), deterministic=True)
    while block := database.execute(query, {**values, "last": last}).fetchall():
        yield block
        last = block[-1][0]


def _verdict(
    image: tuple[Any, ...], rules: DatasetRules, captioner: Captioner, undecodable: frozenset[str]
) -> tuple[str | None, str | None, int]:
    """The decision for one image: captions as a JSON list or None, the reason or None, and the row id."""
    key, row, width, height, problem, found_undecodable, text, text_problem, *companions = image
    reason = problem
    if reason is None and key in undecodable:
        reason = found_undecodable or _LEFT_OUT_BEFORE
    reason = reason or unsuitable_size(Size(width, height), rules.resolution)
    for number, (role, dataset) in enumerate(rules.companions if reason is None else ()):
        reason = reason or _problem_of_companion(Size(width, height), role, dataset, *companions[4 * number : 4 * number + 4])
    if rules.is_masked:
        mean, mask_problem = companions[-2:]
        reason = reason or problem_of_mask(mean, mask_problem, rules.alpha_is_mask)
    if reason is None and (rules.captions.reads_files or rules.captions.table):
        reason = text_problem
    if reason is not None:
        return None, reason, row
    try:
        texts = _texts(text, key, rules.captions)
        return json_list(captioner.captions(key, texts)), None, row
    except CaptionError as error:
        return None, str(error), row


def _texts(text: str | None, key: str, rule: CaptionRule) -> list[str] | None:
    """The captions that an image's file or table holds; None if there is no such file. CaptionError if a JSON file has none."""
    if text is None or rule.strategy == "json":
        return None if text is None else captions_in_json(text, key, rule)
    return list(json.loads(text)) if rule.table else [text]


def _problem_of_companion(
    image: Size, role: str, dataset: str, row: int | None, width: int | None, height: int | None, problem: str | None
) -> str | None:
    """The reason why an image has no usable companion in `dataset`, as "kind: detail", or None."""
    if row is None:
        return f"no {role}: no image of {dataset!r} has this name"
    if problem is not None or width is None or height is None:
        return f"{role} {problem or 'unreadable: its size is not known'}"
    if not same_shape(image, Size(width, height)):
        return f"{role} of another shape: it is {Size(width, height)}, and the image {image}"
    return None


def same_shape(image: Size, other: Size) -> bool:
    """Whether two images have the same aspect, if each edge may be rounded up or down."""
    across, down = image.width * other.height, image.height * other.width
    return abs(across - down) <= max(image.width, image.height, other.width, other.height)


def _nothing_left(backend: SourceBackend, rules: DatasetRules, catalogue: Catalogue, kinds: Counter[str]) -> str:
    dataset = rules.dataset
    if not kinds:
        folders = catalogue.skipped_folders(dataset)
        but = f" outside of system folders, such as {folders[0]}, which are not read" if folders else ""
        return f"dataset {dataset!r}: there are no files in {backend.name}{but}; put images there, or correct the path."
    first = catalogue.example_left_out(dataset)
    counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
    others = (catalogue.first_image(name) for role, name in rules.companions if first.reason.startswith(f"no {role}: "))
    names = "".join(f", but {other}, for example" if other else ", and no image at all" for other in others)
    sentence = (
        f"dataset {dataset!r}: all {kinds.total():,} files in {backend.name} are left out ({counts}), such as {quoted(first.key)}:"
        f" {first.reason}{names}"
    )
    beside = catalogue.endings_beside_images(dataset) if rules.captions.reads_files else {}
    if first.reason.startswith("no caption:") and beside:
        ending, count = max(beside.items(), key=lambda item: item[1])
        setting = "caption_strategy json" if ending == ".json" else f'"caption_extensions": ["{ending}"]'
        sentence += f"; files with the names of images end in {ending} ({count:,}): {setting} reads them"
    if first.reason.startswith("below "):
        sentence += "; choose a lower resolution, or a lower minimum_image_size to upscale images"
    return f"{sentence}."
