"""The search as a whole, without its runner: evolution, journal, budget, winner.

Whoever runs trials asks `next_proposal` and reports to `finished`; every ask and every outcome is in
the journal before it has an effect, so that kill -9 loses only trials in flight.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path

from dmi_hpc.config import Recipe, TrainConfig
from dmi_hpc.data.manifest import require_identity
from dmi_hpc.errors import RunError
from dmi_hpc.files import write_json
from dmi_hpc.models.space import HyperValue, SearchSpace
from search.evolve import Evolution, EvolutionConfig, Failure, Proposal, SpaceExhausted
from search.genome import Genome, decode, to_json
from search.journal import Journal, replay
from search.networks import Networks
from search.trial import TrialOutcome

LOSSES = 2  # of its worker, until a network counts as the cause


@dataclass
class Progress:
    """Counts for the terminal. Worker seconds are of this session, without resumed history."""

    budget: int
    workers: int = 1
    finished: int = 0
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
        if not self.session_finished:
            return None
        return self.elapsed_s / self.session_finished * (self.budget - self.finished)


class Driver:
    """One search in `folder`: new, or continued from its journal."""

    def __init__(self, recipe: Recipe, space: SearchSpace, folder: Path, *, data: str = "") -> None:
        """data: identity of the shard set; DataError if the journal is of another one.

        Nothing is written before `start`.
        """
        search = recipe.search
        self.space, self.folder, self._limit_s = space, folder, search.time_limit_s
        self.evolution = Evolution(
            Networks(space, founder_defaults(space, recipe.train), max_flops=search.max_flops),
            EvolutionConfig(
                seed=recipe.seed,
                population=search.population,
                initial=search.initial,
                surrogate=search.surrogate,
            ),
        )
        self.progress = Progress(search.evaluations)
        self._losses: Counter[int] = Counter()
        self._data = data
        self._pending: deque[Proposal[Genome]] = deque()
        self._asked = 0
        self.journal = Journal(folder / "journal.jsonl")
        if self.journal.path.exists():
            self.journal = Journal.open(self.journal.path)
            recorded = self.journal.header().get("config", {}).get("data", "")
            require_identity(recorded, data, maker=f"{self.journal.path}")
            self._pending.extend(replay(self.journal, self.evolution))
        told = self.evolution.outcomes.values()
        self._asked = self.progress.finished = len(told)
        self.progress.failures.update(o.kind for o in told if isinstance(o, Failure))
        self._exhausted = False

    def start(self, workers: int, trial_memory_GB: float) -> None:
        """Begin a session: the journal's header, or a resume, with what this machine has."""
        facts = {"workers": workers, "trial_memory_GB": trial_memory_GB}
        if self.journal.path.exists():
            self.journal.resumed(facts)
        else:
            facts_and_data = {**facts, "data": self._data}
            self.journal = Journal.create(self.journal.path, self.evolution, facts_and_data)
        self.progress.workers = workers

    @property
    def out_of_time(self) -> bool:
        return self._limit_s is not None and self.progress.elapsed_s > self._limit_s

    @property
    def done(self) -> bool:
        """Nothing is left to evaluate, or no time to do it."""
        p = self.progress
        if p.running:
            return False
        exhausted = self._exhausted and not self._pending
        return p.finished >= p.budget or self.out_of_time or exhausted

    def next_proposal(self) -> Proposal[Genome] | None:
        """The next network to evaluate: one that was interrupted first.

        None while there is none: for good if `done`, else until a running one is lost.
        """
        if self._asked >= self.progress.budget or self.out_of_time:
            return None
        proposal = self._pending.popleft() if self._pending else self._new()
        if proposal is not None:
            self._asked += 1
            self.progress.running += 1
        return proposal

    def _new(self) -> Proposal[Genome] | None:
        try:
            proposal = self.evolution.ask()
        except SpaceExhausted:
            self._exhausted = True
            return None
        self.journal.ask(proposal, to_json(proposal.genome))
        return proposal

    def finished(self, number: int, outcome: TrialOutcome) -> None:
        """Record the outcome of proposal `number`."""
        told = outcome.told
        self.journal.tell(number, told, outcome.seconds, outcome.metrics)
        self.evolution.tell(number, told)
        p = self.progress
        p.running, p.finished, p.session_finished = (
            p.running - 1,
            p.finished + 1,
            p.session_finished + 1,
        )
        p.busy_s += outcome.seconds
        if isinstance(told, Failure):
            p.failures[told.kind] += 1

    def lost(self, number: int, failure: Failure, seconds: float) -> None:
        """The worker of proposal `number` died. The first time it is asked again, under its number:
        the machine is as likely a culprit as the network."""
        self._losses[number] += 1
        if self._losses[number] >= LOSSES:
            self.finished(number, TrialOutcome(failure, seconds, {}))
        else:
            self.again(number)

    def again(self, number: int) -> None:
        """Proposal `number` was not evaluated, through no fault of its own: it is the next one."""
        self._pending.appendleft(self.evolution.proposals[number])
        self._asked -= 1
        self.progress.running -= 1

    def write_winner(self) -> Path:
        """winner.json: the best network and its hyper-parameters. RunError if every trial failed."""
        best = self.evolution.best()
        if best is None:
            kinds = ", ".join(f"{n} {kind}" for kind, n in self.progress.failures.items())
            raise RunError(
                f"{self.journal.path}: no network could be evaluated ({kinds}); the journal holds the "
                "message of each"
            )
        number, fitness = best
        proposal = self.evolution.proposals[number]
        path = self.folder / "winner.json"
        write_json(
            path,
            {
                "id": number,
                "fitness": fitness,
                "origin": proposal.origin,
                "parents": list(proposal.parents),
                "genome": to_json(proposal.genome),
                "network": decode(proposal.genome, self.space.network).model_dump(mode="json"),
                "hyper": dict(proposal.genome.hyper),
                "data": self._data,
            },
        )
        return path


def founder_defaults(space: SearchSpace, train: TrainConfig) -> dict[str, HyperValue]:
    """What a founder uses for the hyper-parameters it leaves open: the recipe's [train]."""
    known = train.model_dump()
    unknown = sorted(set(space.hyper) - set(known))
    if unknown:
        raise RunError(
            f"the task's search space varies {', '.join(unknown)}, which [train] does not have; "
            f"valid names: {', '.join(sorted(known))}"
        )
    return {name: known[name] for name in space.hyper}
