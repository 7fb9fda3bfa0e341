"""The append-only record of a search; reading it again is how a search resumes.

One JSON object per line: a header, then every ask before its evaluation starts, every tell after it
ended, and every resume. Lines are on disk before the search goes on, so that no finished evaluation
is ever repeated. A line torn by a crash costs itself alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from dmi_hpc.errors import FormatVersionError, RunError
from dmi_hpc.files import append_json_line, read_json_lines, write_text, writing
from search.evolve import Evolution, Failure, Outcome, Proposal, Success, checked

VERSION = 1
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
        "time": time.time(),
    }


class Journal:
    """The journal file at `path`; made by `create` or `open`."""

    def __init__(self, path: Path) -> None:
        self.path = path

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
        with writing(path.parent):
            write_text(path, json.dumps(first, separators=(",", ":"), allow_nan=False) + "\n")
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> Journal:
        """An existing journal.

        Raises RunError if it is missing or has no header, FormatVersionError if it is newer.
        """
        journal = cls(path)
        version = journal.header()["version"]
        if version > VERSION:
            raise FormatVersionError(
                f"{path}: journal version {version}, this program reads up to {VERSION}: "
                "use a newer DMI-HPC"
            )
        return journal

    def header(self) -> dict[str, Any]:
        """The first event."""
        if not self.path.exists():
            raise RunError(f"{self.path}: no journal to resume: start the search without --resume")
        with self.path.open("rb") as stream:
            line = stream.readline()
        try:
            first = json.loads(line)
            valid = first["event"] == "header" and isinstance(first["version"], int)
        except (ValueError, TypeError, KeyError):
            valid = False
        if not valid:
            raise RunError(f"{self.path}: the first line is not the header of a search journal")
        return dict(first)

    def require(self, evolution: Evolution[Any]) -> None:
        """Raises RunError naming what differs between this journal's search and `evolution`.

        The extra keys of the journal's ``config`` are not compared.
        """
        found, expected = self.header(), header(evolution)
        expected["config"] = {**found.get("config", {}), **expected["config"]}
        differences = [
            f"{name} is {was} in the journal and {now} now"
            for key in _IDENTITY
            for name, was, now in _differences(key, found.get(key), expected[key])
        ]
        if differences:
            raise RunError(
                f"{self.path}: this is the journal of another search: {'; '.join(differences)}. "
                "Resume with the recipe it was started with, or choose another run folder"
            )

    def ask(self, proposal: Proposal[Any], genome: Mapping[str, Any]) -> None:
        """Record a proposal, its genome as plain data; call before its evaluation starts."""
        self._append(
            "ask",
            id=proposal.id,
            genome=genome,
            hash=proposal.hash,
            origin=proposal.origin,
            parents=list(proposal.parents),
        )

    def tell(
        self,
        identifier: int,
        outcome: Outcome,
        seconds: float,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Record how an evaluation ended. metrics: plain data; what is not finite becomes null."""
        outcome = checked(outcome)
        if isinstance(outcome, Failure):
            result: dict[str, Any] = {
                "status": "failed",
                "failure": outcome.kind,
                "message": outcome.message,
                "traceback": outcome.traceback,
            }
        else:
            result = {"status": "ok", "fitness": outcome.fitness}
        self._append(
            "tell", id=identifier, **result, seconds=seconds, metrics=_finite(dict(metrics or {}))
        )

    def resumed(self, extra: Mapping[str, Any] | None = None) -> None:
        """Record that the search goes on after an interruption. extra: its ``config`` now."""
        self._append("resume", config=dict(extra or {}))

    def events(self) -> list[dict[str, Any]]:
        """All whole events in order."""
        return read_json_lines(self.path)

    def _append(self, event: str, **content: Any) -> None:
        record = {"event": event, "time": time.time(), **content}
        with writing(self.path.parent):
            append_json_line(self.path, record, durable=True)


def replay(journal: Journal, evolution: Evolution[Any]) -> list[Proposal[Any]]:
    """Bring a fresh `evolution` to where `journal` ended.

    Returns the proposals that have no outcome, oldest first: evaluate them again under the same id.
    A tell without its ask (whose line was torn) is ignored: its genome is unknown, and the same
    proposal will be made again. Raises RunError if the journal is another search's (see
    `Journal.require`) or was altered.
    """
    journal.require(evolution)
    for number, event in enumerate(journal.events()):
        try:
            _apply(event, evolution)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise RunError(
                f"{journal.path}: event {number + 1} cannot be replayed "
                f"({type(error).__name__}: {error}); was the file edited?"
            ) from error
    return evolution.pending()


def _apply(event: Mapping[str, Any], evolution: Evolution[Any]) -> None:
    if event["event"] == "ask":
        genome = evolution.space.from_json(event["genome"])
        identity = evolution.space.identity(genome)
        if event["id"] in evolution.proposals:
            raise RunError(f"proposal {event['id']} was asked twice: did two searches write here?")
        if identity != event["hash"]:
            raise RunError(f"genome {event['id']} has hash {identity}, recorded is {event['hash']}")
        parents = tuple(event["parents"])
        evolution.restore_ask(Proposal(event["id"], genome, event["origin"], parents, identity))
    elif event["event"] == "tell" and event["id"] in evolution.proposals:
        if event["id"] in evolution.outcomes:
            raise RunError(f"proposal {event['id']} was told twice: did two searches write here?")
        evolution.tell(event["id"], outcome_of(event))


def outcome_of(event: Mapping[str, Any]) -> Outcome:
    """The outcome in a ``tell`` event."""
    if event["status"] == "ok":
        return Success(float(event["fitness"]))
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
