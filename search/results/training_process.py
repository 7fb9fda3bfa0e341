"""``dmi train`` as a process of its own: what it leaves behind in memory ends with it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from dmi_hpc.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, Interrupted, RunError
from dmi_hpc.watch import stop_on_signals

POLL_S = 0.2


def trained(recipe: Path, run: Path) -> str | None:
    """Train `recipe` in the folder `run`, on from where it stopped; why it failed, or None.

    What failed for a reason of its own (loss not finite) is not tried again. A stop signal is handed
    on. Raises Interrupted if the training was stopped, RunError if it refused to start; it says why on
    the terminal.
    """
    status = _status(run)
    if status.get("state") == "failed" and status["failure"] != "exception":
        return f"{status['message']} (remove {run} to try again)"
    if status.get("state") == "finished":
        return None
    command = ("train", str(recipe), "--out", str(run), "--resume")
    code = _run([sys.executable, "-P", "-m", "dmi_hpc", *command])
    if code == EXIT_INTERRUPTED:
        raise Interrupted(f"{run}: stopped; the same command continues")
    if code == EXIT_USER_ERROR:
        raise RunError(f"{run}: the training does not start, as said above")
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}; tried again next time"
    return str(_status(run)["message"]) if code else None


def _run(command: list[str]) -> int:
    """Exit code of `command`; a stop signal of this process is handed on, once, as SIGTERM."""
    told = False
    with stop_on_signals() as stop, subprocess.Popen(command) as process:
        while True:
            try:
                code = process.wait(POLL_S)
            except subprocess.TimeoutExpired:
                if stop and not told:
                    process.send_signal(signal.SIGTERM)
                    told = True
            else:
                return EXIT_INTERRUPTED if stop else code


def _status(run: Path) -> dict[str, Any]:
    path = run / "train" / "status.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}
