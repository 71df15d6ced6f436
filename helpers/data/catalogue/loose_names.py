r"""Names in a table that are spelled differently from the key of the image they mean, such as `D:\set\cat.PNG` for `cat.png`.

A name is compared without its extension, in lower case, with "/" between folders, in Unicode's composed form (NFC). Two rules follow, and
only for images and rows that the exact comparison has not matched:

1. The name is the end of the image's full path: `cat`, `set/cat.jpg` and `/data/set/cat.png` all mean /data/set/cat.png.
2. If no row has matched so far: the image's key is the end of the name, and what comes before it is the same in all such rows. That is
   the folder on another machine. If some rows have matched, another folder means other images.

A match counts only if it is unambiguous: no other image matches the row, and no other row matches the image.
"""

from __future__ import annotations

import posixpath
import re
import sqlite3
import unicodedata
from collections.abc import Iterator

from helpers.data.base.images import EXTENSIONS

_NUMBER = re.compile(r"(\d+)\.0")  # an id that was read as a floating point number and written as text


def loose_path(name: str, extension: bool | None) -> str:
    """The form in which names are compared. `extension`: whether names end in an extension; None if they may or may not."""
    text = unicodedata.normalize("NFC", name).strip().removeprefix("file://").replace("\\", "/")
    path = posixpath.normpath(re.sub(r"^[A-Za-z]:(?=/)", "", text)).lstrip("/").casefold()
    if number := _NUMBER.fullmatch(path):
        return number[1]
    stem, ending = posixpath.splitext(path)
    return stem if extension is None and ending in EXTENSIONS else path


def match_loosely(database: sqlite3.Connection, root: str, extension: bool | None) -> None:
    """Fill in `temp.matched` where the exact comparison found no row. `root` is the folder or prefix of the dataset's files."""
    unmatched_rows = "SELECT row, name FROM temp.named WHERE row NOT IN (SELECT row FROM temp.matched WHERE row IS NOT NULL)"
    unmatched_files = "SELECT f.id, f.key FROM temp.matched m JOIN files f ON f.id = m.file WHERE m.row IS NULL"
    if not all(database.execute(f"SELECT 1 FROM ({query})").fetchone() for query in (unmatched_rows, unmatched_files)):
        return
    for name, columns in (("loose_row", "row INTEGER, path TEXT"), ("loose_file", "file INTEGER, path TEXT, is_key INTEGER")):
        database.execute(f"DROP TABLE IF EXISTS temp.{name}")
        database.execute(f"CREATE TEMP TABLE {name} ({columns})")
    rows = database.cursor().execute(unmatched_rows)
    database.executemany("INSERT INTO temp.loose_row VALUES (?, ?)", ((row, loose_path(name, extension)) for row, name in rows))
    folder = loose_path(root, True)
    files = database.cursor().execute(unmatched_files)
    database.executemany("INSERT INTO temp.loose_file VALUES (?, ?, ?)", _ends_of_files(files, folder, extension))
    database.execute("CREATE INDEX temp.loose_file_path ON loose_file (path)")
    _accept(database, "SELECT f.file, r.row FROM temp.loose_row r JOIN temp.loose_file f ON f.path = r.path")

    if database.execute("SELECT 1 FROM temp.matched WHERE row IS NOT NULL").fetchone():
        return
    database.execute("DROP TABLE IF EXISTS temp.loose_end")
    database.execute("CREATE TEMP TABLE loose_end (row INTEGER, path TEXT, folder TEXT)")
    rows = database.cursor().execute("SELECT row, path FROM temp.loose_row")
    database.executemany("INSERT INTO temp.loose_end VALUES (?, ?, ?)", ((row, *end) for row, path in rows for end in _proper_ends(path)))
    pairs = "SELECT f.file, r.row, r.folder FROM temp.loose_end r JOIN temp.loose_file f ON f.path = r.path WHERE f.is_key"
    if len(database.execute(f"SELECT DISTINCT folder FROM ({pairs}) LIMIT 2").fetchall()) == 1:
        _accept(database, f"SELECT file, row FROM ({pairs})")


def _accept(database: sqlite3.Connection, pairs: str) -> None:
    """Enter the pairs of a file and a row in which neither appears twice."""
    database.execute(
        "UPDATE temp.matched SET row = pair.row, copies = (SELECT copies FROM temp.named WHERE named.row = pair.row)"
        f" FROM (SELECT file, row FROM (SELECT file, row, count(*) OVER (PARTITION BY file) rows, count(*) OVER (PARTITION BY row) files"
        f" FROM (SELECT DISTINCT * FROM ({pairs}))) WHERE rows = 1 AND files = 1) pair WHERE matched.file = pair.file"
    )


def _ends_of_files(files: Iterator[tuple[int, str]], folder: str, extension: bool | None) -> Iterator[tuple[int, str, bool]]:
    """Every end of each file's full path: file, the end, and whether it is the file's key."""
    for file, key in files:
        path = loose_path(key, extension)
        if extension is False:
            path = posixpath.splitext(path)[0]
        yield file, path, True
        for end, _ in (*_proper_ends(path), *((f"{end}/{path}", "") for end in ([folder, *(e for e, _ in _proper_ends(folder))]))):
            yield file, end, False


def _proper_ends(path: str) -> Iterator[tuple[str, str]]:
    """The ends of a path that are shorter than it, each with what comes before: a/b/c gives (b/c, a) and (c, a/b)."""
    parts = path.split("/")
    for count in range(1, len(parts)):
        yield "/".join(parts[count:]), "/".join(parts[:count])
