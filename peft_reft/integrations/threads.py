"""How many threads torch uses on a machine that has other work to do."""

from __future__ import annotations

import os

import torch


def share_the_machine() -> None:
    """Use fewer threads where more programs run than there are cores; OMP_NUM_THREADS is left to rule if it is set.

    The threads of an operation wait for the last of them. If that one has to wait for a core, all do, and a small model
    is several times slower with two threads than with one.
    """
    if "OMP_NUM_THREADS" in os.environ or not hasattr(os, "getloadavg"):
        return
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    if load > cores:
        torch.set_num_threads(max(1, round(torch.get_num_threads() * cores / (cores + load))))
