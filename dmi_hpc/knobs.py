"""Every DMI_* environment variable, with its reason. Tests override them with monkeypatch.setenv."""

from __future__ import annotations

import os

# "single" makes a process its own world of one, whatever scheduler variables say: for a login shell
# inside an allocation, or a tool started beside the ranks.
WORLD = "DMI_WORLD"

# A URL for torch.distributed (file:///... or tcp://host:port). The local launcher sets a file in a
# private folder: no port to choose, so two jobs on one machine can never meet.
RENDEZVOUS = "DMI_RENDEZVOUS"

# Seconds a collective may wait for a missing rank before it fails.
COLLECTIVE_TIMEOUT_S = "DMI_COLLECTIVE_TIMEOUT_S"

# Traceback of user errors too, for developers.
DEBUG = "DMI_DEBUG"


def rendezvous() -> str | None:
    return os.environ.get(RENDEZVOUS) or None


def collective_timeout_s() -> float:
    return float(os.environ.get(COLLECTIVE_TIMEOUT_S, "600"))


def debug() -> bool:
    return os.environ.get(DEBUG, "") not in ("", "0")
