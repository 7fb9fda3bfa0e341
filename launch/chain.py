"""Whether, and how, a job that has stopped short of its goal goes on in a next one. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from launch.job import SHORTEST_S, Job

How = Literal["finished", "interrupted", "failed", "cancelled", "budget", "stuck"]

REQUEUE, NOTHING = "requeue", "none"
STUCK = 2  # sessions in a row that finished nothing


@dataclass(frozen=True)
class Outcome:
    """How a session ended. code: its exit code; why: in words, "" if there is nothing to say."""

    how: How
    code: int
    why: str = ""


@dataclass(frozen=True)
class Situation:
    """What is known at the end of a session. sessions: of this chain so far, this one too; used_h:
    their node-hours; idle: of them, in a row at the end, without progress; cancelled: by the user;
    requeued: by the scheduler itself already, as after preemption; successor: the job that is in the
    queue."""

    sessions: int
    used_h: float
    idle: int
    cancelled: bool = False
    requeued: bool = False
    successor: str | None = None


def following(job: Job, outcome: Outcome, now: Situation) -> tuple[Outcome, str]:
    """How it is to be called, and what follows: "requeue", the id of a successor, or "none"."""
    if outcome.how != "interrupted":
        return outcome, NOTHING
    if now.requeued and not now.cancelled:
        return outcome, REQUEUE
    ended = _ended(job, now)
    if ended is not None:
        return Outcome(ended[0], outcome.code, _joined(outcome.why, ended[1])), NOTHING
    if job.chain == "off":
        text = "no chain is asked for: dmi launch resume RUN goes on"
        return Outcome("interrupted", outcome.code, _joined(outcome.why, text)), NOTHING
    return outcome, now.successor or REQUEUE


def _ended(job: Job, now: Situation) -> tuple[How, str] | None:
    """Why the chain ends here, if it does."""
    if now.cancelled:
        return "cancelled", "it was cancelled; dmi launch resume RUN goes on"
    if job.max_node_hours is not None:
        left_s = (job.max_node_hours - now.used_h) * 3600 / (job.nodes * max(1, job.islands))
        if left_s < SHORTEST_S:
            return "budget", (
                f"{now.used_h:.2f} of {job.max_node_hours:g} node-hours are used (--max-node-hours)"
            )
    if now.sessions >= job.max_jobs:
        return (
            "budget",
            f"{now.sessions} jobs have run, and {job.max_jobs} are allowed (--max-jobs)",
        )
    if now.idle >= STUCK:
        return "stuck", (
            f"{now.idle} jobs in a row have finished nothing new: the time of one job may be too short "
            "for a first result (-t), or something is wrong: dmi launch logs RUN"
        )
    return None


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)
