"""The commands of the page on the cache do what it says, one after the other, on the caches of the quick start."""

from __future__ import annotations

import pytest

from tests.documentation.conftest import Followed
from tests.documentation.pages import Page

COMMANDS = [line for block in Page.named("documentation/CACHE.md").blocks("bash") for line in block.text.splitlines()]
SAYS = {
    "verify": "no problems",
    "stats": "records   3, ",
    "why": "is current: the next start uses this entry",
    "export": "coffee.png: ",
    "gc": "0 records, 0.00 MB",
}


@pytest.mark.slow
def test_the_commands_of_the_page_work_as_written(quick_start: Followed) -> None:
    asked = [line.partition("./simpletuner cache ")[2].split()[0] for line in COMMANDS]
    assert set(asked) == set(SAYS)
    settings = quick_start.reader.home / "keys-env.sh"
    settings.write_text("AWS_ACCESS_KEY_ID='key'\nAWS_SECRET_ACCESS_KEY='secret'\n")
    for line, word in zip(COMMANDS, asked, strict=True):
        assert SAYS[word] in quick_start.reader.type(line.replace("./sdxl-env.sh", str(settings))), line
    assert (quick_start.reader.home / "coffee.png").stat().st_size > 0
