"""Nobody but the processes of a run takes part in what they tell one another, and nothing that arrives there can run code."""

from __future__ import annotations

import re
from pathlib import Path

import torch.distributed

from helpers.training.meeting import ANSWER_WITHIN, Meeting
from helpers.training.stopping import StopRequest
from tests.harness import ROOT
from tests.training.test_meeting import together


def test_a_stranger_in_the_store_of_several_machines_cannot_stop_the_run() -> None:
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=ANSWER_WITHIN)
    clients = [torch.distributed.TCPStore("127.0.0.1", server.port, wait_for_workers=False, timeout=ANSWER_WITHIN) for _ in range(2)]
    one, two = (
        Meeting(rank, 2, torch.distributed.PrefixStore("secret", store), StopRequest()) for rank, store in enumerate((server, clients[0]))
    )
    clients[1].set("stop", "asked")
    assert together(lambda: list(one.gather("a")), lambda: list(two.gather("b"))) == [["a", "b"]] * 2
    assert not one.stop_asked() and not two.stop_asked()
    one._stop.asked = True
    assert one.stop_asked()


def test_a_store_in_a_file_does_what_one_on_the_network_does(tmp_path: Path) -> None:
    stores = [torch.distributed.FileStore(str(tmp_path / "store"), -1) for _ in range(2)]
    one, two = (Meeting(rank, 2, store, StopRequest()) for rank, store in enumerate(stores))
    for number in range(3):
        assert together(lambda: list(one.gather(f"ä{number}")), lambda: list(two.gather("b"))) == [[f"ä{number}", "b"]] * 2  # noqa: B023
    assert not two.stop_asked()
    one._stop.asked = True
    assert one.stop_asked()
    two._checked_at = float("-inf")
    assert two.stop_asked()


def test_no_collective_that_pickles_is_used() -> None:
    pickling = re.compile(r"\b(all_gather_object|gather_object|broadcast_object_list|scatter_object_list|(send|recv)_object_list)\b")
    files = [ROOT / "train.py", *(ROOT / "helpers").rglob("*.py"), *(ROOT / "toolkit").rglob("*.py")]
    assert len(files) > 100 and [path for path in files if pickling.search(path.read_text(encoding="utf-8"))] == []
