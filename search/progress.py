"""How far a search is, as its own process counts."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Progress:
    """Counts for the terminal. Worker seconds are of this session, without resumed history.

    budget: evaluations of all islands together; elsewhere: those of the others.
    """

    budget: int
    workers: int = 1
    finished: int = 0
    elsewhere: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    running: int = 0
    busy_s: float = 0.0
    session_finished: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started

    @property
    def utilisation(self) -> float:
        """Share of worker time spent inside finished evaluations."""
        return self.busy_s / (self.workers * max(self.elapsed_s, 1e-9))

    @property
    def remaining_s(self) -> float | None:
        """As if the other islands went on in proportion to what they have done so far."""
        if not self.session_finished:
            return None
        left = self.budget - self.finished - self.elsewhere
        share = self.finished / (self.finished + self.elsewhere)
        return max(0.0, self.elapsed_s / self.session_finished * left * share)
