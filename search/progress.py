"""How far a search is, as its own process counts."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Progress:
    """Counts of networks (by their hashes) and time. Worker seconds are of this session alone.

    budget: evaluations of all islands together; own: evaluated here; begun: run here for the first
    time; others: evaluated on other islands, as far as it is known. A network of several counts once.
    """

    budget: int
    workers: int = 1
    own: set[str] = field(default_factory=set)
    begun: set[str] = field(default_factory=set)
    others: set[str] = field(default_factory=set)
    failures: Counter[str] = field(default_factory=Counter)
    running: int = 0
    busy_s: float = 0.0
    session_finished: int = 0
    started: float = field(default_factory=time.monotonic)
    _until_now_s: float = 0.0  # of workers, before their number changed:
    _changed_s: float = 0.0  # after the beginning

    def employ(self, workers: int) -> None:
        """From now on there are so many."""
        self._until_now_s, self._changed_s = self._worker_s, self.elapsed_s
        self.workers = workers

    @property
    def _worker_s(self) -> float:
        return self._until_now_s + self.workers * (self.elapsed_s - self._changed_s)

    @property
    def finished(self) -> int:
        return len(self.own)

    @property
    def elsewhere(self) -> int:
        """Evaluated on other islands alone."""
        return len(self.others - self.own)

    @property
    def spent(self) -> bool:
        """Whether the budget has no place for a further network."""
        return self.finished + self.elsewhere + len(self.begun - self.others) >= self.budget

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started

    @property
    def utilisation(self) -> float:
        """Share of worker time spent inside finished evaluations."""
        return self.busy_s / max(self._worker_s, 1e-9)

    @property
    def remaining_s(self) -> float | None:
        """As if the other islands went on in proportion to what they have done so far."""
        if not self.session_finished:
            return None
        left = self.budget - self.finished - self.elsewhere
        share = self.finished / (self.finished + self.elsewhere)
        return max(0.0, self.elapsed_s / self.session_finished * left * share)
