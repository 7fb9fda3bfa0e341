"""Slurm, 22.05 and later, by its commands. Needs no accounting database (sacct)."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from dmi_hpc.errors import LaunchError
from launch.scheduler import Caller, Details, JobState, Phase, Unreachable, job_argument

# slurm_strerror of what is no refusal: nobody was there to refuse
SILENT = (
    r"Unable to contact slurm controller|Socket timed out|Zero Bytes were transmitted"
    r"|Connection (refused|timed out|reset)|Transport endpoint is not connected"
    r"|standby mode|temporarily unable to accept|Resource temporarily unavailable"
    r"|Communication connection failure|Unable to connect|no answer within"
)
# ... and not even the question can have arrived
_NOT_SENT = r"Unable to contact slurm controller|Connection refused|standby mode"

HINTS: Mapping[str, str] = {
    r"job submit limit|maxsubmit|size and/or time|job violates": (
        "Your limits are reached: wait until other jobs have ended (squeue --me), or ask for less"
    ),
    r"invalid partition": "Name one of yours (-p); sinfo lists them",
    r"account": "Name an account of yours (-A); your project's page, or sacctmgr show assoc, tells",
    r"qos": "Name a quality of service that your account may use (-q)",
    r"reservation": "Name a reservation that runs (--reservation), or leave it out",
    r"invalid feature": "Name a kind of nodes that this machine has (-C); sinfo -o %f lists them",
    r"time limit": "Ask for less time (-t): a chained job goes on by itself",
    r"node count|more processors|node configuration": (
        "Ask for fewer nodes (-N), or for what its nodes have: dmi launch --dry-run prints all that is "
        "asked for, sinfo -o '%P %D %c %G' what there is"
    ),
    r"dependency": "The job to wait for is unknown: squeue --me lists yours (--after)",
    r"memory": "Ask for less memory (--option --mem=...)",
    r"access|permission denied": "It is not your job, or the queue is not open to you",
}
# why a job waits that waits for ever
HOPELESS: Mapping[str, str] = {
    r"PartitionConfig|PartitionNodeLimit": (
        "Ask for fewer nodes (-N), or for nodes as the partition has: sinfo -o '%P %D %c %G' lists them"
    ),
    r"PartitionTimeLimit": "Ask for less time (-t): a chained job goes on by itself",
    r"BadConstraints": "No node is as asked for: sinfo -o '%P %D %c %G %f' lists what there is",
    r"AccountNotAllowed|InvalidAccount": "Name an account of yours (-A), or another partition (-p)",
    r"QOSNotAllowed|InvalidQOS": "Name a quality of service that your account may use (-q)",
    r"DependencyNeverSatisfied": "The job to wait for cannot end as asked",
    r"(QOS|Assoc)\w*Max\w*PerJob": "The limit of your account for one job: ask for less (-N, -t)",
}

_PHASES: Mapping[str, Phase] = {
    "PENDING": "queued",
    "REQUEUED": "queued",
    "REQUEUE_HOLD": "queued",
    "REQUEUE_FED": "queued",
    "SPECIAL_EXIT": "queued",
    "RESV_DEL_HOLD": "queued",
    "CONFIGURING": "running",
    "RUNNING": "running",
    "RESIZING": "running",
    "SIGNALING": "running",
    "SUSPENDED": "running",
    "STOPPED": "running",
    "STAGE_OUT": "ending",
    "COMPLETING": "ending",
}
# variables of sbatch that are not called as the option
_SBATCH_NAMES = {"time": "TIMELIMIT", "array": "ARRAY_INX"}
SKEW_S = 5.0  # of the controller's clock
_AT_ONCE = 1000  # nodes in one argument, which Linux limits to 128 KiB
_QUEUE_FORMAT = "%i|%T|%S|%D|%r"


# not "now": nodes take a job that starts in the second of its requeue for the one they have just ended
SOON = "StartTime=now+5"


class Slurm:
    """See launch.scheduler.Scheduler."""

    name = "slurm"

    def __init__(self, patience_s: float) -> None:
        self._call = Caller(patience_s, SILENT, HINTS)

    def submit(
        self, script: Path, *, cwd: Path, after: str | None = None, array: str | None = None
    ) -> str:
        options = [f"--dependency=afterany:{job_argument(after)}"] if after else []
        options += [f"--array={array}"] if array is not None else []
        job = self._submitted([*options, "--", str(script)], script, cwd)
        details = self.details(job)
        for pattern, hint in HOPELESS.items():
            if details.phase == "queued" and re.search(pattern, details.reason):
                self.cancel(job)
                raise LaunchError(
                    f"Slurm took the job but would never start it ({details.reason}), so it was "
                    f"cancelled. {hint}"
                )
        return job

    def _submitted(self, arguments: Sequence[str], script: Path, cwd: Path) -> str:
        """A submission without an answer may have been heard: it is looked for before the next."""
        began = time.time()
        until = self._call.clock() + self._call.patience_s
        env = submit_environment(os.environ, script)
        while True:
            try:
                words = ["sbatch", "--parsable", *arguments]
                return self._call(*words, env=env, cwd=cwd, again=False).strip().split(";")[0]
            except Unreachable as error:
                if not re.search(_NOT_SENT, str(error)):
                    heard = self._heard(script, began)
                    if heard is not None:
                        return heard
                if self._call.clock() > until:
                    raise
                self._call.sleep(2.0)

    def _heard(self, script: Path, since: float) -> str | None:
        """The job of this script that was submitted lately."""
        found = self._ask("squeue", "--me", "--noheader", "--states=all", "--format=%F|%V|%o")
        for line in found.splitlines():
            job, submitted, command = line.split("|", 2)
            if command.strip() == str(script) and (_epoch(submitted) or 0) >= since - SKEW_S:
                return job
        return None

    def states(self, jobs: Sequence[str]) -> dict[str, JobState]:
        if not jobs:
            return {}
        ids = ",".join(job_argument(job) for job in jobs)
        options = ("--noheader", "--array", "--states=all", f"--format={_QUEUE_FORMAT}")
        try:
            found = self._ask("squeue", *options, f"--jobs={ids}")
        except LaunchError as error:
            if "Invalid job id" in str(error):
                return {}
            raise
        return {state.job: state for state in map(queue_line, found.splitlines())}

    def details(self, job: str) -> Details:
        try:
            text = self._ask("scontrol", "show", "job", job_argument(job))
        except LaunchError as error:
            if "Invalid job id" in str(error):
                return Details(job, "unknown", "UNKNOWN")
            raise
        found, nodes = job_details(job, text)
        return found if not nodes else _with_nodes(found, self.hostnames(nodes))

    def cancel(self, job: str) -> None:
        self._ask("scancel", job_argument(job))

    def requeue(self, job: str) -> None:
        try:
            self._ask("scontrol", "requeue", job_argument(job))
        except LaunchError:
            found = self.details(
                job
            )  # Slurm does it by itself after preemption or a node's failure
            if not found.requeued and found.phase != "queued":
                raise

    def release(self, job: str) -> None:
        self._ask("scontrol", "update", f"JobId={job_argument(job)}", SOON)

    def lost(self, nodes: Sequence[str]) -> tuple[str, ...]:
        states: dict[str, str] = {}
        for i in range(0, len(nodes), _AT_ONCE):
            some = f"--nodes={','.join(nodes[i : i + _AT_ONCE])}"
            found = self._ask("sinfo", "--all", "--noheader", "--Node", some, "--format=%N %T")
            states |= dict(line.split(None, 1) for line in found.splitlines())
        # * : does not answer
        return tuple(n for n in nodes if re.match(r"down|fail|error|.*\*", states.get(n, "down")))

    def hostnames(self, nodes: str) -> tuple[str, ...]:
        return tuple(self._ask("scontrol", "show", "hostnames", nodes).split())

    def _ask(self, *arguments: str) -> str:
        return self._call(*arguments, env=query_environment(os.environ))


def query_environment(env: Mapping[str, str]) -> dict[str, str]:
    """Without the user's own habits of output; times are in UTC, which knows no summer time."""
    kept = {k: v for k, v in env.items() if not re.match(r"(SQUEUE|SINFO|SCANCEL|SCONTROL)_", k)}
    return {**kept, "SLURM_TIME_FORMAT": "standard", "TZ": "UTC", "LC_ALL": "C"}


def submit_environment(env: Mapping[str, str], script: Path) -> dict[str, str]:
    """What sbatch, and with it the new job, finds in its environment.

    Slurm lets a variable SBATCH_X overrule the script: here the script, which says what the user
    asked for, has the last word. Variables of the job around this process stay behind.
    """
    words = re.findall(r"^#SBATCH\s+--([a-z-]+)", script.read_text(encoding="utf-8"), re.MULTILINE)
    said = {f"SBATCH_{_SBATCH_NAMES.get(w, w.upper().replace('-', '_'))}" for w in words}
    said |= {"SBATCH_REQUEUE", "SBATCH_NO_REQUEUE"} if said & {"SBATCH_NO_REQUEUE"} else set()
    ours = r"(SLURM|SLURMD|SRUN)_(?!CONF$|CLUSTERS$)"
    return {k: v for k, v in env.items() if k not in said and not re.match(ours, k)}


def queue_line(line: str) -> JobState:
    """Pure: a line of squeue in _QUEUE_FORMAT."""
    job, words, start, nodes, reason = line.split("|", 4)
    return JobState(
        job=job,
        phase=_PHASES.get(words, "ended"),
        words=words,
        reason="" if reason == "None" else reason,
        start=_epoch(start),
        nodes=int(nodes) if nodes.isdigit() else 0,
    )


def job_details(job: str, text: str) -> tuple[Details, str]:
    """Pure: what `scontrol show job` prints, and its list of nodes in Slurm's short form."""
    # the first line holds the job's name, which may look like anything
    lines = text.strip().splitlines()[1:]
    pairs = [word.partition("=") for line in lines for word in line.split()]
    found: dict[str, str] = {}
    for key, _, value in pairs:
        found.setdefault(key, value)
    if "JobState" not in found:
        raise LaunchError(f"scontrol show job {job}: found no JobState in {text[:200]!r}")
    reason = re.search(r"^\s+JobState=\S+ Reason=(.*?) Dependency=", text, re.MULTILINE)
    words, why = found["JobState"], reason.group(1) if reason else found.get("Reason", "")
    limit, ran = _seconds(found.get("TimeLimit", "")), _seconds(found.get("RunTime", ""))
    phase = _PHASES.get(words, "ended")
    start, end = _epoch(found.get("StartTime", "")), _epoch(found.get("EndTime", ""))
    # While its processes end, Slurm calls any job "completing". One that goes back into the queue
    # has the times of its next start by then, one that was cancelled has ended before its time.
    whole = end is None or start is None or limit is None or end - start >= limit
    back = phase == "ending" and ran == 0 and whole
    early = phase == "ending" and why == "None" and not whole
    details = Details(
        job=job,
        phase=phase,
        words=words,
        reason="" if why == "None" else why,
        end=end if phase == "running" or (phase == "ending" and not back) else None,
        time_limit_s=limit,
        restarts=int(found.get("Restarts", "0")),
        preempted=found.get("PreemptTime", "None") not in ("None", "N/A") or words == "PREEMPTED",
        requeued=back,
        cancelled=words == "CANCELLED" or early,
    )
    return details, "" if phase == "queued" else found.get("NodeList", "").replace("(null)", "")


def _with_nodes(details: Details, nodes: tuple[str, ...]) -> Details:
    return Details(**{**vars(details), "nodes": nodes})


def _epoch(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()
    except ValueError:  # Unknown, N/A, None
        return None


def _seconds(text: str) -> float | None:
    """Of D-HH:MM:SS; None for UNLIMITED and the like."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
