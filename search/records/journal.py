"""The append-only record of a search; reading it again is how a search resumes.

One checksummed JSON object per line (see ``search.records.lines``): a header, then every ask before its
evaluation starts, every tell after it ended, migrants from other islands, and the sessions. Lines are
on disk before the search goes on, so that no finished evaluation is ever repeated. A damaged line
costs itself alone. Journals of version 1 have no checksums, and are read and continued all the same.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from dmi_hpc.errors import FormatVersionError, RunError
from dmi_hpc.files import atomic_file, writing
from search.base import Space
from search.evolution.evolve import Evolution, Failure, Outcome, Proposal, Success, checked
from search.evolution.fidelity import Halving, Rungs
from search.records.lines import Appender, decode, encode, read_lines
from search.records.provenance import code_version, process

VERSION = 2
UNSIGNED = 1  # the last version whose lines have no checksum
_IDENTITY = ("seed", "space", "config")


def header(evolution: Evolution[Any], extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """First event of the journal of `evolution`. extra: more keys for its ``config``."""
    config = {**evolution.config.model_dump(mode="json", exclude={"seed"}), **(extra or {})}
    return {
        "event": "header",
        "version": VERSION,
        "seed": evolution.config.seed,
        "space": evolution.space.fingerprint(),
        "config": json.loads(json.dumps(config)),
        "code": code_version(),
        "process": process(),
        "time": time.time(),
    }


def header_of(line: bytes, path: Path) -> dict[str, Any]:
    """The header in the first line of the journal at `path`.

    Raises RunError if it is none or damaged, FormatVersionError if it is of a newer version.
    """
    first = decode(line, unsigned=True)
    if not first or first.get("event") != "header" or not isinstance(first.get("version"), int):
        raise RunError(
            f"{path}: the first line is not the header of a search journal, or is damaged"
        )
    if first["version"] > VERSION:
        raise FormatVersionError(
            f"{path}: journal version {first['version']}, this program reads up to {VERSION}: "
            "use a newer DMI-HPC"
        )
    if first["version"] > UNSIGNED and decode(line) is None:
        raise RunError(f"{path}: the header in the first line is damaged: its checksum is missing")
    return first


class Journal:
    """The journal file at `path`; made by `create` or `open`. `damaged`: lines that were passed
    over when `events` was called last."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damaged: tuple[int, ...] = ()
        self._appender = Appender(path)

    @classmethod
    def create(
        cls, path: Path, evolution: Evolution[Any], extra: Mapping[str, Any] | None = None
    ) -> Journal:
        """Start the journal of a fresh `evolution`. Raises RunError if there is one already.

        extra: more keys for the ``config`` of the header.
        """
        if path.exists():
            raise RunError(
                f"{path}: a search is recorded here already: resume it or choose another"
            )
        first = header(evolution, extra)
        with writing(path.parent), atomic_file(path) as temp:
            temp.write_bytes(encode(first))
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> Journal:
        """An existing journal.

        Raises RunError if it is missing or has no header, FormatVersionError if it is newer.
        """
        journal = cls(path)
        journal.header()
        return journal

    def header(self) -> dict[str, Any]:
        """The first event."""
        if not self.path.exists():
            raise RunError(f"{self.path}: no journal to resume: start the search without --resume")
        with self.path.open("rb") as stream:
            return header_of(stream.readline().rstrip(b"\n"), self.path)

    def ask(self, proposal: Proposal[Any], genome: Mapping[str, Any], **more: Any) -> None:
        """Record a proposal, its genome as plain data; call before its evaluation starts.

        more: further keys, plain data.
        """
        if proposal.predicted is not None:
            more["predicted"] = proposal.predicted
        self.record(
            "ask",
            id=proposal.id,
            genome=genome,
            hash=proposal.hash,
            origin=proposal.origin,
            parents=list(proposal.parents),
            **more,
        )

    def tell(
        self,
        identifier: int,
        outcome: Outcome,
        seconds: float,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Record how an evaluation ended. metrics: plain data; what is not finite becomes null."""
        result = outcome_fields(checked(outcome))
        plain = _finite(dict(metrics or {}))
        self.record("tell", id=identifier, **result, seconds=seconds, metrics=plain)

    def resumed(self, extra: Mapping[str, Any] | None = None) -> None:
        """Record that the search goes on after an interruption. extra: its ``config`` now."""
        self.record("resume", config=dict(extra or {}), code=code_version(), process=process())

    def record(self, event: str, **content: Any) -> None:
        """Append any other event; a replay passes over kinds that it does not know."""
        with writing(self.path.parent):
            self._appender.append({"event": event, "time": time.time(), **content})

    def events(self) -> list[dict[str, Any]]:
        """All whole events in order."""
        if not self.path.exists():
            return []
        lines = read_lines(self.path, unsigned=self.header()["version"] <= UNSIGNED)
        self.damaged = lines.damaged
        return list(lines.records)


def replay(
    journal: Journal,
    evolution: Evolution[Any],
    *,
    halving: Halving[Any] | None = None,
    larger_space: bool = False,
) -> list[Proposal[Any]]:
    """Bring a fresh `evolution` to where `journal` ended.

    Returns the proposals that have no outcome, oldest first: evaluate them again under the same id.
    A tell without its ask (whose line was torn) is ignored: its genome is unknown, and the same
    proposal will be made again. halving: of this evolution, if trials pause at rungs; what is to do
    then is its `pending`. larger_space: the space may be another one, if all genomes of the
    journal are valid in it. Raises RunError if the journal is another search's (naming what
    differs) or was altered.
    """
    events = journal.events() or [journal.header()]
    moved = _require(journal.path, events, evolution, larger_space)
    validity = _Validity(evolution.space) if moved else None
    halving = halving or Halving(evolution, Rungs((1.0,)))
    for number, event in enumerate(events):
        try:
            _apply(event, halving, validity if number < moved else None)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise RunError(
                f"{journal.path}: event {number + 1} cannot be replayed "
                f"({type(error).__name__}: {error}); was the file edited?"
            ) from error
    if moved == len(events):
        journal.record("extend", space=evolution.space.fingerprint())
    return [proposal for proposal in evolution.pending() if proposal.id >= 0]


def _require(
    path: Path, events: Sequence[Mapping[str, Any]], evolution: Evolution[Any], larger: bool
) -> int:
    """Raises RunError naming what differs between the journal's search and `evolution`.

    The constants in ``config`` are compared if the same code wrote the journal: another one may have
    others. Returns the number of events from the beginning that are of an older, smaller space.
    """
    found, expected = dict(events[0]), header(evolution)
    recorded = found.get("config", {})
    same_code = found.get("code") == expected["code"]
    expected["config"] = {**recorded, **(expected["config"] if same_code else {})}
    moved = 0
    for number, event in enumerate(events):
        if event.get("event") == "extend" and "space" in event:
            found["space"], moved = event["space"], number
    if larger and found["space"] != expected["space"]:
        found["space"], moved = expected["space"], len(events)
    differences = [
        f"{name} is {was} in the journal and {now} now"
        for key in _IDENTITY
        for name, was, now in _differences(key, found.get(key), expected[key])
    ]
    if differences:
        space = found["space"] != expected["space"]
        hint = " (a space that contains the old one: --larger-space)" if space else ""
        raise RunError(
            f"{path}: this is the journal of another search: {'; '.join(differences)}. Resume with "
            f"the recipe it was started with{hint}, or choose another run folder"
        )
    return moved


class _Validity:
    """Whether genomes of an older space can be bred and ranked in `space`."""

    def __init__(self, space: Space[Any]) -> None:
        self._space, self._rng = space, np.random.default_rng(0)
        self._width = space.features([space.random(self._rng)]).shape[1]

    def require(self, genome: Any, where: str) -> None:
        """Raises RunError if not."""
        try:
            features = self._space.features([genome])
            self._space.mutated(genome, self._rng)
            self._space.affordable(genome)
            valid = features.shape == (1, self._width) and bool(np.isfinite(features).all())
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise self._error(where, f"{type(error).__name__}: {error}") from error
        if not valid:
            raise self._error(where, f"features of shape {features.shape}, or not finite")

    def _error(self, where: str, reason: str) -> RunError:
        return RunError(
            f"{where} is not valid in the new space ({reason}): only a space that contains the old "
            "one can go on. Begin a new run, with its best networks as founders: --from RUN"
        )


def _apply(event: Mapping[str, Any], halving: Halving[Any], validity: _Validity | None) -> None:
    kind, evolution = event["event"], halving.evolution
    if kind in ("ask", "migrant") and event["id"] in evolution.proposals:
        raise RunError(f"proposal {event['id']} was asked twice: did two searches write here?")
    if kind == "ask":
        halving.restore_ask(_proposal(event, event["origin"], evolution.space, validity))
    elif kind == "tell" and event["id"] in evolution.proposals:
        if not halving.is_running(event["id"]):
            raise RunError(f"proposal {event['id']} was told twice: did two searches write here?")
        metrics = event.get("metrics", {})
        waits = "evaluated_as" not in metrics
        halving.tell(event["id"], outcome_of(event), metrics.get("curve", ()), waits=waits)
    elif kind == "promote" and event["id"] in evolution.proposals:
        halving.restore_promotion(event["id"], event["rung"])
    elif kind == "migrant":
        adopt(evolution, _proposal(event, "migrant", evolution.space, validity), outcome_of(event))
        halving.migrated(event["id"], 0, outcome_of(event), event.get("curve", ()))
    elif kind == "risen" and event["id"] in evolution.proposals:
        halving.migrated(event["id"], event["rung"], outcome_of(event), event["curve"])


def _proposal(
    event: Mapping[str, Any], origin: str, space: Space[Any], validity: _Validity | None
) -> Proposal[Any]:
    genome = space.from_json(event["genome"])
    if validity is not None:
        validity.require(genome, f"genome {event['id']}")
    identity = space.identity(genome)
    # what is one and the same may be drawn otherwise in a larger space
    if validity is None and identity != event["hash"]:
        raise RunError(f"genome {event['id']} has hash {identity}, recorded is {event['hash']}")
    parents, predicted = tuple(event.get("parents", ())), event.get("predicted")
    return Proposal(event["id"], genome, origin, parents, identity, predicted)


def adopt(evolution: Evolution[Any], migrant: Proposal[Any], outcome: Outcome) -> None:
    """Take in what another search has evaluated. Its id is negative: it can meet no own one."""
    assert migrant.id < 0, f"a migrant's id is negative, found {migrant.id}"
    evolution.restore_ask(migrant)
    evolution.tell(migrant.id, outcome)


def outcome_fields(outcome: Outcome) -> dict[str, Any]:
    """`outcome` as plain data, read back by `outcome_of`."""
    if isinstance(outcome, Failure):
        return {
            "status": "failed",
            "failure": outcome.kind,
            "message": outcome.message,
            "traceback": outcome.traceback,
        }
    others = {"others": list(outcome.others)} if outcome.others else {}
    return {"status": "ok", "fitness": outcome.fitness, **others}


def outcome_of(event: Mapping[str, Any]) -> Outcome:
    """The outcome in a ``tell`` or ``migrant`` event."""
    if event["status"] == "ok":
        return Success(float(event["fitness"]), tuple(map(float, event.get("others", ()))))
    return Failure(event["failure"], event["message"], event["traceback"])


def _differences(key: str, was: Any, now: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(was, dict) and isinstance(now, dict):
        names = sorted(set(was) | set(now))
        pairs = [(f"{key}.{n}", was.get(n, "absent"), now.get(n, "absent")) for n in names]
        return [pair for pair in pairs if pair[1] != pair[2]]
    return [(key, was, now)] if was != now else []


def _finite(value: Any) -> Any:
    """Plain data with numbers that JSON does not know replaced by null."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
