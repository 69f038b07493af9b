"""Time that is kept: a deadline that parts and rounds look at, and an alarm for what looks at nothing."""

from __future__ import annotations

import gc
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks import common

FEWEST_ROUNDS = 3  # of which a median can be taken


class OutOfTime(BaseException):
    """The deadline has passed.

    Not an Exception, as KeyboardInterrupt is none: compilers catch those and go on with something slower.
    """


class Deadline:
    """A moment after which nothing is measured.

    Args:
        minutes: from `begin` on.
        begin: a value of `time.monotonic()`.
    """

    def __init__(self, minutes: float, begin: float):
        self.begin = begin
        self.end = begin + 60 * minutes

    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.begin

    def left(self) -> float:
        """Seconds until the end; below 0 after it."""
        return self.end - time.monotonic()

    def check(self) -> None:
        """Raise OutOfTime after the end."""
        if self.left() <= 0:
            raise OutOfTime

    @contextmanager
    def alarm(self) -> Iterator[None]:
        """OutOfTime is raised at the end, wherever Python is by then: within a compilation, say."""

        def ring(number: int, frame: Any) -> None:
            raise OutOfTime

        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, max(self.left(), 1e-3))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def interleaved(
    functions: dict[str, Callable[[], Any]], deadline: Deadline, rounds: int, seconds: float, warmup: int = 2
) -> common.Times:
    """Run every function once per round, each round in another order, after `warmup` rounds that do not count.

    Args:
        rounds: at most so many.
        seconds: after which no further round begins, once there are three.

    Raises:
        OutOfTime: if the deadline passes before the third round is done.
    """
    names = list(functions)
    times = common.Times(names)
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        begin = time.monotonic()
        for number in range(-warmup, rounds):
            enough = number >= FEWEST_ROUNDS
            if enough and (time.monotonic() - begin > seconds or deadline.left() <= 0):
                break
            if number == 0:
                begin = time.monotonic()
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                if not enough:
                    deadline.check()
                common.synchronize()
                wall, cpu = time.perf_counter(), time.process_time()
                functions[name]()
                common.synchronize()
                if number >= 0:
                    times.wall[name].append(time.perf_counter() - wall)
                    times.cpu[name].append(time.process_time() - cpu)
    finally:
        if collecting:
            gc.enable()
    return times
