"""Which rank is missing: heartbeats over the rendezvous' store, and a watchdog that reads them.

Each rank writes, from a thread, how many collectives it has entered and what it is at. A rank that
stands for longer than the timeout while another has entered fewer, or no longer beats, names that one
and ends. Only waiting is timed: who computes for long is behind nobody. ``RollCall`` is pure.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Literal, Protocol

from dmi_hpc.errors import EXIT_RANK_LOST

# here; done: left as all will; failed: left by an error of its own; bereft: left because of another
State = Literal["here", "done", "failed", "bereft"]

PERIOD_S = 2.0  # between two beats
QUIET = 3  # periods without a beat, after a broken connection: it is gone
SLICE = 512  # keys of one question: the store takes longer a key for more (docs/launch-scale.md)
STOPPED = 5  # periods without a turn of the watch: this process itself was stopped


class Store(Protocol):
    """What is used of torch.distributed's stores; an object for one thread."""

    def set(self, key: str, value: str) -> None: ...
    def check(self, keys: list[str]) -> bool: ...
    def multi_get(self, keys: list[str]) -> list[bytes]: ...


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    host: str
    count: int = 0  # of beats
    collectives: int = 0  # entered, over all process groups
    at: str = "the start"
    state: State = "here"
    excused: bool = False  # is in something long that the others may wait for


class RollCall:
    """What one rank knows of the others, all times by its own clock; collectives are counted alike."""

    def __init__(self, rank: int, size: int, timeout_s: float, now: float) -> None:
        self._rank, self._size, self._timeout, self._mine = rank, size, timeout_s, 0
        self._since = now
        self.listens(now)

    def restart(self, now: float) -> None:
        """Forget how long anything has taken: this process itself was stopped."""
        self._since = now
        self.listens(now)

    def listens(self, now: float) -> None:
        """Reading begins: what was heard earlier is old, and says nothing."""
        self._beats: list[Beat] = []
        self._beaten, self._moved = [now] * self._size, [now] * self._size

    def stands(self, collectives: int, now: float) -> float:
        """Seconds since this rank entered its last collective."""
        if collectives != self._mine:
            self._mine, self._since = collectives, now
        return now - self._since

    def hears(self, beats: Sequence[Beat], now: float) -> None:
        """Of all ranks, in order."""
        for rank, new in enumerate(beats):
            old = self._beats[rank] if self._beats else None
            if old is None or old.count != new.count:
                self._beaten[rank] = now
            if old is None or old.collectives != new.collectives or new.excused:
                self._moved[rank] = now
        self._beats = list(beats)

    def missing(self, now: float, broken_s: float | None = None) -> str:
        """Who does not come and what is known of it; "" if nobody is missing.

        broken_s: a connection broke, so somebody is gone: whoever has not beaten for so long.
        """
        found = [beat.at for beat in self._beats if beat.state == "bereft" and beat.at]
        if found:  # another has found out
            return found[0]
        waited = now - self._since
        patience = self._timeout if broken_s is None else broken_s
        gone: list[str] = []
        behind: list[tuple[int, str]] = []
        for rank, beat in enumerate(self._beats):
            name, quiet = f"rank {rank} (host {beat.host})", now - self._beaten[rank]
            short = beat.collectives < self._mine
            if rank == self._rank:
                continue
            if beat.state == "failed" or (beat.state == "done" and short):
                gone.append(f"{name} has ended: {beat.at}")
            elif beat.state == "here" and quiet > patience and (waited > patience or broken_s):
                gone.append(f"{name} was last heard of {quiet:.0f} s ago, at {beat.at}")
            elif beat.state == "here" and short:
                late = now - max(self._since, self._moved[rank])
                if late > self._timeout:
                    text = f"{name} is alive, but for {late:.0f} s it has not come from {beat.at}"
                    behind.append((beat.collectives, text))
        last = min(behind, default=(0, ""))[0]  # the others may wait for these
        return "; ".join(gone or [text for position, text in behind if position == last])


class Heartbeat:
    """This rank's beats and its watch over the others, in two threads: the store may not answer.

    store: a client of its own. counted: collectives entered so far. holder: the rank whose process
    holds the store; None if that is a file or a launcher.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        timeout_s: float,
        counted: Callable[[], int],
        holder: int | None,
    ) -> None:
        self._store, self._rank, self._counted, self._holder = store, rank, counted, holder
        self._timeout, self._period = timeout_s, min(PERIOD_S, timeout_s / 20)
        self._names = [f"beat/{r}" for r in range(size)]
        self._slices = [self._names[i : i + SLICE] for i in range(0, size, SLICE)]
        self._host = socket.gethostname()
        self._place, self._excused = "the start", False
        self._farewell: tuple[State, str] | None = None  # state and why, once it has one
        self._calls = RollCall(rank, size, timeout_s, time.monotonic())
        self._lock = threading.Lock()  # of the calls
        self._wake, self._ended, self._told = (threading.Event() for _ in range(3))
        self._read = self._main_knows = False
        self._asked: float | None = None  # since when the store owes an answer
        self._store_lost = False
        self._threads = [
            threading.Thread(target=target, name="dmi-heartbeat", daemon=True)
            for target in (self._talk, self._watch)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def at(self, place: str) -> None:
        """What this rank is at, for the others' messages; written with the next beat."""
        self._place = place

    @contextmanager
    def busy(self, place: str) -> Iterator[None]:
        """This rank is at something long: the others wait for it as long as it beats."""
        before = self._place, self._excused
        self._place, self._excused = place, True
        try:
            yield
        finally:
            self._place, self._excused = before

    def lost(self) -> str:
        """For the main thread, after a broken connection: who is gone; "" if it cannot be found."""
        self._main_knows = True
        self._begin_reading(time.monotonic())
        self._say("bereft", "")
        patience, found = QUIET * self._period, ""
        end = time.monotonic() + 3 * patience
        while not found and time.monotonic() < end:
            time.sleep(self._period / 4)
            found = self._missing(patience)
        self._say("bereft", found)
        return found

    def leave(self, state: State, why: str = "") -> None:
        """Say goodbye and why, unless that is said; who holds the store stays till it is read."""
        said = self._farewell or (state, why)
        if self._farewell is None:
            self._say(state, why)
        if said[0] != "done" and self._rank == self._holder:
            time.sleep(2 * QUIET * self._period)
        self._ended.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(self._period)

    def _say(self, state: State, why: str) -> None:
        self._farewell = state, why
        self._told.clear()
        self._wake.set()
        self._told.wait(self._period)

    def _talk(self) -> None:
        """Thread: write the beat each period; read the others' when there is reason to."""
        count = 0
        while not (self._ended.is_set() or self._store_lost):
            self._wake.clear()
            count, said = count + 1, self._farewell
            state, at = said or ("here", self._place)
            beat = Beat(self._host, count, self._counted(), at, state, self._excused)
            self._asked = time.monotonic()
            try:
                self._store.set(self._names[self._rank], json.dumps(astuple(beat)))
                if self._read and all(self._store.check(names) for names in self._slices):
                    found = (b for names in self._slices for b in self._store.multi_get(names))
                    beats = [Beat(*json.loads(beat)) for beat in found]
                    with self._lock:
                        self._calls.hears(beats, time.monotonic())
            except RuntimeError:  # torch's DistError: its holder is gone
                self._store_lost = True
            self._asked = None
            if said is self._farewell:
                self._told.set()
            self._wake.wait(self._period / 2 if self._main_knows else self._period)

    def _watch(self) -> None:
        """Thread: end this process when another has been missing for the timeout."""
        last = time.monotonic()
        while not self._ended.wait(self._period / 2) and not self._main_knows:
            now = time.monotonic()
            with self._lock:
                if now - last > STOPPED * self._period:
                    self._calls.restart(now)
                stands = self._calls.stands(self._counted(), now)
            last, waits = now, stands > 2 * self._period
            if waits and not self._read:
                self._begin_reading(now)
            self._read = waits
            found = self._missing() if waits else ""
            if found:
                self._say("bereft", found)
                # another's end may wake the main thread, which then leaves in better order
                if not (self._ended.wait(self._period) or self._main_knows):
                    sys.stderr.write(f"error: {message(self._rank, found)}\n")
                    sys.stderr.flush()
                    os._exit(EXIT_RANK_LOST)

    def _begin_reading(self, now: float) -> None:
        with self._lock:
            self._calls.listens(now)
        self._read = True

    def _missing(self, broken_s: float | None = None) -> str:
        now, asked = time.monotonic(), self._asked
        with self._lock:
            found = self._calls.missing(now, broken_s)
            stands = self._calls.stands(self._counted(), now)
        patience = self._timeout if broken_s is None else broken_s
        silent = self._store_lost or (asked is not None and now - asked > patience)
        if found or not silent or (broken_s is None and stands < patience):
            return found
        if self._holder is None:
            return "the rendezvous of the ranks no longer answers (its launcher, or its first node)"
        return f"rank {self._holder} no longer answers, and it keeps the rendezvous of the ranks"


def message(rank: int, missing: str) -> str:
    """For the user: found, and what to do."""
    if f"rank {rank} (" in missing:
        return f"the other ranks have given up waiting for this one: {missing}"
    return (
        f"rank {rank} lost another rank: {missing}. Its own output and its node's log say why; "
        "the last checkpoint is whole: start again with --resume"
    )
