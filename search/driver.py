"""The search as a whole, without its runner: evolution, journal, budget, winner.

Whoever runs trials asks `next_proposal` and reports to `finished`; every ask and every outcome is in
the journal before it has an effect, so that kill -9 loses only trials in flight.
"""

from __future__ import annotations

import gc
import json
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmi_hpc.config import Recipe
from dmi_hpc.data.manifest import require_identity
from dmi_hpc.deadline import End
from dmi_hpc.errors import TRANSIENT, RunError
from dmi_hpc.files import write_json
from dmi_hpc.models.space import SearchSpace
from search.evolution.evolve import (
    Failure,
    Outcome,
    Proposal,
    SpaceExhausted,
)
from search.evolution.fidelity import Halving, Stage
from search.progress import Progress
from search.records.control import Control, read_control
from search.records.history import JOURNAL, MAIN, home
from search.records.islands import Islands
from search.records.journal import Journal, replay
from search.records.kept import Kept
from search.records.warm import Founder
from search.setting import evolution_of, networks_of, rungs_of
from search.spaces.genome import Genome, decode, to_json
from search.trials.ending import Assignment, Goal
from search.trials.trial import TrialOutcome

LOSSES = 2  # failures of the machine, until a network counts as the cause
HOPELESS = 30  # failures in a row, or as many as there are workers: something else is wrong
LOOK_S = 1.0  # between looks at what the user wants


@dataclass(frozen=True)
class Start:
    """How a search begins. island: its name; founders: known good networks, evaluated first;
    larger_space: its journal may be of a space that this one contains."""

    island: str = MAIN
    founders: Sequence[Founder] = ()
    larger_space: bool = False


class Driver:
    """One search in `folder` (``RUN/search``), or an island of it: new, or continued."""

    def __init__(
        self,
        recipe: Recipe,
        space: SearchSpace,
        folder: Path,
        *,
        data: str = "",
        start: Start | None = None,
    ) -> None:
        """data: identity of the shard set; DataError if the journal is of another one.

        Nothing is written before `start`, but a journal's change to a larger space.
        """
        search, self._start = recipe.search, start or Start()
        self.island = self._start.island
        self.space, self._search, self._limit_s = space, folder, search.time_limit_s
        self.folder = home(folder, self.island)
        self._networks = networks_of(recipe, space)
        self.evolution = evolution_of(recipe, self._networks, self.island)
        self._objectives, self.rung_unit = search.objectives, search.rung_unit
        self.halving = Halving(self.evolution, rungs_of(search))
        self._inherit, self._kept = search.inherit, Kept(self.folder)
        self.progress = Progress(search.evaluations)
        self._losses: Counter[int] = Counter()
        self._lost_by: dict[int, str] = {}  # the worker that is not to have it again
        self._in_a_row = 0  # failures
        self._data = data
        self._pending: deque[Stage[Genome]] = deque()
        self.journal = Journal(self.folder / JOURNAL)
        if self.journal.path.exists():
            self._continue()
        self._pauses_at = (
            [search.rung_unit, *self.halving.rungs.budgets[:-1]] if search.pauses else []
        )
        self._islands = Islands(folder, self.island, self.halving, data, self._pauses_at)
        self._exhausted = self._started = False
        self._stopped: str | None = None  # how
        self._stop_seen = read_control(folder).stop
        self._look_at = 0.0
        self.progress.others = self._islands.networks
        self.attend()

    def _continue(self) -> None:
        self.journal = Journal.open(self.journal.path)
        recorded = self.journal.header().get("config", {}).get("data", "")
        require_identity(recorded, self._data, maker=f"{self.journal.path}")
        larger = self._start.larger_space
        replay(self.journal, self.evolution, halving=self.halving, larger_space=larger)
        self._pending.extend(self.halving.pending())
        known = {e["id"] for e in self.journal.events() if "evaluated_as" in e.get("metrics", ())}
        for number, told in self.evolution.outcomes.items():
            if number >= 0 and number not in known:
                self._count(number, told)
        gc.collect()
        gc.freeze()  # a full collection of 10,000 networks would take 150 ms, time and again

    def start(
        self, workers: int, trial_memory_GB: float, facts: Mapping[str, Any] | None = None
    ) -> None:
        """Begin a session: the journal's header, or a resume, with what this machine has.

        facts: more for the record, plain data.
        """
        record = {"workers": workers, "trial_memory_GB": trial_memory_GB, **(facts or {})}
        record["evaluations"] = self.progress.budget
        record["objectives"] = list(self._objectives)
        record["rungs"] = self._pauses_at
        if self.journal.path.exists():
            constants = self.evolution.config.model_dump(mode="json", exclude={"seed"})
            self.journal.resumed({**constants, **record})
        else:
            record["data"] = self._data
            self.journal = Journal.create(self.journal.path, self.evolution, record)
            self._plant()
        self._started = True
        self._networks.memory_bytes = trial_memory_GB * 1e9
        self.progress.workers = workers
        self.attend()

    def employ(self, workers: int) -> None:
        """So many workers from now on: nodes go and come."""
        if workers != self.progress.workers:
            self.journal.record("workers", workers=workers)
            self.progress.employ(workers)

    def _plant(self) -> None:
        """Known good networks of other searches are proposed before anything else."""
        for number, founder in enumerate(self._start.founders):
            identity = self.evolution.space.identity(founder.genome)
            proposal = Proposal(number, founder.genome, "founder", (), identity)
            self.journal.ask(proposal, to_json(founder.genome), source=dict(founder.source))
            self._pending.append(self.halving.restore_ask(proposal))

    def attend(self) -> None:
        """Now and then: what the user wants (stop, larger budget), and what other islands found."""
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + LOOK_S
            self._look()
        self._islands.poll()
        if self._started:
            self._islands.exchange(self.journal)

    def _look(self) -> None:
        try:
            self._obey(read_control(self._search))
        except (OSError, RunError):
            # a network file system has such moments, and a damaged file is told by the commands
            return

    def _obey(self, control: Control) -> None:
        if control.stop != self._stop_seen:  # not one of before this session
            self._stopped = control.how
        if control.evaluations > self.progress.budget:
            self.progress.budget = control.evaluations
            if self._started:
                self.journal.record("extend", evaluations=control.evaluations)

    def end(self, why: str) -> None:
        """Record that the session ends: finished, stopped or interrupted."""
        if self._started:
            self.journal.record("end", why=why)

    @property
    def warnings(self) -> list[str]:
        """What the user should know: damaged lines, journals that are not taken note of."""
        damaged = self.journal.damaged
        lines = ", ".join(map(str, damaged[:10])) + (", ..." if len(damaged) > 10 else "")
        found = [f"{self.journal.path}: damaged and passed over: line {lines}"] if damaged else []
        return found + list(self._islands.refused.values())

    @property
    def out_of_time(self) -> bool:
        return self._limit_s is not None and self.progress.elapsed_s > self._limit_s

    @property
    def stopped(self) -> bool:
        """The user wants no further trial (``dmi search stop``)."""
        return self._stopped is not None

    @property
    def stopped_now(self) -> bool:
        """... and none of those that run to go on."""
        return self._stopped == "now"

    @property
    def done(self) -> bool:
        """Nothing is left to evaluate, or no time to do it."""
        p = self.progress
        if p.running:
            return False
        begun = self._promotable or any(stage.rung for stage in self._pending)
        exhausted = self._exhausted and not self._pending
        over = self.out_of_time or self.stopped
        return over or (not begun and (self.progress.spent or exhausted))

    @property
    def _promotable(self) -> bool:
        return self.halving.rungs.next_promotion() is not None

    def next_proposal(self, worker: str = "") -> Proposal[Genome] | None:
        """What `worker` is to do: what was interrupted, a paused trial that goes on, or a new network.

        No island has evaluated it yet. None while there is none: for good if `done`, else until a
        running one ends.
        """
        self.attend()
        while not (self.out_of_time or self.stopped):
            stage = self._interrupted(worker) or self._begun()
            if stage is None:
                break
            proposal = stage.proposal
            known = None if stage.rung else self._islands.known(proposal.hash)
            if known is None:
                if not stage.rung:
                    self.progress.begun.add(proposal.hash)
                self.progress.running += 1
                return proposal
            metrics = {"evaluated_as": known.name, "curve": known.curve}
            self.journal.tell(proposal.id, known.outcome, 0.0, metrics)
            self.halving.tell(proposal.id, known.outcome, known.curve, waits=False)
        return None

    def _interrupted(self, worker: str) -> Stage[Genome] | None:
        spent = self.progress.spent
        open_ones = (s for s in self._pending if s.rung or not spent)
        elsewhere = self.progress.workers > 1 and bool(worker)
        wanted = next(
            (s for s in open_ones if not elsewhere or self._lost_by.get(s.proposal.id) != worker),
            None,
        )
        if wanted is not None:
            self._pending.remove(wanted)
        return wanted

    def _begun(self) -> Stage[Genome] | None:
        """A stage that nobody has asked for yet, in the journal."""
        if self.progress.spent and not self._promotable:
            return None
        try:
            stage = self.halving.ask()
        except SpaceExhausted:
            self._exhausted = True
            return None
        if stage.rung:
            self.journal.record("promote", id=stage.proposal.id, rung=stage.rung)
        else:
            self.journal.ask(stage.proposal, to_json(stage.proposal.genome))
        return stage

    def assignment(self, number: int, end: End | None = None) -> Assignment:
        """How far proposal `number` is to be trained now, and from what. end: of the time for it."""
        rungs, stage = self.halving.rungs, self.halving.stage(number)
        parents = stage.proposal.parents if self._inherit else ()
        goal = None
        if stage.rung < rungs.top:
            goal = Goal(rungs.budgets[stage.rung], self.rung_unit)
        return Assignment(number, goal, parents, bool(rungs.top or self._inherit), end)

    def finished(self, number: int, outcome: TrialOutcome, worker: str = "") -> None:
        """Record the outcome of proposal `number`, that `worker` brought.

        A failure of the machine is not believed at once: the proposal is asked again, under its
        number, by another worker if there is one. Raises RunError if nothing succeeds any more.
        """
        if isinstance(outcome.told, Failure) and outcome.told.kind in TRANSIENT:
            self._losses[number] += 1
            if self._losses[number] < LOSSES:
                self._lost_by[number] = worker
                self.again(number)
                return
        self._record(number, outcome)
        self._require_hope(outcome)

    def _require_hope(self, outcome: TrialOutcome) -> None:
        """RunError if so many failed one after the other that no search can be the reason."""
        told = outcome.told
        self._in_a_row = self._in_a_row + 1 if isinstance(told, Failure) else 0
        if isinstance(told, Failure) and self._in_a_row >= max(HOPELESS, self.progress.workers):
            kinds = ", ".join(f"{n} {kind}" for kind, n in self.progress.failures.most_common())
            raise RunError(
                f"the last {self._in_a_row} evaluations failed, one after the other (failures of the "
                f"search: {kinds}): the search stops before it wastes more. The last one: {told.kind}: "
                f"{told.message[:500]}. {self.journal.path} has the traceback of each. Once the reason "
                "is mended, --resume goes on with new networks"
            )

    def _record(self, number: int, outcome: TrialOutcome) -> None:
        told, rung = outcome.told, self.halving.stage(number).rung
        metrics: dict[str, Any] = dict(outcome.metrics)
        if self.halving.rungs.top:
            metrics["rung"] = rung
        if outcome.curve:
            metrics["curve"] = outcome.curve
        self.journal.tell(number, told, outcome.seconds, metrics)
        self.halving.tell(number, told, outcome.curve)
        p = self.progress
        p.running -= 1
        p.busy_s += outcome.seconds
        if not rung:
            p.session_finished += 1
        self._count(number, told)
        self._tidy(number)

    def _count(self, number: int, told: Outcome) -> None:
        identity = self.evolution.proposals[number].hash
        self.progress.begun.discard(identity)
        self.progress.own.add(identity)
        if isinstance(told, Failure):
            self.progress.failures[told.kind] += 1

    def _tidy(self, number: int) -> None:
        """On disk stay checkpoints of what runs or will go on soon, and weights to inherit; `number`
        has just ended."""
        if not (self.halving.rungs.top or self._inherit):
            self._kept.forget(number)
            return
        running = {stage.proposal.id for stage in self.halving.pending()}
        parents = {parent for n in running for parent in self.evolution.proposals[n].parents}
        kept = running | set(self.halving.rungs.next_in_line(self.evolution.config.population))
        self._kept.prune(kept, {*parents, *self.evolution.breeding} if self._inherit else ())

    def again(self, number: int) -> None:
        """Proposal `number` was not evaluated, through no fault of its own: it is the next one."""
        self._pending.appendleft(self.halving.stage(number))
        self.progress.begun.discard(self.evolution.proposals[number].hash)
        self.progress.running -= 1

    def left(self, number: int, seconds: float) -> None:
        """Proposal `number` stopped short of its goal, with a checkpoint, after `seconds` of work that
        is not lost."""
        self.journal.record("left", id=number, seconds=seconds)
        self.progress.busy_s += seconds
        self.again(number)

    def write_winner(self) -> Path:
        """winner.json: the best network and its hyper-parameters. RunError if every trial failed."""
        best = self.halving.best()
        if best is None:
            kinds = ", ".join(f"{n} {kind}" for kind, n in self.progress.failures.items())
            raise RunError(
                f"{self.journal.path}: no network could be evaluated ({kinds or 'none was tried'}); "
                "the journal holds the message of each"
            )
        content = self._described(*best)
        path = self.folder / "winner.json"
        write_json(path, content)
        shared = self._search / "winner.json"  # what training takes
        if not shared.exists() or content["fitness"] <= json.loads(shared.read_text())["fitness"]:
            write_json(shared, content)
        return path

    def name_of(self, number: int) -> str:
        """A proposal as the commands name it: the id, on an island with the island's name."""
        island, number = self._home_of(number)
        return str(number) if island == MAIN else f"{island}:{number}"

    def _home_of(self, number: int) -> tuple[str, int]:
        """(island, id there) of a proposal: a migrant was made elsewhere."""
        if number >= 0:
            return self.island, number
        events = self.journal.events()
        source = next(e["from"] for e in events if e["event"] == "migrant" and e["id"] == number)
        return source["island"], source["id"]

    def _described(self, number: int, fitness: float) -> dict[str, Any]:
        """A network of this search, or of the island that it came from, as plain data."""
        proposal, hyper = self.evolution.proposals[number], self._trained_with(number)
        island, number = self._home_of(number)
        return {
            "id": number,
            "fitness": fitness,
            "origin": proposal.origin,
            "parents": list(proposal.parents),
            "genome": to_json(proposal.genome),
            "network": decode(proposal.genome, self.space.network).model_dump(mode="json"),
            "hyper": hyper,
            "data": self._data,
            **({} if island == MAIN else {"island": island}),
        }

    def _trained_with(self, number: int) -> dict[str, Any]:
        """Its hyper-parameters, and the parts its batches were computed in if memory wanted them."""
        told = (e for e in self.journal.events() if e["event"] == "tell" and e["id"] == number)
        parts = {int(e["metrics"]["accumulation"]) for e in told if "accumulation" in e["metrics"]}
        hyper = dict(self.evolution.proposals[number].genome.hyper)
        return {**hyper, "accumulation": max(parts)} if parts else hyper
