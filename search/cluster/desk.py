"""Between the slots and the driver: who evaluates what, since when, and whose fault a death is."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from dmi_hpc.errors import LaunchError
from search.cluster.allocation import Allocation
from search.cluster.forecast import Forecast
from search.driver import Driver
from search.evolution.evolve import Failure, Proposal
from search.spaces.genome import Genome, to_json
from search.trials.trial import TRACEBACK_CHARACTERS, Answer, Left, TrialOutcome

DEATHS = 3  # of workers in a row, times their number, before the machine counts as the cause
NODE_DEATHS = 3  # under one network, before it may be the cause
NODE_DIED = "node has died"  # Ray's word of an actor that went with its node


class SpentWorker(Exception):
    """A worker that lost its device refuses a trial. Tune does not reuse an actor that raised."""


class Desk:
    """Gives slots genomes and takes their answers.

    A slot is opened for a genome, which is held until its worker is ready. Should the slot wait in
    vain, for its node has gone, another one takes it.
    """

    def __init__(
        self,
        driver: Driver,
        allocation: Allocation,
        shown: Callable[[], None],
        trial_limit_s: float | None = None,
        room: Callable[[], int] | None = None,
    ) -> None:
        """room: trials that the living nodes hold at once; if not, as many as there are workers."""
        self.driver, self.allocation, self.shown = driver, allocation, shown
        self._room = room or (lambda: driver.progress.workers)
        self._forecast = Forecast(driver, trial_limit_s)
        self._deaths = 0  # since an evaluation finished
        self._node_deaths: Counter[int] = Counter()  # under a proposal
        self._open: set[str] = set()  # slots
        self._held: dict[str, int] = {}  # slot that is not ready -> its proposal
        self._numbers: dict[str, int] = {}  # slot -> the proposal it evaluates
        self._started: dict[str, float] = {}

    def open(self, slot: str) -> bool:
        """Whether there is room for one more slot, and something for it to evaluate."""
        proposal = self._in_time(slot) if len(self._open) < self._room() else None
        self.shown()
        if proposal is None:
            return False
        self._open.add(slot)
        self._held[slot] = proposal.id
        return True

    def close(self, slot: str) -> None:
        """The slot is no more, whatever it was to evaluate."""
        self._open.discard(slot)
        held = self._held.pop(slot, None)
        if held is not None:
            self.driver.again(held)

    def next_for(self, slot: str) -> dict[str, Any] | None:
        """What to evaluate now: the evaluator's arguments. None while there is nothing, or no time."""
        number = self._held.pop(slot, None)
        if number is None and self._held and len(self._open) > self._room():
            number = self._held.pop(next(iter(self._held)))
        if number is not None and not self.allocation.may_start(time.time()):
            self.driver.again(number)
            number = None
        elif number is None:
            proposal = self._in_time(slot)
            number = None if proposal is None else proposal.id
        self.shown()
        if number is None:
            return None
        self._numbers[slot], self._started[slot] = number, time.monotonic()
        genome = self.driver.halving.stage(number).proposal.genome
        assignment = self.driver.assignment(number, self.allocation.end)
        return {"genome": to_json(genome), "assignment": assignment}

    def _in_time(self, slot: str) -> Proposal[Genome] | None:
        while self.allocation.may_start(time.time()):
            proposal = self.driver.next_proposal(slot)
            if proposal is None:
                return None
            refused = self._forecast.refusal(proposal.id)
            if refused is None:
                return proposal
            self.driver.finished(proposal.id, refused)
        return None

    @property
    def is_done(self) -> bool:
        """Nothing runs, and nothing will."""
        closed = self.allocation.closed is not None and not self.driver.progress.running
        return closed or self.driver.done

    def attend(self) -> None:
        """Now and then: nodes have gone or come; what is shown is brought up to date."""
        self.driver.employ(self._room())
        self.shown()

    def finished(self, slot: str, outcome: Answer) -> None:
        self._deaths = 0
        number = self._numbers.pop(slot)
        if isinstance(outcome, Left):
            self.allocation.close("trials are left, each with a checkpoint, for the next session")
            self.driver.left(number, outcome.seconds)
            return
        self.driver.finished(number, self._forecast.learned(number, outcome), slot)
        self.allocation.finished(outcome.seconds)
        self.shown()

    def died(self, slot: str, limit_s: float | None, text: str) -> None:
        """The worker of `slot` died. text: Ray's word of it; limit_s: of a trial.

        A node that dies says nothing of the network, unless that happens to it time and again.
        LaunchError if workers do nothing but die.
        """
        number, started = self._numbers.pop(slot, None), self._started.pop(slot, None)
        self.close(slot)
        if NODE_DIED in text:
            if number is None:
                return
            self._node_deaths[number] += 1
            if self._node_deaths[number] < NODE_DEATHS:
                self.driver.again(number)
                return
        self._deaths += 1
        if number is not None and started is not None:
            judge_loss(self.driver, number, time.monotonic() - started, limit_s, text)
        self._require_life(text)

    def _require_life(self, text: str) -> None:
        if self._deaths >= DEATHS * max(1, self.driver.progress.workers):
            *_, last = text.strip().splitlines() or ["nothing"]
            raise LaunchError(
                f"{self._deaths} workers in a row died, and none finished an evaluation: the fault is "
                f"not a network's. Ray says of the last one: {last[:500]}. Once that is mended, "
                "--resume continues"
            )


def judge_loss(
    driver: Driver, number: int, seconds: float, limit_s: float | None, text: str
) -> None:
    """Tell `driver` that the worker of trial `number` failed after `seconds`. text: Ray's word."""
    *_, last = text.strip().splitlines() or [""]
    text = text[-TRACEBACK_CHARACTERS:]
    if SpentWorker.__name__ in text:
        driver.again(number)
    elif limit_s is not None and seconds > limit_s:
        message = f"its worker hung and was ended: not finished after {limit_s:g} s"
        driver.finished(number, TrialOutcome(Failure("timeout", message, text), seconds, {}))
    else:
        message = f"the worker process died (killed, out of memory, or as Ray says: {last[:500]})"
        driver.finished(number, TrialOutcome(Failure("lost", message, text), seconds, {}))
