from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.documentation.pages import PAGES, Page

LINK = re.compile(r"\]\(([^()\s]+)\)")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_within_the_repository_leads_somewhere(path: Path) -> None:
    page = Page(path, path.read_text(encoding="utf-8"))
    broken = []
    for link in LINK.findall(page.prose):
        if re.match(r"https?://|mailto:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (anchor and anchor not in Page(target, target.read_text(encoding="utf-8")).anchors()):
            broken.append(link)
    assert broken == []


def test_the_readme_leads_to_every_page() -> None:
    readme = Page.named("README.md")
    linked = {(readme.path.parent / link.partition("#")[0]).resolve() for link in LINK.findall(readme.text) if "://" not in link}
    assert {path for path in PAGES if path.name not in ("README.md", "PHOTOS.md")} - linked == set()


def test_a_broken_anchor_would_be_noticed() -> None:
    assert "captions" in Page.named("documentation/DATALOADER.md").anchors()
    assert "no-such-heading" not in Page.named("documentation/DATALOADER.md").anchors()
