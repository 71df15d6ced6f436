"""Datasets of the Hugging Face `datasets` library. Each row appears as an image file and a caption file.

Row 12 is the files `0000012.jpg` and `0000012.txt`, whatever the format of the image: it is recognized by its first bytes. Only Arrow and
Parquet files are read. No script of a dataset is run, and nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from helpers.errors import DataError
from helpers.storage.backend import Entry
from helpers.storage.memo import file_state

DEFAULT_SPLIT = "train"
IMAGE_COLUMNS = ("image", "img", "jpg", "png")  # tried in this order if none is configured
CAPTION_COLUMNS = ("caption", "text", "prompt")

_KEY = re.compile(r"(\d{7,})\.(jpg|txt)")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})")
_SPLITS = ("train", "validation", "valid", "val", "dev", "test", "eval")  # names of files and folders that stand for a split
_ROWS = 1000  # listed at a time


@dataclass(frozen=True)
class _Opened:
    """The two columns in use, as objects of the library."""

    images: Any  # datasets.Dataset of one column
    captions: Any | None
    image_column: str
    caption_column: str
    folder: Path  # that relative paths of images start from
    etag: str  # changes with the files that the rows come from


class HuggingFaceSource:
    """The rows of one split. `path` is a folder or file, or the id of a dataset on the hub that is already in the hub's cache.

    `split`, `image_column` and `caption_column` are found by their usual names if they are None. Without `captions`, no row has a caption.
    Nothing is opened before the first use.
    """

    def __init__(
        self,
        path: str,
        split: str | None = None,
        image_column: str | None = None,
        caption_column: str | None = None,
        captions: bool = True,
    ) -> None:
        self.path = path
        self.split = split
        self.image_column = image_column
        self.caption_column = caption_column
        self.captions = captions
        self._found: _Opened | None = None
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return f"{self.path} ({self.split})" if self.split else self.path

    def list(self) -> Iterator[Entry]:
        """The image and caption of every row, in order. A null caption is not listed. DataError if the dataset does not exist."""
        opened = self._opened()
        for start in range(0, len(opened.images), _ROWS):
            images = list(_image_facts(opened, start))
            captions = _texts(opened, start) if opened.captions is not None else [None] * len(images)
            for row, ((size, modified, etag), caption) in enumerate(zip(images, captions, strict=True), start):
                yield Entry(f"{row:07}.jpg", size, modified, f"{opened.etag} {opened.image_column}{etag}")
                if caption is not None:
                    yield Entry(f"{row:07}.txt", len(caption), 0, f"{opened.etag} {opened.caption_column}")

    def open(self, key: str) -> BinaryIO:
        return io.BytesIO(self.read(key))

    def read(self, key: str) -> bytes:
        opened = self._opened()
        match = _KEY.fullmatch(key)
        row = int(match[1]) if match else -1
        if match is None or row >= len(opened.images):
            raise FileNotFoundError(f"{self.name} has no row {key}")
        if match[2] == "txt":
            caption = _texts(opened, row, 1)[0] if opened.captions is not None else None
            if caption is None:
                raise FileNotFoundError(f"row {row} has no caption")
            return caption
        data, path = _image(opened.images[row][opened.image_column])
        return data if data is not None else _file(opened.folder, path).read_bytes()

    def _opened(self) -> _Opened:
        with self._lock:
            if self._found is None:
                self._found = self._open()
            return self._found

    def _open(self) -> _Opened:
        import datasets
        import pyarrow

        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        folder = _located(self.path)
        try:
            rows, files = _saved(folder, self.split) if _is_saved(folder) else _from_files(folder, self.split)
        except (OSError, ValueError, KeyError, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise DataError(f"{self.name} cannot be opened as a dataset: {reason}.") from error
        image = _column(self.name, rows, "image_column", self.image_column, IMAGE_COLUMNS)
        caption = _column(self.name, rows, "caption_column", self.caption_column, CAPTION_COLUMNS) if self.captions else ""
        _check_kinds(self.name, rows.features, image, caption)
        images = rows.select_columns([image])
        if isinstance(rows.features[image], datasets.Image):
            images = images.cast_column(image, datasets.Image(decode=False))
        captions = rows.select_columns([caption]) if caption else None
        return _Opened(images, captions, image, caption, folder if folder.is_dir() else folder.parent, _etag(folder, files))


# -- finding the rows -------------------------------------------------------------------------------------------------------


def _located(path: str) -> Path:
    """The folder or file of a dataset. DataError if it is neither on this machine nor in the hub's cache."""
    here = Path(path).expanduser()
    if here.exists():
        return here
    if not _HUB_ID.fullmatch(path):
        raise DataError(f"{path} does not exist.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, repo_type="dataset", local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        raise DataError(
            f"{path!r} is neither a folder on this machine nor a dataset in the hub's cache;"
            f" download it first: hf download {path} --repo-type dataset"
        ) from None


def _is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _saved(folder: Path, split: str | None) -> tuple[Any, Sequence[Path]]:
    """The rows that `save_to_disk` wrote, and their files."""
    import datasets

    found = datasets.load_from_disk(str(folder))
    if isinstance(found, datasets.DatasetDict):
        name = _chosen_split(folder, list(found), split)
        folder, found = folder / name, found[name]
    elif split not in (None, str(found.split)):
        raise DataError(f"{folder} holds one split, {found.split or 'without a name'}, not {split!r}; leave split out.")
    return found.with_format(None), sorted(path for path in folder.iterdir() if path.is_file())


def _from_files(folder: Path, split: str | None) -> tuple[Any, Sequence[Path]]:
    """The rows of the Parquet or Arrow files of a split, and the files.

    Arrow files are memory-mapped in place. Parquet cannot be read row by row, so the library converts it to Arrow once, in its own cache.
    """
    import datasets

    parquet, arrow = (_files(folder, ending) for ending in (".parquet", ".arrow"))
    if bool(parquet) == bool(arrow):
        both = "both .parquet and .arrow files; point path to one of the kinds" if parquet else "no .parquet or .arrow files"
        raise DataError(f'{folder} holds {both}; images in a folder are "type": "local", tars are "type": "webdataset".')
    by_split = defaultdict(list)
    for path in parquet or arrow:
        by_split[_split_of(path)].append(path)
    files = by_split[_chosen_split(folder, list(by_split), split)]
    _check_shards(files)
    names = [str(path) for path in files]
    if parquet:
        return datasets.Dataset.from_parquet(names), files
    return datasets.concatenate_datasets([datasets.Dataset.from_file(name) for name in names]), files


def _files(folder: Path, ending: str) -> list[Path]:
    """Files with an extension in or below a folder, sorted by name; the path itself if it is a file."""
    if folder.is_file():
        return [folder] if folder.suffix == ending else []
    return sorted(path for path in folder.rglob(f"*{ending}") if path.is_file())


def _split_of(path: Path) -> str:
    """The split of a file: train for `data/train-00000-of-00002.parquet`, `train.parquet`, `train/0.parquet`, and other names."""
    shard = _SHARD.fullmatch(path.stem)
    if shard:
        return shard["split"]
    return next((name for name in (path.stem, path.parent.name) if name in _SPLITS), DEFAULT_SPLIT)


def _chosen_split(folder: Path, there: Sequence[str], split: str | None) -> str:
    """The configured split, else the only one, else train."""
    chosen = split or (there[0] if len(there) == 1 else DEFAULT_SPLIT)
    if chosen not in there:
        raise DataError(f"{folder} has no split {chosen!r}; set split to one of {', '.join(sorted(there))}.")
    return chosen


def _check_shards(files: Sequence[Path]) -> None:
    """DataError if some of the numbered files are missing, or if they are in several folders, which are then several datasets."""
    groups: dict[tuple[Path, int], set[int]] = defaultdict(set)
    for path in files:
        shard = _SHARD.fullmatch(path.stem)
        if shard:
            groups[path.parent, int(shard["total"])].add(int(shard["number"]))
    for (folder, total), numbers in groups.items():
        missing = sorted(set(range(total)) - numbers)
        if missing:
            raise DataError(
                f"{folder} lacks {len(missing)} of {total} files of the dataset, such as number {missing[0]}; download it again."
            )
    if len(groups) > 1:
        folders = ", ".join(sorted({str(folder) for folder, _ in groups}))
        raise DataError(f"there is more than one dataset in {folders}; point path to one of them.")


def _etag(folder: Path, files: Sequence[Path]) -> str:
    """A hash that changes with any file that the rows come from."""
    facts = [(path.relative_to(folder.parent).as_posix(), *file_state(path)) for path in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


# -- columns ----------------------------------------------------------------------------------------------------------------


def _column(name: str, rows: Any, key: str, asked: str | None, usual: Sequence[str]) -> str:
    """The configured column, else the first of the usual names that exists."""
    names: list[str] = rows.column_names
    found = asked if asked in names else None if asked else next((column for column in usual if column in names), None)
    if found is None:
        what = f"has no column {asked!r}" if asked else f"has no column named {', '.join(usual[:-1])} or {usual[-1]}"
        raise DataError(f"{name} {what}; set {key} to one of {', '.join(names)}.")
    return found


def _check_kinds(name: str, features: Any, image: str, caption: str) -> None:
    """DataError unless the columns can hold images and captions."""
    import datasets

    kind = features[image]
    holds_images = isinstance(kind, datasets.Image) or getattr(kind, "dtype", "") in ("binary", "large_binary", "string", "large_string")
    if not holds_images and not (isinstance(kind, dict) and {"bytes", "path"} <= kind.keys()):
        raise DataError(f"{name}: the column {image!r} holds {_described(kind)}; set image_column to one of images.")
    if caption:
        kind = features[caption]
        inner = getattr(kind, "feature", kind)
        if not isinstance(inner, datasets.ClassLabel) and getattr(inner, "dtype", "") not in ("string", "large_string"):
            raise DataError(f"{name}: the column {caption!r} holds {_described(kind)}; set caption_column to one of texts.")


def _described(kind: Any) -> str:
    return str(getattr(kind, "dtype", None) or type(kind).__name__)


def _image_facts(opened: _Opened, start: int) -> Iterator[tuple[int, int, str]]:
    """Size, modification time and etag of the images of some rows. Images stored as bytes are not read for this."""
    import pyarrow.compute as pc
    import pyarrow.types as kinds

    def lengths_of(cells: Any) -> list[int | None]:
        return [None] * len(cells) if kinds.is_null(cells.type) else pc.binary_length(cells).to_pylist()

    column = opened.images.with_format("arrow")[start : start + _ROWS].column(0)
    if kinds.is_struct(column.type):
        lengths, paths = lengths_of(pc.struct_field(column, "bytes")), pc.struct_field(column, "path").to_pylist()
    elif kinds.is_string(column.type) or kinds.is_large_string(column.type):
        lengths, paths = [None] * len(column), column.to_pylist()
    else:
        lengths, paths = lengths_of(column), [None] * len(column)
    for length, path in zip(lengths, paths, strict=True):
        if length is not None or path is None:
            yield length or 0, 0, ""
            continue
        try:
            found = _file(opened.folder, path).stat()
        except OSError:
            yield 0, 0, ""  # reported when it is opened
        else:
            yield found.st_size, found.st_mtime_ns, f" {found.st_ctime_ns}-{found.st_ino}"


def _file(folder: Path, path: str) -> Path:
    """The file inside the dataset's folder that a row names. FileNotFoundError if it names another: a dataset is often from elsewhere."""
    if "://" in path:
        raise FileNotFoundError(f"the row has only the URL {path}; download the images first")
    root = Path(os.path.abspath(folder))
    named = Path(os.path.normpath(root / path)) if path and "\0" not in path else root
    if named == root or not named.is_relative_to(root) or ".." in Path(path).parts:
        raise FileNotFoundError(f"{path!r} is not the name of a file inside {folder}")
    return named


def _image(value: Any) -> tuple[bytes | None, str]:
    """The bytes in a cell, or else the path of the file. Empty bytes for null."""
    if isinstance(value, dict):
        data, path = value.get("bytes"), value.get("path")
    else:
        data, path = (None, value) if isinstance(value, str) else (value, None)
    return (b"", "") if data is None and path is None else (data, path or "")


def _texts(opened: _Opened, start: int, count: int = _ROWS) -> list[bytes | None]:
    """The captions of some rows, None for none. A class label becomes its name; each text of a list becomes a line."""
    import datasets

    assert opened.captions is not None
    kind = opened.captions.features[opened.caption_column]
    inner = getattr(kind, "feature", kind)

    def label(value: Any) -> str | None:
        if isinstance(inner, datasets.ClassLabel) and value is not None:
            return inner.int2str(value) if value >= 0 else None  # the library writes a missing label as -1
        return value

    def caption(value: Any) -> str | None:
        if not isinstance(value, list):
            return label(value)
        return "\n".join(" ".join(line.split()) for line in map(label, value) if line is not None)

    found = map(caption, opened.captions[start : start + count][opened.caption_column])
    return [None if text is None else text.encode("utf-8", "surrogatepass") for text in found]
