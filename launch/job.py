"""The description of a job: what is to run, where, on how much of it, and how it goes on.

Pure. `describe` makes it from the values of the command line, `launch_arguments` turns it back into
the command that the batch script runs inside the allocation, which describes the same job again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from dmi_hpc.config import Config, parse
from dmi_hpc.errors import LaunchError, RecipeError, counted
from launch.machines import Chain, Machine, Option, Plain

Stage = Literal["data", "search", "train", "evaluate", "report", "all", "check"]

SHORTEST_S = 60  # schedulers count in minutes

# field of a Job -> its names on the command line of dmi launch, the long one first
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "machine": ("--machine", "-m"),
    "nodes": ("--nodes", "-N"),
    "time_s": ("--time", "-t"),
    "ranks": ("--ranks", "-n"),
    "name": ("--name",),
    "account": ("--account", "-A"),
    "queue": ("--queue", "-p"),
    "qos": ("--qos", "-q"),
    "reservation": ("--reservation",),
    "constraint": ("--constraint", "-C"),
    "options": ("--option",),
    "chain": ("--chain",),
    "max_jobs": ("--max-jobs",),
    "max_node_hours": ("--max-node-hours",),
    "islands": ("--islands",),
    "after": ("--after",),
    "packed": ("--packed",),
    "dashboard": ("--dashboard",),
    "out": ("--out",),
}


def _writable(path: Path) -> Path:
    """A path that can be written into a script."""
    text = str(path)
    if not path.is_absolute() or "\0" in text or re.search("[\ud800-\udfff]", text):
        raise ValueError(f"found {text!r}, expected an absolute path, in UTF-8")
    return path


Absolute = Annotated[Path, AfterValidator(_writable)]


class Job(Config):
    """One job. None: as the machine, or the recipe, says. Made by `describe`."""

    stage: Stage
    recipe: Absolute
    out: Absolute = Field(description="run folder")
    machine: Machine
    python: Absolute = Field(description="interpreter with dmi_hpc, as the nodes see it")
    nodes: int = Field(1, ge=1)
    time_s: int = Field(ge=SHORTEST_S)
    ranks: int | None = Field(None, ge=1, description="training ranks on all nodes together")
    name: Plain | None = Field(None, description="for the scheduler; default: the recipe's file")
    account: Plain | None = None
    queue: Plain | None = None
    qos: Plain | None = None
    reservation: Plain | None = None
    constraint: Plain | None = None
    options: tuple[Option, ...] = Field(
        (), description="further options of the scheduler, one word each"
    )
    chain: Chain = "off"
    max_jobs: int = Field(20, ge=1, description="in a chain")
    max_node_hours: float | None = Field(None, gt=0, description="of all jobs of a chain")
    islands: int = Field(0, ge=0, description="searches that exchange networks, a job each")
    after: Plain | None = Field(None, description="job that must have ended before")
    packed: Absolute | None = Field(None, description="environment to be copied to the nodes")
    dashboard: bool = Field(False, description="Ray's own, of a search")
    extra: tuple[str, ...] = Field((), description="further arguments of the stage")

    @property
    def node_hours(self) -> float:
        """What one job may use, its islands together."""
        return self.nodes * max(1, self.islands) * self.time_s / 3600

    @property
    def signal_s(self) -> int:
        """Seconds before its end that the job is warned; Slurm may do it up to 60 s earlier still."""
        return min(self.machine.signal_s, self.time_s // 4)

    @model_validator(mode="after")
    def _fits_the_machine(self) -> Self:
        problem = _too_much(self) or _wrong_place(self)
        if problem:
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.islands and self.stage != "search":
            raise ValueError(f"islands belong to a search, the stage is {self.stage}")
        if self.islands == 1:
            raise ValueError("1 island has no other to exchange networks with: expected 2 or more")
        if self.ranks is not None and self.stage not in ("train", "all"):
            raise ValueError(f"ranks (-n) belong to a training, the stage is {self.stage}")
        if any("\0" in word for word in self.extra):
            raise ValueError("an argument of the stage has a NUL character")
        return self


def _too_much(job: Job) -> str:
    """Which limit of the machine the job breaks, and what to do; "" if none."""
    machine, queue = job.machine, job.queue or job.machine.queue
    nodes = counted(job.nodes, "node")
    if machine.nodes_max is not None and job.nodes > machine.nodes_max:
        return (
            f"{nodes} asked for, but {machine.name} gives a job at most {machine.nodes_max:,} (-N)"
        )
    limit, where = machine.time_max_s, machine.name
    if machine.time_bins and queue == machine.queue:
        fitting = [seconds for least, seconds in machine.time_bins if job.nodes >= least]
        if not fitting:
            least = machine.time_bins[0][0]
            return (
                f"{nodes} asked for, but {queue} of {machine.name} takes jobs of {least} or more: take "
                "more (-N), or name another queue (-p)"
            )
        limit, where = fitting[-1], f"{queue} of {machine.name}"
    if limit is not None and job.time_s > limit:
        return (
            f"{clock(job.time_s)} asked for, but {where} gives a job of {nodes} at most "
            f"{clock(limit)}: ask for less (-t), a chain of jobs goes on; or name another queue (-p)"
        )
    return ""


def _wrong_place(job: Job) -> str:
    """What the job asks of its machine that this has not; "" if nothing."""
    machine = job.machine
    if machine.scheduler == "none":
        return (
            f"{machine.name} has no scheduler to ask for nodes and time: leave out -N and -t, or "
            "choose another machine (-m)"
        )
    if machine.scheduler == "pbs" and (job.qos or job.reservation):
        return "PBS knows no --qos and no --reservation: a reservation is a queue there (-p)"
    if job.packed is not None and not machine.broadcast:
        return f"{machine.name} cannot copy a packed environment to its nodes: leave out --packed"
    place = next((name for name in (job.queue, job.qos) if name in machine.unchained), None)
    if place is not None and job.chain != "off":
        return f"{machine.name} forbids chains of jobs in {place}: --chain off, or another one"
    return ""


def describe(values: Mapping[str, Any]) -> Job:
    """A job from values by field. One that is None, or not given, is as the machine says.

    Raises LaunchError naming what does not fit, and what would.
    """
    given = {field: value for field, value in values.items() if value is not None}
    machine = given.get("machine")
    if isinstance(machine, Machine):
        forbidden = {given.get("queue"), given.get("qos")} & set(machine.unchained)
        given.setdefault("chain", "off" if forbidden else machine.chain)
    try:
        return parse(Job, given, where="job")
    except RecipeError as error:
        raise LaunchError(_in_options(str(error))) from None


def _in_options(text: str) -> str:
    """Problems of fields as those of the options that users gave."""
    lines = (line.removeprefix("job: ") for line in text.splitlines())
    return re.sub(
        r"^key '(\w+)[.\d]*'",
        lambda found: OPTIONS.get(found[1], (found[1],))[0],
        "\n".join(lines),
        flags=re.MULTILINE,
    )


def within_budget(job: Job, used_node_hours: float = 0.0) -> tuple[Job, str]:
    """`job`, shortened to what its chain may still use, and a line that says so ("": as it was).

    Raises LaunchError if that is less than a minute.
    """
    if job.max_node_hours is None:
        return job, ""
    left = job.max_node_hours - used_node_hours
    if job.node_hours <= left:
        return job, ""
    time_s = int(left * 3600 / (job.nodes * max(1, job.islands)))
    if time_s < SHORTEST_S:
        raise LaunchError(
            f"{max(0.0, left):.2f} of {job.max_node_hours:g} node-hours are left: less than a minute "
            f"on {counted(job.nodes, 'node')}. Take fewer nodes (-N), or allow more (--max-node-hours)"
        )
    shorter = job.model_copy(update={"time_s": time_s})
    return shorter, (
        f"{clock(time_s)} instead of {clock(job.time_s)}: no more than {left:g} of "
        f"{job.max_node_hours:g} node-hours (--max-node-hours) are left"
    )


def launch_arguments(job: Job) -> tuple[str, ...]:
    """What follows `dmi launch` inside the allocation, to describe `job` again there.

    The interpreter is not said: it is the one that runs.
    """
    values: dict[str, Any] = {field: getattr(job, field) for field in OPTIONS}
    values |= {"machine": job.machine.origin, "time_s": clock(job.time_s)}
    words = []
    for field, (option, *_) in OPTIONS.items():
        value = values[field]
        many = value if isinstance(value, tuple) else (value,)
        words += [
            option if one is True else f"{option}={one}"
            for one in many
            if one is not None and one != 0
        ]
    extra = ("--", *job.extra) if job.extra else ()
    return (*words, job.stage, str(job.recipe), *extra)


_TIME = re.compile(
    r"(?:(?P<d>\d{1,9})-(?P<dh>\d{1,9})(?::(?P<dm>\d{1,9})(?::(?P<ds>\d{1,9}))?)?"
    r"|(?P<h>\d{1,9}):(?P<hm>\d{1,9}):(?P<hs>\d{1,9})|(?P<m>\d{1,9})(?::(?P<s>\d{1,9}))?)",
    re.ASCII,
)


def parse_time(text: str) -> int:
    """Seconds of a time as Slurm reads it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Raises LaunchError if it is none of these, or shorter than a minute.
    """
    found = _TIME.fullmatch(text.strip())
    if found is None:
        raise LaunchError(
            f"time {text!r}: expected minutes, as 30, or hours:minutes:seconds, as 2:00:00, or "
            "days-hours:minutes:seconds"
        )
    n = {name: int(digits or 0) for name, digits in found.groupdict().items()}
    seconds = (
        86_400 * n["d"]
        + 3600 * (n["dh"] + n["h"])
        + 60 * (n["dm"] + n["hm"] + n["m"])
        + (n["ds"] + n["hs"] + n["s"])
    )
    if seconds < SHORTEST_S:
        raise LaunchError(
            f"time {text!r}: {seconds} s, expected at least {SHORTEST_S}; a plain number is minutes, "
            "2:00 is two minutes, 2:00:00 two hours"
        )
    return seconds


def clock(seconds: int) -> str:
    """HH:MM:SS; more than 99 hours have more digits."""
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
