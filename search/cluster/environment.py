"""Ray's environment variables. Ray reads them when it is imported, so this comes before it."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_COLOR_PREFIX": "0",  # its words also go to files
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # our own handler asks for an orderly end
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # failures are outcomes, in the journal
    "TUNE_WARN_THRESHOLD_S": "60",
    # unset, Tune starts one trial at a time for a Searcher that it does not know
    "TUNE_MAX_PENDING_TRIALS_PG": "1000000",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # Tune's own state is not used
}


PREFIX = "dmi-ray-"
LOCK = "lock"
SOCKET_PATH_BYTES = 107  # of AF_UNIX on Linux
RANDOM_PART = 9  # of a temporary folder's name, and the separator before it
# Ray's /r/session_2026-01-31_23-59-59_123456_PID/sockets/plasma_store
SOCKET_BELOW = 67


def with_absolute_import_paths() -> None:
    """Make relative entries of the import path absolute: workers run in other folders."""
    sys.path[:] = [str(Path(entry).absolute()) for entry in sys.path]
    given = os.environ.get("PYTHONPATH")
    if given:
        entries = (str(Path(entry).absolute()) for entry in given.split(os.pathsep) if entry)
        os.environ["PYTHONPATH"] = os.pathsep.join(entries)


def _socket_root() -> Path:
    """Where Ray's sockets go: the folder for temporary files, if their names fit into its path."""
    usual = Path(gettempdir())
    room = SOCKET_PATH_BYTES - len(PREFIX) - RANDOM_PART - SOCKET_BELOW
    return usual if len(os.fsencode(usual)) <= room else Path("/tmp")


def _remove_stale(root: Path) -> None:
    """Folders of our own searches that were killed: what their owner locked can be locked again.

    By the lock, not by process ids: another container or node with the same TMPDIR has its own.
    """
    for folder in root.glob(f"{PREFIX}*"):
        try:
            with (folder / LOCK).open("r+") as handle:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # in use, of another user, without a lock (yet)
            continue


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. It appears locked, so that nobody can take it in between."""
    unlocked = folder / f"{LOCK}-new"
    with unlocked.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            unlocked.rename(folder / LOCK)
        except OSError:  # a file system without locks: then nobody removes this folder but we
            unlocked.unlink()
        yield


@contextmanager
def ray_environment() -> Iterator[Path]:
    """A short private folder for Ray's sockets and logs; Ray's variables set while the block runs.

    A cluster of our own listens on loopback and asks every client for a token that only this user
    can read; one that is there already (RAY_ADDRESS) brings its own. Import ray inside the block.
    """
    before, root = dict(os.environ), _socket_root()
    _remove_stale(root)
    with (
        TemporaryDirectory(prefix=PREFIX, dir=root, ignore_cleanup_errors=True) as name,
        _held(Path(name)),
    ):
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
