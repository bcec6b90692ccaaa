"""Beside other programs torch's threads sleep where they wait for each other, instead of looking for work without a pause."""

from __future__ import annotations

import os
import time
from pathlib import Path

LOAD = Path("/proc/loadavg")
LOOKS = 3
APART_S = 0.01
SAID_BY_USER = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def wait_asleep_beside_others() -> None:
    """Where half the processors or more are at work for others, tell OpenMP to wait without using one. For the processes of a
    command, before torch is imported; what the user has said about it stands.

    A thread that waits by spinning takes the time of the one it waits for; alone, it is back at work sooner than one that sleeps.
    `python -m bench.busy --demo` measures a command beside two others.
    """
    if any(name in os.environ for name in SAID_BY_USER) or 2 * _others_at_work() < (os.cpu_count() or 1):
        return
    os.environ["OMP_WAIT_POLICY"] = "passive"


def _others_at_work() -> int:
    """How many threads but this one want a processor, at each of a few looks; 0 where the system does not tell."""
    seen = []
    for look in range(LOOKS):
        if look:
            time.sleep(APART_S)
        try:
            seen.append(int(LOAD.read_text().split()[3].partition("/")[0]) - 1)
        except (OSError, ValueError, IndexError):
            return 0
    return min(seen)
