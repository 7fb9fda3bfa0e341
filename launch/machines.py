"""Machines: what a job must know of the computer it is for, one TOML file each.

Built-in ones lie in ``launch/machines/``, a user's own in ``~/.config/dmi/machines/``; a file with
``extends = "NAME"`` takes over that machine and overrides single keys. Pure but for reading files.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from dmi_hpc import knobs
from dmi_hpc.config import Config, parse
from dmi_hpc.errors import LaunchError, RecipeError

BUILT_IN = Path(__file__).with_name("machines")


def _plain(text: str) -> str:
    if not text.isprintable() or not text.strip():
        raise ValueError(f"found {text!r}, expected text on one line, without control characters")
    return text


def _option(text: str) -> str:
    if not text.startswith("-") or not text.strip("-"):
        raise ValueError(f"found {text!r}, expected an option of the scheduler, as --mem=0")
    return text


# what one line of a batch script can hold
Plain = Annotated[str, AfterValidator(_plain)]
Option = Annotated[Plain, AfterValidator(_option)]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Chain = Literal["requeue", "dependency", "off"]


class Machine(Config):
    """One computer. None: not known, so nothing is asked of the scheduler or checked.

    `name` is the file's, `origin` what `--machine` takes to load it again; both are set on loading.
    Values of `environment` and `node_storage` may name shell variables, as $USER or ${USER}.
    """

    name: Plain
    origin: str
    title: Plain
    scheduler: Literal["none", "slurm", "pbs"] = "none"
    launcher: Literal["srun", "mpiexec", "mpirun"] = Field(
        "srun", description="starts steps inside an allocation"
    )
    mpi: str = Field("", description="srun --mpi=... for MPI ranks; empty: mpirun starts them")
    hosts: tuple[str, ...] = Field((), description="patterns of its host names, to recognise it")
    variables: Mapping[Variable, str] = Field(
        {}, description="environment variables and patterns of their values, to recognise it"
    )
    queue: Plain | None = Field(None, description="partition or queue, unless --queue is given")
    qos: Plain | None = Field(None, description="quality of service, unless --qos is given")
    constraint: Plain | None = Field(
        None, description="kind of nodes, unless --constraint is given; PBS: part of select"
    )
    nodes_max: int | None = Field(None, ge=1)
    time_max_s: int | None = Field(None, ge=60)
    time_bins: tuple[tuple[int, int], ...] = Field(
        (), description="of `queue`: from so many nodes on, at most so many seconds; ascending"
    )
    unchained: tuple[str, ...] = Field((), description="queues and QOS in which no job may chain")
    cores_per_node: int | None = Field(None, ge=1)
    cores_reserved: int = Field(0, ge=0, description="of a node, which jobs do not get")
    threads_per_core: int = Field(1, ge=1, description="that the scheduler counts as CPUs")
    cores_per_rank: int | None = Field(None, ge=1, description="else a node's, shared evenly")
    exclusive: bool = Field(True, description="jobs ask for whole nodes")
    gpus_per_node: int = Field(0, ge=0, description="devices: an MI250X counts as two")
    gpu: Literal["none", "nvidia", "amd", "intel"] = "none"
    interfaces: tuple[str, ...] = Field(
        (), description="fast network, in order of preference; empty: the way to the first node"
    )
    environment: Mapping[Variable, str] = {}
    modules: tuple[Plain, ...] = ()
    setup: tuple[str, ...] = Field((), description="shell lines, run as they are")
    directives: tuple[Option, ...] = Field((), description="further options of the scheduler")
    rank_options: tuple[str, ...] = Field((), description="of the step that starts the ranks")
    node_storage: str | None = Field(None, description="fast folder of each node's own")
    scratch: str | None = Field(None, description="shared file system for run folders")
    broadcast: bool = Field(False, description="a packed environment can be copied to the nodes")
    chain: Chain = Field("off", description="how a job that ran out of time goes on")
    signal_s: int = Field(120, ge=1, description="seconds before its end that a job is warned")
    notes: tuple[str, ...] = ()
    sources: Mapping[str, str] = Field({}, description="key -> where its value is from")

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> Self:
        if self.broadcast and self.node_storage is None:
            raise ValueError("broadcast = true, but node_storage does not say where to")
        if self.cores_per_node is not None and self.cores_reserved >= self.cores_per_node:
            raise ValueError(f"cores_reserved is {self.cores_reserved} of {self.cores_per_node}")
        return self

    @property
    def cores(self) -> int | None:
        """Cores of a node that a job gets."""
        return None if self.cores_per_node is None else self.cores_per_node - self.cores_reserved

    @property
    def cpus(self) -> int | None:
        """CPUs of a node that a job gets, as the scheduler counts them (-c)."""
        return None if self.cores is None else self.cores * self.threads_per_core


def load_machine(name_or_path: str) -> Machine:
    """The machine of this name, the user's own before a built-in one, or of this TOML file.

    Raises LaunchError for an unknown name (lists the names), or a file that is no machine.
    """
    if "/" in name_or_path or name_or_path.endswith(".toml"):
        path = Path(name_or_path).expanduser().resolve()
        return _load(path, str(path))
    files = _files()
    if name_or_path not in files:
        raise LaunchError(
            f"no machine '{name_or_path}'; machines: {', '.join(sorted(files))}. Your own: "
            f"{_own_folder()}/NAME.toml, or the path of a TOML file"
        )
    return _load(files[name_or_path], name_or_path)


def machines() -> list[Machine]:
    """All that have a name: the user's own, then the built-in ones, sorted."""
    files = _files()
    order = sorted(files, key=lambda name: (files[name].parent == BUILT_IN, name))
    return [_load(files[name], name) for name in order]


def detect_machine(env: Mapping[str, str], hostname: str) -> tuple[Machine, str] | None:
    """The machine that this host belongs to, and why it is thought so; None if it is none of them.

    Raises LaunchError if DMI_MACHINE names no machine.
    """
    if env.get(knobs.MACHINE):
        return load_machine(env[knobs.MACHINE]), f"{knobs.MACHINE} is '{env[knobs.MACHINE]}'"
    for machine in machines():
        for name, pattern in machine.variables.items():
            if fnmatchcase(env.get(name, ""), pattern):
                return machine, f"{name} is '{env[name]}'"
        for pattern in machine.hosts:
            if fnmatchcase(hostname, pattern):
                return machine, f"the host name '{hostname}' fits '{pattern}'"
    return None


def _own_folder() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "dmi" / "machines"


def _files() -> dict[str, Path]:
    folders = (BUILT_IN, _own_folder())  # the later one wins
    return {path.stem: path for folder in folders for path in folder.glob("*.toml")}


def _load(path: Path, origin: str) -> Machine:
    raw = _read(path)
    for key in {"name", "origin"} & raw.keys():
        raise LaunchError(f"{path}: key '{key}': a machine is named like its file; leave it out")
    try:
        return parse(Machine, {**raw, "name": path.stem, "origin": origin}, where=str(path))
    except RecipeError as error:
        raise LaunchError(str(error)) from None


def _read(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The keys of a file, over those of the machine it extends. below: the files extending this."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LaunchError(f"{path}: cannot read this machine: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise LaunchError(f"{path}: not valid TOML: {error}") from None
    if "extends" not in raw:
        return raw
    name = raw.pop("extends")
    # built-in ones build on built-in ones, and one's own "frontier" on the built-in "frontier"
    known = {} if path.parent == BUILT_IN else _files()
    known |= {file.stem: file for file in BUILT_IN.glob("*.toml") if file.stem not in known}
    if path.parent != BUILT_IN and (BUILT_IN / path.name).exists():
        known[path.stem] = BUILT_IN / path.name
    if not isinstance(name, str) or known.get(name) in (None, path, *below):
        raise LaunchError(
            f"{path}: extends = {name!r}: expected another machine, one of: "
            f"{', '.join(sorted(set(known) - {path.stem}))}"
        )
    base = _read(known[name], (*below, path))
    if isinstance(own := raw.get("sources", {}), dict):
        raw["sources"] = {**base.get("sources", {}), **own}
    return {**base, **raw}
