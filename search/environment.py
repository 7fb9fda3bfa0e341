"""Ray's environment variables. Ray reads them when it is imported, so this comes before it."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

import psutil

VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # our own handler asks for an orderly end
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # failures are outcomes, in the journal
    "TUNE_WARN_THRESHOLD_S": "60",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # Tune's own state is not used
}


PREFIX = "dmi-ray-"


def with_absolute_import_paths() -> None:
    """Make relative entries of the import path absolute: workers run in other folders."""
    sys.path[:] = [str(Path(entry).absolute()) for entry in sys.path]
    given = os.environ.get("PYTHONPATH")
    if given:
        entries = (str(Path(entry).absolute()) for entry in given.split(os.pathsep) if entry)
        os.environ["PYTHONPATH"] = os.pathsep.join(entries)


def _remove_stale() -> None:
    """Folders of our own searches that were killed: their process is gone, Ray's sockets are not."""
    for folder in Path(gettempdir()).glob(f"{PREFIX}*-*"):
        owner = folder.name.removeprefix(PREFIX).partition("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def ray_environment() -> Iterator[Path]:
    """A short private folder for Ray's sockets and logs; Ray's variables set while the block runs.

    A cluster of our own listens on loopback and asks every client for a token that only this user
    can read; one that is there already (RAY_ADDRESS) brings its own. Import ray inside the block.
    """
    before = dict(os.environ)
    _remove_stale()
    with TemporaryDirectory(prefix=f"{PREFIX}{os.getpid()}-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        os.environ.update(VARIABLES)
        if "RAY_ADDRESS" not in os.environ:
            token = folder / "token"
            token.touch(mode=0o600)
            token.write_text(secrets.token_hex(32))
            os.environ.update(
                RAY_AUTH_MODE="token",
                RAY_AUTH_TOKEN_PATH=str(token),
                # off: every Ray server listens on loopback alone, on Linux too
                RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
            )
        try:
            yield folder
        finally:
            os.environ.clear()
            os.environ.update(before)
