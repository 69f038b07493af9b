"""Commands take their share of a busy machine, and all of an idle one."""

from __future__ import annotations

import os

import pytest
import torch

from peft_reft.integrations.threads import share_the_machine


@pytest.mark.parametrize(
    ("cores", "load", "threads"),
    [(2, 0.0, 2), (2, 2.0, 2), (2, 2.1, 1), (2, 40.0, 1), (64, 64.0, 64), (64, 70.0, 31)],
)
def test_fewer_threads_where_more_programs_run_than_there_are_cores(cores, load, threads, monkeypatch):
    used = [cores]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: used[-1])
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    share_the_machine()
    assert used[-1] == threads
    monkeypatch.setenv("OMP_NUM_THREADS", str(cores))
    calls = len(used)
    share_the_machine()
    assert len(used) == calls, "what the user asked for stays"
