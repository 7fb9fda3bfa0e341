"""Islands: searches of one run in several allocations, which learn from each other's journals.

Every island appends to its own journal alone and reads those of the others as they grow. What it
takes in is a tell of a foreign proposal, with an id below zero, and stands in its own journal as a
"migrant": to replay an island needs no other. Islands come and go at any time.

The time spent with reading is bounded, and so is what is taken in: everything at first, later at
most a multiple of what the island evaluates itself, the best first. Of the rest the outcomes are
kept in memory, so that none of them is evaluated again.
"""

from __future__ import annotations

import re
import time
from math import inf
from pathlib import Path
from typing import Any

import xxhash

from dmi_hpc.errors import TRANSIENT, DMIError, RunError
from search.evolution.evolve import Proposal, Success
from search.evolution.fidelity import Halving
from search.records.history import MAIN, Evaluation, Reader, journals
from search.records.journal import Journal, adopt, outcome_fields

POLL_S = 1.0
POLL_SHARE = 0.01  # of an island's time, at most, for a look at the others
FREE_MIGRANTS = 1000
MIGRANTS_PER_OWN = 2
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")


def require_name(island: str) -> None:
    """Raises RunError for what is no name of an island."""
    if island == MAIN or not _NAME.fullmatch(island):
        raise RunError(
            f"--island {island}: expected a name of letters, digits, '.', '_' and '-', other than "
            f"'{MAIN}' (the search without --island); e.g. --island $SLURM_ARRAY_TASK_ID"
        )


def island_seed(seed: int, island: str) -> int:
    """Seed of an island: each draws its own random numbers."""
    return seed if island == MAIN else xxhash.xxh3_64_intdigest(f"{seed}/{island}".encode()) >> 1


class Islands:
    """The other searches of a run. `refused`: journals that are not taken note of, and why."""

    def __init__(
        self, search: Path, name: str, halving: Halving[Any], data: str, rungs: list[Any]
    ) -> None:
        """search: ``RUN/search``; data: identity of the shard set; rungs: as in the journal's header."""
        self.refused: dict[str, str] = {}
        self.networks: set[str] = set()  # evaluated elsewhere, as far as is known: hashes
        self._search, self._name, self._data, self._rungs = search, name, data, rungs
        self._halving, self._evolution = halving, halving.evolution
        self._space = self._evolution.space.fingerprint()
        self._readers: dict[str, Reader] = {}
        self._fresh: dict[str, Evaluation] = {}  # by hash: read, and not yet judged
        self._known: dict[str, Evaluation] = {}  # by hash: not taken in
        self._risen: list[Evaluation] = []  # at higher rungs: read, and not yet judged
        self._due = 0.0

    def poll(self) -> None:
        """Read what the other journals gained, unless that was done a moment ago."""
        began = time.monotonic()
        if began < self._due:
            return
        for name, path in journals(self._search).items():
            if name != self._name and name not in self.refused:
                self._read(self._readers.setdefault(name, Reader(name, path)))
        now = time.monotonic()
        self._due = now + max(POLL_S, (now - began) / POLL_SHARE)

    def _read(self, reader: Reader) -> None:
        try:
            found = reader.poll()
        except OSError:  # a network file system has such moments: the next poll is soon
            return
        except DMIError as error:
            self.refused[reader.island] = str(error)
            return
        if reader.header and (reason := self._foreign(reader)):
            self.refused[reader.island] = f"{reader.path}: {reason}; its results are not used here"
            return
        for evaluation in found:
            self.networks.add(evaluation.hash)
            if evaluation.rung:
                self._risen.append(evaluation)
            elif evaluation.failure not in TRANSIENT:  # they say nothing about a network
                self._fresh.setdefault(evaluation.hash, evaluation)

    def _foreign(self, reader: Reader) -> str:
        """Why the results of another journal cannot be compared with ours; empty if they can."""
        if reader.space != self._space:
            return "its search space is another one"
        if reader.header["config"].get("data", "") != self._data:
            return "it was made with another data set"
        if reader.header["config"].get("rungs", []) != self._rungs:
            return "its trials pause at other rungs"
        return ""

    def exchange(self, journal: Journal) -> None:
        """Take in what is new elsewhere. Each is in `journal` before it has an effect."""
        self.poll()
        if self._fresh:
            self._exchange(journal)
        if self._risen:
            numbers = {p.hash: p.id for p in self._evolution.proposals.values() if p.id < 0}
            for evaluation in self._risen:
                self._let_rise(numbers.get(evaluation.hash), evaluation, journal)
            self._risen = []

    def _exchange(self, journal: Journal) -> None:
        proposals = self._evolution.proposals
        mine = {proposal.hash for proposal in proposals.values()}
        taken = max(0, -min(proposals, default=0))
        own = sum(number >= 0 for number in self._evolution.outcomes)
        room = FREE_MIGRANTS + MIGRANTS_PER_OWN * own - taken
        new = [e for e in self._fresh.values() if e.hash not in mine and e.hash not in self._known]
        for number, evaluation in enumerate(selected(new, room), taken + 1):
            self._take_in(-number, self._fresh.pop(evaluation.hash), journal)
        self._known |= self._fresh
        self._fresh = {}

    def _take_in(self, number: int, evaluation: Evaluation, journal: Journal) -> None:
        space = self._evolution.space
        try:
            genome = space.from_json(evaluation.genome)
            identity = space.identity(genome)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            identity = f"none ({type(error).__name__}: {error})"
        if identity != evaluation.hash:
            self.refused[evaluation.island] = (
                f"genome {evaluation.name} has hash {identity}, recorded is {evaluation.hash}: made by "
                "another DMI-HPC? Results of this island are not used here any more"
            )
            return
        source = {"island": evaluation.island, "id": evaluation.id}
        result = outcome_fields(evaluation.outcome)
        journal.record(
            "migrant",
            id=number,
            **{"from": source},
            genome=evaluation.genome,
            hash=evaluation.hash,
            curve=list(evaluation.curve),
            **result,
        )
        proposal = Proposal(number, genome, "migrant", (), evaluation.hash)
        adopt(self._evolution, proposal, evaluation.outcome)
        self._halving.migrated(number, 0, evaluation.outcome, evaluation.curve)

    def _let_rise(self, number: int | None, evaluation: Evaluation, journal: Journal) -> None:
        """A migrant came to its next rung: its error there counts among those of our own trials."""
        if number is None or not isinstance(evaluation.outcome, Success):
            return
        if self._halving.rungs.reached(number) != evaluation.rung - 1:  # another island was first
            return
        result, curve = outcome_fields(evaluation.outcome), list(evaluation.curve)
        journal.record("risen", id=number, rung=evaluation.rung, curve=curve, **result)
        self._halving.migrated(number, evaluation.rung, evaluation.outcome, curve)

    def known(self, identity: str) -> Evaluation | None:
        """The evaluation of this genome elsewhere, if there was one."""
        return self._known.get(identity)


def selected(evaluations: list[Evaluation], room: int) -> list[Evaluation]:
    """At most `room` of them, the fittest, in the order in which they ended."""

    def merit(evaluation: Evaluation) -> float:
        return inf if evaluation.fitness is None else evaluation.fitness

    best = sorted(evaluations, key=merit)[: max(0, room)]
    return sorted(best, key=lambda evaluation: evaluation.told)
