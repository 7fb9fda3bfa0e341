"""What the trials of a search will take, by those that finished on its workers."""

from __future__ import annotations

from dataclasses import replace

from search.driver import Driver
from search.evolution.evolve import Failure, Success
from search.trials.pace import Load, Pace, load_of
from search.trials.trial import TrialOutcome

SURELY = 0.05  # of such trials would take less: one that is refused would hardly have made it


class Forecast:
    """Seconds of the driver's proposals. Nothing is foretold before enough trials have finished."""

    def __init__(self, driver: Driver, limit_s: float | None = None) -> None:
        """limit_s: a trial may not take longer."""
        self._driver, self._limit_s = driver, limit_s
        self._pace = Pace()
        self._loads: dict[int, Load] = {}  # of stages that run

    def refusal(self, number: int) -> TrialOutcome | None:
        """The failure of proposal `number` if it cannot be expected to end within the limit."""
        if self._limit_s is None or self._driver.rung_unit != "epochs":
            return None
        load = self._load(number)
        least, expected = self._pace.seconds(load, SURELY), self._pace.seconds(load)
        if least is None or expected is None or least <= self._limit_s:
            return None
        del self._loads[number]
        message = (
            f"not started: expected to take {expected:.3g} s, as {load.flops:.3g} FLOPs a sample do "
            f"here; allowed are {self._limit_s:g} s"
        )
        return TrialOutcome(Failure("timeout", message), 0.0, {"predicted_s": expected})

    def learned(self, number: int, outcome: TrialOutcome) -> TrialOutcome:
        """Learn from `outcome`; returns it with what had been expected: ``predicted_s``."""
        if self._driver.rung_unit != "epochs":
            return outcome
        load = self._load(number)
        del self._loads[number]
        expected = self._pace.seconds(load)
        if isinstance(outcome.told, Success) and "resumed_epochs" not in outcome.metrics:
            self._pace.learn(load, outcome.seconds)
        if expected is None:
            return outcome
        return replace(outcome, metrics={**outcome.metrics, "predicted_s": expected})

    def _load(self, number: int) -> Load:
        """Of the stage that proposal `number` is in."""
        if number not in self._loads:
            halving = self._driver.halving
            stage, budgets = halving.stage(number), halving.rungs.budgets
            amount = budgets[stage.rung] - (budgets[stage.rung - 1] if stage.rung else 0.0)
            genome, network = stage.proposal.genome, self._driver.space.network
            self._loads[number] = load_of(genome, network, amount)
        return self._loads[number]
