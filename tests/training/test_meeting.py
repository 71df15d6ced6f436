"""Processes meet without a collective: whoever waits still hears signals and passes them on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import torch.distributed

from helpers.training.meeting import ANSWER_WITHIN, Meeting
from helpers.training.stopping import StopRequest


def meetings(count: int) -> list[Meeting]:
    """One for each of several processes, over real stores; each has a `StopRequest` of its own."""
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=ANSWER_WITHIN)
    clients = [
        torch.distributed.TCPStore("127.0.0.1", server.port, wait_for_workers=False, timeout=ANSWER_WITHIN) for _ in range(count - 1)
    ]
    return [Meeting(rank, count, store, StopRequest()) for rank, store in enumerate([server, *clients])]


def together(*work: Callable[[], object]) -> list[object]:
    results: list[object] = [None] * len(work)

    def run(index: int) -> None:
        results[index] = work[index]()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_all_hear_what_each_said_in_the_order_of_ranks_round_by_round() -> None:
    three = meetings(3)

    def talk(meeting: Meeting, rank: int) -> list[Sequence[str]]:
        time.sleep(0.1 * (2 - rank))
        return [meeting.gather(f"{rank} says {number} ä") for number in range(4)]

    heard = together(*(lambda meeting=meeting, rank=rank: talk(meeting, rank) for rank, meeting in enumerate(three)))  # type: ignore[misc]
    assert heard == [[[f"{rank} says {number} ä" for rank in range(3)] for number in range(4)]] * 3


def test_a_stop_asked_of_one_that_already_waits_reaches_the_one_that_works() -> None:
    one, two = meetings(2)

    def work() -> list[object]:
        began = time.monotonic()
        while not two.stop_asked():
            assert time.monotonic() - began < 30, "it never heard"
            time.sleep(0.01)
        return [*two.gather("stopped")]

    def wait() -> list[object]:
        threading.Timer(0.3, lambda: setattr(one._stop, "asked", True)).start()
        return [*one.gather("done")]

    assert together(wait, work) == [["done", "stopped"]] * 2
    assert one.stop_asked() and two.stop_asked()


def test_nobody_stops_unasked() -> None:
    one, two = meetings(2)
    assert not one.stop_asked() and not two.stop_asked()
