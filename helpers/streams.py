"""Standard output and standard error whose failures never end a program.

A terminal that is closed, the reader of a pipe that has ended (`| tee`) or a full disk behind a redirected output only costs the text.

    make_unfailing()  # first thing in a program
"""

from __future__ import annotations

import errno
import io
import os
import sys

_GONE_FOR_GOOD = frozenset({errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ENODEV})
_STANDARD = (0, 1, 2)


class UnfailingStream(io.TextIOBase):
    """A text stream over a file descriptor. It is unbuffered, and writing never raises."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @property
    def encoding(self) -> str:  # type: ignore[override]  # typeshed declares an attribute
        return "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        return "backslashreplace"

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        emit(self._descriptor, text.encode(self.encoding, self.errors))
        return len(text)


def make_unfailing() -> None:
    """Replace sys.stdout and sys.stderr by streams that never raise."""
    _open_standard_descriptors()
    sys.stdout, sys.stderr = UnfailingStream(1), UnfailingStream(2)


def emit(descriptor: int, data: bytes) -> None:
    """Write all of `data`, or as much as is possible. Never raises, also in a signal handler.

    What a full disk does not take is dropped. If whoever reads is gone for good, the descriptor leads to /dev/null from then on.
    """
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    except OSError as error:
        if error.errno in _GONE_FOR_GOOD:
            _silence(descriptor)


def _silence(descriptor: int) -> None:
    """Lead a descriptor to /dev/null, for Python and for libraries that write to it directly."""
    try:
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
    except OSError:  # no free descriptor: then each write fails again, and is dropped again
        return


def _open_standard_descriptors() -> None:
    """Lead closed standard descriptors to /dev/null. Otherwise the next file that is opened would get their number, and their text."""
    for descriptor in _STANDARD:
        try:
            os.fstat(descriptor)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != descriptor:
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
