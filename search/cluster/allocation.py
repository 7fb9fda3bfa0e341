"""What still fits into the time that is left: no trial starts that can neither finish nor go on.

Pure: who asks says what time it is. How long a trial takes is learned from those that finished.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from math import inf

import numpy as np

from dmi_hpc.deadline import FLOOR_S, End, end_of

RECENT = 64  # durations looked at: later trials may be of larger networks
ENOUGH = 4  # durations, before they say anything
QUANTILE = 0.9  # of them must fit
WORTH_S = 60.0  # that a trial trains before it is left,
WORTH_SHARE = 0.05  # or of a short session so much
LEAVE_S = 5.0  # before the end: trials have left FLOOR_S before it, each with its checkpoint


class Allocation:
    """The time of one session: until its job ends, and until the user's own limit."""

    def __init__(
        self, job: End | None = None, limit: End | None = None, worth_s: float = WORTH_S
    ) -> None:
        """job: by then all processes are gone; trials leave by themselves before it. limit: no trial
        starts that takes longer, but those that run go on. worth_s: that a trial should have before
        it leaves, to be worth its start."""
        self.end, self._limit, self._worth_s = job, limit, worth_s
        self._left_at = None if job is None else End(job.at - FLOOR_S, job.source)
        self._durations: deque[float] = deque(maxlen=RECENT)
        self.closed: str | None = None  # why no trial starts any more

    @classmethod
    def of(cls, env: Mapping[str, str], time_limit_s: float | None, now: float) -> Allocation:
        """By the end of the job and the recipe's limit. LaunchError if the former is no time."""
        limit = None if time_limit_s is None else End(now + time_limit_s, "time_limit_s")
        job = end_of(env, None, now)
        worth_s = WORTH_S if job is None else min(WORTH_S, WORTH_SHARE * (job.at - now))
        return cls(job, limit, worth_s)

    def finished(self, seconds: float) -> None:
        """A trial took so long."""
        self._durations.append(seconds)

    @property
    def predicted_s(self) -> float:
        """What a trial may take; 0 while too few have finished to tell."""
        if len(self._durations) < ENOUGH:
            return 0.0
        return float(np.quantile(self._durations, QUANTILE))

    def may_start(self, now: float) -> bool:
        """Whether a trial that starts at `now` (epoch seconds) is worth it. A no is for good.

        Before the job's end it need not finish, for it goes on in the next one: a minute will do.
        """
        if self.closed is None:
            for end, needed in (
                (self._left_at, min(self.predicted_s, self._worth_s)),
                (self._limit, self.predicted_s),
            ):
                left = inf if end is None else end.at - now
                if end is not None and (left <= 0 or left < needed):
                    self.close(
                        f"{max(0.0, left):.0f} s are left ({end.source}), and a trial may take "
                        f"{self.predicted_s:.0f} s"
                    )
        return self.closed is None

    def close(self, why: str) -> None:
        """Let no trial start any more."""
        self.closed = self.closed or why

    def is_over(self, now: float) -> str | None:
        """Why trials that still run must be left; None to go on."""
        if self.end is None or now < self.end.at - LEAVE_S:
            return None
        return f"the time is over ({self.end.source})"
