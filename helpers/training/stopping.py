"""Stopping on request. The first signal finishes the step, saves and exits; the second exits at once. A time limit acts like the first."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

from helpers.errors import EXIT_LEFT_AT_ONCE
from helpers.streams import emit

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class StopRequest:
    """`asked` becomes true with the first signal, or when the time limit is reached. Long work checks it regularly."""

    def __init__(self) -> None:
        self.asked = False
        self.by = ""  # the name of the first signal; empty for the time limit and the file STOP
        self._save_asked = False

    def listen(self) -> StopRequest:
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # `nohup` ignores SIGHUP, so that a run outlives its terminal
                signal.signal(number, self._handle)
        return self

    def after(self, seconds: float) -> StopRequest:
        """Request a stop after this time."""
        timer = threading.Timer(seconds, self._time_is_up, [seconds])
        timer.daemon = True
        timer.start()
        return self

    def ask_to_save(self) -> None:
        """Request a checkpoint at the next step, after which the run continues."""
        self._save_asked = True

    def take_save_request(self) -> bool:
        """Whether a checkpoint was requested since the last call."""
        asked, self._save_asked = self._save_asked, False
        return asked

    def _time_is_up(self, seconds: float) -> None:
        if not self.asked:
            self.asked = True
            emit(2, f"\n--max_train_seconds={seconds:g} reached: finishing this step, then saving.\n".encode())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.by:
            os._exit(EXIT_LEFT_AT_ONCE)  # no clean-up may delay this; half-written files have temporary names
        self.asked = True
        self.by = signal.Signals(number).name
        emit(2, f"\n{self.by}: finishing this step, then saving. Send it again to exit at once without saving.\n".encode())
