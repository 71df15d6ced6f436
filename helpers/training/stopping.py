"""Signals: the first asks the run to finish its step, save and leave; a second one leaves at once. Time that is up asks too."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

from helpers.errors import EXIT_LEFT_AT_ONCE

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class StopRequest:
    """`asked` becomes true with the first signal, or when the time is up. Whoever does long work looks at it now and then."""

    def __init__(self) -> None:
        self.asked = False
        self.by = ""  # the first signal; none when it was the time

    def listen(self) -> StopRequest:
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as `nohup` leaves SIGHUP: such a run outlives its terminal
                signal.signal(number, self._handle)
        return self

    def after(self, seconds: float) -> StopRequest:
        """Ask when so many seconds have passed."""
        timer = threading.Timer(seconds, self._time_is_up, [seconds])
        timer.daemon = True
        timer.start()
        return self

    def _time_is_up(self, seconds: float) -> None:
        if not self.asked:
            self.asked = True
            os.write(2, f"\n--max_train_seconds={seconds:g} are over: finishing this step, then saving.\n".encode())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.by:
            os._exit(EXIT_LEFT_AT_ONCE)  # no clean-up may delay a user who asks twice; half-written files lie aside anyway
        self.asked = True
        self.by = signal.Signals(number).name
        os.write(2, f"\n{self.by}: finishing this step, then saving. Once more to leave at once without saving.\n".encode())
