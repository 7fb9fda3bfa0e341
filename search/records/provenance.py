"""Which code and which machine: what a journal records of every session."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
from functools import cache
from pathlib import Path

import torch

import dmi_hpc

GIT_S = 5.0
_DESCRIBE = ("describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*")


@cache
def code_version() -> dict[str, str | None]:
    """Versions of DMI-HPC, torch and Python; git: the commit ("-dirty": changed), if it is known."""
    return {
        "dmi_hpc": dmi_hpc.__version__,
        "git": _commit(Path(dmi_hpc.__file__).resolve().parents[1]),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def process() -> dict[str, str | int]:
    """Where this process runs."""
    return {"host": socket.gethostname(), "pid": os.getpid()}


def _commit(folder: Path) -> str | None:
    """Commit of the working tree at `folder`; None if it is none, or git cannot say."""
    if not (folder / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *_DESCRIBE],
            capture_output=True,
            text=True,
            timeout=GIT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
