"""What an env file sets, and on which line: for messages and for misspelt names. The shell that sourced it gives the values."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from helpers.config.suggest import looks_misspelt, one_word_off

_NOT_BARE = re.compile(r"""\\.|'[^']*'|"(?:\\.|[^"\\])*"|(?:^|(?<=\s))\#[^\n]*""", re.DOTALL | re.MULTILINE)
_ASSIGNMENT = re.compile(r"(?:^|(?<=[\s;&]))([A-Za-z_][A-Za-z0-9_]*)\+?=", re.MULTILINE)
_USE = re.compile(r"\$\{?([A-Za-z_][A-Za-z0-9_]*)")


@dataclass(frozen=True)
class EnvFile:
    """The names an env file assigns, with the line of the last assignment, and the names it reads."""

    name: str = ""  # as in messages
    lines: dict[str, int] = field(default_factory=dict)
    used: frozenset[str] = frozenset()
    repeated: dict[str, list[int]] = field(default_factory=dict)  # variables that are assigned more than once, and the lines

    def origin(self, variable: str) -> str:
        """`LORA_RANK (sdxl-env.sh:12)`, or just the name when the file does not set it."""
        line = self.lines.get(variable)
        return f"{variable} ({self.name}:{line})" if line else variable

    def unknown(self, known: frozenset[str]) -> list[str]:
        """Variables it sets that are not known; those it reads itself are the user's own helpers."""
        return [name for name in self.lines if name not in known and name not in self.used]

    def misspelt(self, known: frozenset[str]) -> Iterator[str]:
        """One sentence for every variable that is near a known name and is not known itself."""
        for name in self.unknown(known):
            meant = looks_misspelt(name, known)
            if meant:
                yield f"{self.name}, line {self.lines[name]}: {name} is not a variable of the trainer; did you mean {meant}?"

    def twice(self, known: frozenset[str]) -> Iterator[str]:
        """One sentence for every known variable that is assigned more than once."""
        for name, lines in self.repeated.items():
            if name in known:
                yield f"{self.name} sets {name} on lines {' and '.join(map(str, lines))}; the last one that bash reaches counts."

    def maybe_misspelt(self, known: frozenset[str]) -> Iterator[str]:
        """One sentence for every variable that reads like a known one with a word missing or too many."""
        for name in self.unknown(known):
            meant = [] if looks_misspelt(name, known) else one_word_off(name, known)
            if meant:
                yield f"{self.name}, line {self.lines[name]}: {name} sets nothing here; did you mean {' or '.join(meant)}?"


def read_env_file(path: Path) -> EnvFile:
    """Scan an env file; Windows line endings and a BOM are fine. OSError when it cannot be read."""
    text = path.read_bytes().decode("utf-8-sig", errors="replace").replace("\r\n", "\n")
    # A prompt may hold anything, even `LORA_RANK=4` on a line of its own: what is quoted or a comment is emptied, its lines kept.
    bare = _NOT_BARE.sub(lambda match: "''" + "\n" * match[0].count("\n"), text)
    lines = {match[1]: bare.count("\n", 0, match.start(1)) + 1 for match in _ASSIGNMENT.finditer(bare)}
    assigned: dict[str, list[int]] = {}
    for match in _ASSIGNMENT.finditer(bare):
        if not match[0].endswith("+="):
            assigned.setdefault(match[1], []).append(bare.count("\n", 0, match.start(1)) + 1)
    repeated = {name: found for name, found in assigned.items() if len(found) > 1}
    return EnvFile(path.name, lines, frozenset(_USE.findall(text)), repeated)
