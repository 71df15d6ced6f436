"""What every test stands on: one thread, no network, no state of the user's own."""

from __future__ import annotations

import os

# Before torch is imported anywhere: it reads these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import signal  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import TYPE_CHECKING  # noqa: E402

import hypothesis  # noqa: E402
import pytest  # noqa: E402

if TYPE_CHECKING:
    from tests.storage.s3_server import S3Server

# A busy machine is slow in bursts, which says nothing about the code; the same examples every time keep a failure reproducible.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)
hypothesis.settings.load_profile("suite")

# A shell that starts the tests in the background has them ignore these, and so would every run they start and then signal.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On several workers each begins with its share of the slow tests: no long test is then left to one of them at the end.

    pytest-xdist gives every worker a part of the list, and one that is done takes from the end of another's part.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    slow = [item for item in items if item.get_closest_marker("slow")]
    quick = [item for item in items if not item.get_closest_marker("slow")]
    items[:] = [item for number in range(workers) for kind in (slow, quick) for item in part(kind, number, workers)]


def part(items: list[pytest.Item], number: int, count: int) -> list[pytest.Item]:
    """The part with this number when a list is cut into so many: in order, because tests of one module share what they make."""
    return items[len(items) * number // count : len(items) * (number + 1) // count]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root."""
    return REPOSITORY


@pytest.fixture(autouse=True, scope="session")
def home_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test sees or changes the settings and caches of whoever runs it."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("HF_HOME", str(home / "huggingface"))
        patch.delenv("XDG_CACHE_HOME", raising=False)
        yield


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """A real S3 endpoint on loopback, started when the first test asks for it."""
    from tests.storage.s3_server import s3_server

    with s3_server() as server:
        yield server
