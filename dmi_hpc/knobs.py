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

# Seconds a collective may wait for a missing rank before the job ends with an error that names it.
# Longer than the ranks ever differ: in a first compile, or in user code.
COLLECTIVE_TIMEOUT_S = "DMI_COLLECTIVE_TIMEOUT_S"

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
    text = os.environ.get(COLLECTIVE_TIMEOUT_S, "600")
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise LaunchError(f"{COLLECTIVE_TIMEOUT_S}: found '{text}', expected seconds, e.g. 600")
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
