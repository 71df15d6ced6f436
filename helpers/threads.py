"""How long PyTorch's threads on the CPU wait for one another before they give way to other programs."""

from __future__ import annotations

from collections.abc import MutableMapping

SPINS_VARIABLE = "GOMP_SPINCOUNT"
SETTLE_IT = (SPINS_VARIABLE, "OMP_WAIT_POLICY", "OMP_NUM_THREADS")  # whoever set one of these has decided how threads wait
SPINS = 10_000  # turns, tens of microseconds: enough to bridge the gaps between two operations of a network


def wait_briefly(environ: MutableMapping[str, str]) -> None:
    """Let waiting threads sleep soon, unless the environment settles it. To be called before torch is imported.

    GNU's OpenMP, which PyTorch uses on Linux, has a thread spin for milliseconds at the end of every operation. Beside another busy
    program the threads that it waits for have no core meanwhile, and a small network takes more than ten times as long
    (benchmarks/shared_cores.py).
    """
    if not any(name in environ for name in SETTLE_IT):
        environ[SPINS_VARIABLE] = str(SPINS)
