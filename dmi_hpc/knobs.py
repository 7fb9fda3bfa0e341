"""Every DMI_* environment variable, with its reason. Tests override them with monkeypatch.setenv."""

from __future__ import annotations

import math
import os
from pathlib import Path

from dmi_hpc.errors import DataError, LaunchError

# "single" makes a process its own world of one, whatever scheduler variables say: for a login shell
# inside an allocation, or a tool started beside the ranks.
WORLD = "DMI_WORLD"

# A URL for torch.distributed (file:///... or tcp://host:port). The local launcher sets a file in a
# private folder: no port to choose, so two jobs on one machine can never meet.
RENDEZVOUS = "DMI_RENDEZVOUS"

# Number of ranks that `dmi launch` has started this process as one of. A rank that finds itself in
# another world refuses to run, and leaves the word on how to continue to its launcher.
LAUNCHED = "DMI_LAUNCHED"

# Which launcher started the ranks (a `world.Source`), where `dmi launch` has put torchrun's variables
# over its own: whether a rank's cores are its own or shared follows from it.
STARTER = "DMI_STARTER"

# Name or file of the machine that this is, where host names do not tell.
MACHINE = "DMI_MACHINE"

# The unpacked environment on a node; set by a batch script that copies one there.
NODE_ENVIRONMENT = "DMI_NODE_ENVIRONMENT"

# "local": `dmi launch` takes no notice of the allocation that it is in; "allocation": it takes the
# whole of it, from a step that was started for it alone.
PLACE = "DMI_LAUNCH"

# When the job ends, in epoch seconds: `dmi launch` has asked the scheduler. Slurm before 23.02 does not
# set SLURM_JOB_END_TIME, and PBS has nothing like it.
END = "DMI_END_TIME"

# Seconds a collective may wait for a missing rank before the job ends with an error that names it.
# Longer than the ranks ever differ: in a first compile, or in user code.
COLLECTIVE_TIMEOUT_S = "DMI_COLLECTIVE_TIMEOUT_S"

# How many nodes the Ray cluster at RAY_ADDRESS will have, where it starts at the same moment as the
# search, and how many seconds the search waits for them.
RAY_NODES = "DMI_RAY_NODES"
RAY_WAIT_S = "DMI_RAY_WAIT_S"

# Folders of node-local storage, joined by ":", where staged copies of shard sets are looked for.
STAGE = "DMI_STAGE"

# Traceback of user errors too, for developers.
DEBUG = "DMI_DEBUG"


def rendezvous() -> str | None:
    return os.environ.get(RENDEZVOUS) or None


def resume_hint() -> str:
    """What an interrupted command ends its message with; under `dmi launch` nothing: see there."""
    return "" if LAUNCHED in os.environ else ". The same command with --resume continues"


def collective_timeout_s() -> float:
    return _seconds(COLLECTIVE_TIMEOUT_S, "600")


def ray_nodes() -> int:
    """0: not said; the cluster at RAY_ADDRESS is there already, as large as it is."""
    text = os.environ.get(RAY_NODES, "") or "0"
    if not text.isdecimal():
        raise LaunchError(f"{RAY_NODES}: found '{text}', expected the number of nodes, e.g. 4")
    return int(text)


def ray_wait_s() -> float:
    return _seconds(RAY_WAIT_S, "120")


def _seconds(name: str, usual: str) -> float:
    text = os.environ.get(name, usual)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise LaunchError(f"{name}: found '{text}', expected seconds, e.g. {usual}")
    return seconds


def stage_folders() -> tuple[Path, ...]:
    folders = tuple(Path(name) for name in os.environ.get(STAGE, "").split(os.pathsep) if name)
    for folder in folders:
        if not folder.is_absolute():
            raise DataError(
                f"{STAGE}: found '{folder}', expected absolute paths, joined by '{os.pathsep}': ranks "
                "may start in other folders"
            )
    return folders


def debug() -> bool:
    return os.environ.get(DEBUG, "") not in ("", "0")
