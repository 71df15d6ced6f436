"""A trainer that only lives: it takes signals as the real one does, saves for a while, and leaves as the real one does.

Steered by the environment: STANDIN_NOTES, a folder for `<what>-<rank>` files; STANDIN_SAVE_S; STANDIN_LATE_S, before it listens to
signals; STANDIN_END, `rank=code,...` of ranks that end by themselves ("kill" for being killed).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from helpers import ranks
from helpers.training.stopping import StopRequest

NOTES = Path(os.environ["STANDIN_NOTES"])
RANK = os.environ.get("RANK", "0")


def note(what: str) -> None:
    unfinished = NOTES / f".{what}-{RANK}"
    unfinished.write_text(str(os.getpid()))
    unfinished.rename(NOTES / f"{what}-{RANK}")


def main() -> int:
    ranks.tie_to_launcher(os.environ)
    note("begun")
    time.sleep(float(os.environ.get("STANDIN_LATE_S", "0")))
    stop = StopRequest().listen()
    ranks.announce_rank(os.environ)
    note("listening")
    end = dict(pair.split("=") for pair in os.environ.get("STANDIN_END", "").split(",") if pair).get(RANK)
    while end is not None and not all((NOTES / f"begun-{rank}").exists() for rank in range(int(os.environ.get("WORLD_SIZE", "1")))):
        time.sleep(0.02)  # a rank that ends takes the others along, and they are to have begun
    if end == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if end is not None:
        return int(end)
    while not stop.asked:
        time.sleep(0.02)
    note("stopping")
    time.sleep(float(os.environ.get("STANDIN_SAVE_S", "0")))
    note("saved")
    return 75


sys.exit(ranks.record_exit(os.environ, main()))
