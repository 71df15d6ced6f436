"""The pages that people read, taken apart: headings, links, code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(path for pattern in ("*.md", "documentation/*.md", "demo/*.md") for path in ROOT.glob(pattern))

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """Fenced code."""

    language: str
    text: str


@dataclass(frozen=True)
class Page:
    """One page; `section` is the part of it under a heading, that of the whole page being ""."""

    path: Path
    text: str

    @classmethod
    def named(cls, name: str) -> Page:
        return cls(ROOT / name, (ROOT / name).read_text(encoding="utf-8"))

    @property
    def prose(self) -> str:
        """The page without its fenced code."""
        return _FENCE.sub("", self.text)

    def section(self, title: str) -> Page:
        """The lines from a heading that contains `title` to the next of the same rank."""
        match = re.search(rf"^(#+) [^\n]*{re.escape(title)}[^\n]*\n(.*?)(?=^\1 |\Z)", self.text, re.MULTILINE | re.DOTALL)
        assert match, f"{self.path.name} has no heading with {title!r}"
        return Page(self.path, match[2])

    def blocks(self, *languages: str) -> list[Block]:
        found = [Block(language, text) for language, text in _FENCE.findall(self.text)]
        return [block for block in found if block.language in languages] if languages else found

    def block(self, language: str) -> str:
        """The first fenced code in a language."""
        return self.blocks(language)[0].text

    def spans(self) -> list[str]:
        """Inline code."""
        return re.findall(r"`([^`\n]+)`", self.prose)

    def code(self) -> list[str]:
        """Inline code and the lines of fenced shell."""
        shell = [line for block in self.blocks("bash", "sh") for line in block.text.splitlines()]
        return self.spans() + shell

    def anchors(self) -> set[str]:
        """What links may point to, made of the headings as GitHub does."""
        headings = re.findall(r"^#+ (.*)$", self.prose, re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

    def tables(self) -> Iterator[list[list[str]]]:
        """The rows of each table, the heading's first."""
        for lines in re.findall(r"(?:^\|.*\n?)+", self.prose, re.MULTILINE):
            rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])] for line in lines.splitlines()]
            yield [row for row in rows if not set("".join(row)) <= set("-: ")]
