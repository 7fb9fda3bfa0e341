"""PBS Professional and OpenPBS, by their commands."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dmi_hpc.errors import LaunchError
from launch.scheduler import Caller, Details, JobState, Phase, job_argument

SILENT = (
    r"[Cc]annot connect to|[Cc]onnection (refused|timed out|reset)|Communication failure"
    r"|[Tt]imed out|No default server|server is (down|shutting)|no answer within"
)
HINTS: Mapping[str, str] = {
    r"queue": "Name a queue that is open to you (-p); qstat -Q lists them",
    r"account|allocation|project": "Name a project of yours (-A)",
    r"exceeds|resource|select": (
        "Ask for less time or fewer nodes (-t, -N): qstat -Qf shows the limits of the queues"
    ),
    r"limit": "Your limits are reached: wait until other jobs have ended (qstat -u $USER)",
    r"depend": "The job to wait for is unknown (--after)",
    r"Unauthorized|not authorized|[Pp]ermission": "It is not your job, or this is not yours to do",
}
_PHASES: Mapping[str, Phase] = {
    "Q": "queued",
    "H": "queued",
    "W": "queued",
    "T": "queued",
    "B": "running",
    "R": "running",
    "S": "running",
    "U": "running",
    "E": "ending",
}
_CANCELLED = 271  # Exit_status of a job that qdel ended: 256 + SIGTERM


class PBS:
    """See launch.scheduler.Scheduler."""

    name = "pbs"

    def __init__(self, patience_s: float) -> None:
        self._call = Caller(patience_s, SILENT, HINTS)

    def submit(
        self, script: Path, *, cwd: Path, after: str | None = None, array: str | None = None
    ) -> str:
        options = ["-W", f"depend=afterany:{job_argument(after)}"] if after else []
        options += ["-J", array] if array is not None else []
        # not asked twice: a submission without an answer may have been heard
        words = ["qsub", *options, str(script)]
        return self._call(*words, env=os.environ, cwd=cwd, again=False).strip()

    def states(self, jobs: Sequence[str]) -> dict[str, JobState]:
        found: dict[str, JobState] = {}
        for job in jobs:
            for name, entry in self._jobs(job).items():
                found[name] = job_state(name, entry)
        return found

    def details(self, job: str) -> Details:
        entries = self._jobs(job)
        if not entries:
            return Details(job, "unknown", "UNKNOWN")
        return job_details(job, next(iter(entries.values())))

    def _jobs(self, job: str) -> dict[str, Any]:
        """By id; {} if the server has forgotten it."""
        try:
            text = self._ask("qstat", "-x", "-t", "-f", "-F", "json", job_argument(job))
        except LaunchError as error:
            if re.search(r"Unknown Job|does not exist|has finished", str(error), re.I):
                return {}
            raise
        return dict(parsed(text, "qstat").get("Jobs", {}))

    def cancel(self, job: str) -> None:
        try:
            self._ask("qdel", job_argument(job))
        except LaunchError as error:
            if not re.search(r"Unknown Job|has finished", str(error), re.I):
                raise

    def requeue(self, job: str) -> None:
        self._ask("qrerun", job_argument(job))

    def release(self, job: str) -> None:
        self._ask("qrls", job_argument(job))

    def lost(self, nodes: Sequence[str]) -> tuple[str, ...]:
        if not nodes:
            return ()
        short = {node.partition(".")[0]: node for node in nodes}
        found = parsed(self._ask("pbsnodes", "-F", "json", *short), "pbsnodes").get("nodes", {})
        states = {
            name.partition(".")[0]: str(entry.get("state", "")) for name, entry in found.items()
        }
        return tuple(
            node
            for name, node in short.items()
            if re.search(r"down|unknown|offline|unresolvable", states.get(name, "down"))
        )

    def hostnames(self, nodes: str) -> tuple[str, ...]:
        return hosts(nodes)

    def _ask(self, *arguments: str) -> str:
        return self._call(*arguments, env={**os.environ, "TZ": "UTC", "LC_ALL": "C"})


def parsed(text: str, command: str) -> dict[str, Any]:
    """Pure: JSON of PBS, which leaves control characters in it."""
    try:
        found = json.loads(text, strict=False)
    except json.JSONDecodeError as error:
        raise LaunchError(f"{command} -F json: not understood: {error}") from None
    if not isinstance(found, dict):
        raise LaunchError(f"{command} -F json: expected an object, found {text[:100]!r}")
    return found


def job_state(job: str, entry: Mapping[str, Any]) -> JobState:
    """Pure: an entry of `qstat -f -F json`."""
    words = str(entry.get("job_state", "?"))
    wanted = entry.get("Resource_List", {})
    return JobState(
        job=job,
        phase=_PHASES.get(words, "ended"),
        words=words,
        reason=str(entry.get("comment", "")) if _PHASES.get(words) == "queued" else "",
        start=_epoch(entry.get("stime") or entry.get("estimated", {}).get("start_time")),
        nodes=int(wanted.get("nodect", 0)),
    )


def job_details(job: str, entry: Mapping[str, Any]) -> Details:
    """Pure: see `job_state`."""
    state = job_state(job, entry)
    limit = _seconds(str(entry.get("Resource_List", {}).get("walltime", "")))
    runs = state.phase in ("running", "ending")
    known = runs and state.start is not None and limit is not None
    return Details(
        job=job,
        phase=state.phase,
        words=state.words,
        reason=state.reason,
        end=(state.start or 0) + (limit or 0) if known else None,
        time_limit_s=limit,
        nodes=hosts(str(entry.get("exec_host", ""))) if runs else (),
        restarts=max(0, int(entry.get("run_count", 1)) - 1),
        cancelled=state.phase == "ended" and entry.get("Exit_status") == _CANCELLED,
    )


def hosts(text: str) -> tuple[str, ...]:
    """Pure: of exec_host, "node1/0*64+node2/0*64"."""
    return tuple(dict.fromkeys(part.partition("/")[0] for part in text.split("+") if part))


def _epoch(value: Any) -> float | None:
    """Of a time as PBS prints it in UTC, or of epoch seconds."""
    if isinstance(value, int | float):
        return float(value)
    try:
        found = datetime.strptime(str(value), "%a %b %d %H:%M:%S %Y")
    except ValueError:
        return None
    return found.replace(tzinfo=UTC).timestamp()


def _seconds(text: str) -> float | None:
    match = re.fullmatch(r"(\d+):(\d+):(\d+)", text)
    if match is None:
        return None
    hours, minutes, seconds = map(int, match.groups())
    return float((hours * 60 + minutes) * 60 + seconds)
