"""A session: one job of the batch system from its start to its end, inside the allocation.

What the batch script becomes. It starts the stages on the nodes, sees to it that they stop in order
before the time is over, says on disk what happened, and sees to the job that goes on.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from types import FrameType

from dmi_hpc.config import Recipe
from dmi_hpc.deadline import FLOOR_S
from dmi_hpc.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_USER_ERROR, DMIError, LaunchError
from dmi_hpc.sessions import Session, cancelled, node_hours, sessions, submissions
from dmi_hpc.watch import StopFlag
from launch.allocation import Allocation
from launch.chain import NOTHING, REQUEUE, Outcome, Situation, following
from launch.cluster import PartFailed, stand_by
from launch.job import Job
from launch.pack import tidy_command
from launch.parts import Parts, island_of, session_folder
from launch.records import Recorder, progress_of
from launch.scheduler import Details, Scheduler, scheduler_of
from launch.stages import stages_of
from launch.submit import SCRIPT, submission

KEEP_S = 5.0  # after the stages' own end: to close Ray, to write down what happened, to go on
LATE_S = 2.0  # that a stage may be, which knows when it must have stopped
LOOK_S = 60.0  # between questions to the scheduler
PATIENCE_S, ANSWER_S = 5.0, 20.0  # for one answer of it


class Inquiry:
    """What the scheduler says of this job, asked beside everything else: it may take its time."""

    def __init__(self, allocation: Allocation) -> None:
        self._job, self._name = allocation.job, allocation.scheduler
        self._thread: threading.Thread | None = None
        self._said: Details | None = None

    def begin(self) -> None:
        """Ask, unless an answer is awaited already."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._ask, daemon=True)
            self._thread.start()

    def take(self) -> Details | None:
        """An answer that came since the last call."""
        said, self._said = self._said, None
        return said

    def answer(self) -> Details | None:
        """Ask and wait. None: nobody answers."""
        self.begin()
        if self._thread is not None:
            self._thread.join(ANSWER_S)
        return self.take()

    def _ask(self) -> None:
        try:
            self._said = scheduler_of(self._name, PATIENCE_S).details(self._job)
        except LaunchError:  # then the stages stop by what they know of the time
            self._said = None


class Conductor:
    """Of one session. `run` returns its exit code."""

    def __init__(
        self, job: Job, recipe: Recipe, allocation: Allocation, scheduler: Scheduler, stop: StopFlag
    ) -> None:
        self._job, self._recipe, self._allocation = job, recipe, allocation
        self._scheduler, self._stop = scheduler, stop
        self._inquiry = Inquiry(allocation)
        self._island = island_of(allocation, job)
        self._recorder = Recorder(job.out, allocation.job)
        self._stages = stages_of(recipe, job.stage)
        self._began = time.time()
        self._before = self._sessions()
        self._end = self._ends_at()
        self._warned = False
        self._look_at = time.monotonic() + LOOK_S

    def run(self) -> int:
        """The stages, and what follows. 0: done; 2: failed; 75: stopped with all state saved."""
        signal.signal(signal.SIGUSR1, self._warn)
        with self._recorder.alive():
            self._record_start()
            successor = None
            outcome = self._refusal()
            if outcome is None:
                progress = progress_of(self._job.out, self._island)
                successor = self._submitted()
                outcome = self._conducted()
                moved = progress_of(self._job.out, self._island) != progress
            else:
                moved = False
            outcome, next_job = following(self._job, outcome, self._situation(moved, successor))
            self._record_end(outcome, next_job, moved)
        _say(outcome, next_job)
        self._tidy()
        self._go_on(next_job, successor)
        return outcome.code

    # before

    def _sessions(self) -> list[Session]:
        """Earlier ones of this chain: since the user asked for it."""
        asked = [entry.time for entry in submissions(self._job.out) if entry.why != "chain"]
        since = max(asked, default=0.0)
        found = sessions(self._job.out)
        return [s for s in found if s.island == self._island and s.began >= since]

    def _ends_at(self) -> float | None:
        """When this session must be over: with its job, or its share of the node-hours."""
        ends = [] if self._allocation.end is None else [self._allocation.end]
        if self._job.max_node_hours is not None:
            left_h = self._job.max_node_hours - node_hours(self._job.out)
            # islands share what is left
            nodes = len(self._allocation.nodes) * max(1, self._job.islands)
            ends.append(self._began + left_h * 3600 / nodes)
        return min(ends, default=None)

    def _refusal(self) -> Outcome | None:
        """Why nothing is begun, if so."""
        if self._before and self._before[-1].how == "finished" and self._is_successor():
            return Outcome("finished", EXIT_OK, "an earlier job has finished it")
        if cancelled(self._job.out, self._allocation.job):
            return Outcome("interrupted", EXIT_INTERRUPTED)
        if self._end is not None and self._end - self._began < FLOOR_S + KEEP_S:
            return Outcome("interrupted", EXIT_INTERRUPTED, "no time is left")
        if len(self._before) >= self._job.max_jobs:
            return Outcome("interrupted", EXIT_INTERRUPTED)
        return None

    def _is_successor(self) -> bool:
        """Whether an earlier job has submitted this one, to go on from it."""
        own = self._allocation.job.partition("_")[0]
        given = submissions(self._job.out)
        return any(e.job.partition("_")[0] == own and e.why == "chain" for e in given)

    def _submitted(self) -> str | None:
        """The job that is to go on when this one ends, however it ends: it stands in the queue from
        the beginning, for there may be no moment left later."""
        last = len(self._before) + 1 >= self._job.max_jobs
        if self._job.chain != "dependency" or last:
            return None
        try:
            return self._waiting() or self._successor()
        except LaunchError as error:  # no reason to waste this allocation
            sys.stderr.write(
                f"no next job could be submitted now ({error}); this one will requeue\n"
            )
            return None

    def _waiting(self) -> str | None:
        """A successor that this job's session before it was requeued has submitted."""
        for entry in submissions(self._job.out):
            if entry.after == self._allocation.job and entry.why == "chain":
                state = self._scheduler.states([entry.job]).get(entry.job)
                if state is not None and state.phase == "queued":
                    return entry.job
        return None

    def _successor(self) -> str:
        """Submit the same script once more, to start when this job has ended."""
        own, task = self._allocation.job, self._allocation.task or None
        script = self._job.out / "launch" / SCRIPT
        successor = self._scheduler.submit(script, after=own, cwd=self._job.out, array=task)
        said = submission(self._job, successor, after=own, why="chain")
        self._recorder.event("submitted", **said)
        return successor

    # stages

    def _conducted(self) -> Outcome:
        """All stages, one after the other."""
        ends = None if self._end is None else self._end - KEEP_S
        parts = Parts(self._job, self._recipe, self._allocation, ends)
        for stage in self._stages:
            self._recorder.event("stage", stage=stage, state="began")
            began, code, why, lost = time.monotonic(), EXIT_OK, "", False
            try:
                if stand_by(parts.of(stage), self._stop, look=self._look):
                    code = EXIT_INTERRUPTED
            except DMIError as error:
                code, why = EXIT_USER_ERROR, str(error)
                lost = isinstance(error, PartFailed) and error.lost
            seconds = time.monotonic() - began
            self._recorder.event("stage", stage=stage, state="ended", code=code, seconds=seconds)
            if lost:
                return Outcome("interrupted", EXIT_INTERRUPTED, why)
            if code != EXIT_OK:
                return Outcome("interrupted" if code == EXIT_INTERRUPTED else "failed", code, why)
        return Outcome("finished", EXIT_OK)

    def _warn(self, number: int, frame: FrameType | None) -> None:
        self._warned = True

    def _look(self) -> None:
        """Is the time over, or does the scheduler want the nodes back?"""
        if self._stop:
            return
        now, seconds = time.time(), time.monotonic()
        # the stages have stopped by themselves by then, unless they know nothing of time
        if self._end is not None and now > self._end - KEEP_S - FLOOR_S + LATE_S:
            self._ask_to_stop("the time is over")
            return
        if self._warned or seconds > self._look_at:
            self._look_at = seconds + LOOK_S
            self._inquiry.begin()
        self._heed(self._inquiry.take(), now)

    def _heed(self, details: Details | None, now: float) -> None:
        """details: what the scheduler said since the last look; None: nothing."""
        if details is not None and (details.preempted or details.requeued):
            self._ask_to_stop("the scheduler takes the nodes back")
        elif self._warned:
            self._warned = False
            far = self._end is None or self._end - now > 2 * self._job.signal_s + LOOK_S
            if far:
                self._ask_to_stop("SIGUSR1 came, long before the time is over")

    def _ask_to_stop(self, why: str) -> None:
        self._recorder.event("stop", why=why)
        self._stop.signal = signal.SIGUSR1

    # after

    def _situation(self, moved: bool, successor: str | None) -> Situation:
        idle = 0 if moved else 1
        if idle:
            for session in reversed(self._before):
                if session.moved is not False:
                    break
                idle += 1
        details = self._inquiry.answer()
        given_up = cancelled(self._job.out, self._allocation.job)
        return Situation(
            sessions=len(self._before) + 1,
            used_h=node_hours(self._job.out),
            idle=idle,
            cancelled=given_up or (details is not None and details.cancelled),
            requeued=details is not None and details.requeued,
            successor=successor,
        )

    def _record_start(self) -> None:
        allocation = self._allocation
        self._recorder.event(
            "started",
            job=allocation.job,
            restart=allocation.restart,
            scheduler=allocation.scheduler,
            machine=self._job.machine.name,
            nodes=list(allocation.nodes),
            cpus_per_node=allocation.cpus,
            gpus_per_node=allocation.gpus,
            ends=self._end,
            island=self._island,
            stages=list(self._stages),
        )

    def _record_end(self, outcome: Outcome, next_job: str, moved: bool) -> None:
        self._recorder.event(
            "ended",
            how=outcome.how,
            code=outcome.code,
            node_s=(time.time() - self._began) * len(self._allocation.nodes),
            next=next_job,
            moved=moved,
            why=outcome.why,
        )

    def _tidy(self) -> None:
        """Nothing stays of the session's secrets, and of an environment copied to the nodes."""
        shutil.rmtree(session_folder(self._job, self._allocation), ignore_errors=True)
        command = tidy_command(os.environ)
        if command:
            parts = Parts(self._job, self._recipe, self._allocation, None)
            stand_by([parts.on_each_node("to remove the copied environment", command)], StopFlag())

    def _go_on(self, next_job: str, successor: str | None) -> None:
        """Where a site forbids requeueing, a job after this one does as well."""
        if successor is not None and next_job != successor:
            self._scheduler.cancel(successor)
        if next_job != REQUEUE:
            return
        try:
            self._scheduler.requeue(self._allocation.job)
        except LaunchError as error:
            sys.stderr.write(f"not requeued ({error})\n")
            sys.stderr.write(f"job {self._successor()} goes on instead\n")


def _say(outcome: Outcome, next_job: str) -> None:
    what = {NOTHING: "", REQUEUE: "; this job goes on when the scheduler starts it again"}
    goes_on = what.get(next_job, f"; job {next_job} goes on")
    why = f": {outcome.why}" if outcome.why else ""
    sys.stderr.write(f"session {outcome.how}{why}{goes_on}\n")
    sys.stderr.flush()
