"""Ray's environment variables. Ray reads them when it is imported, so this comes before it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # our own handler asks for an orderly end
    "TUNE_WARN_THRESHOLD_S": "60",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # Tune's own state is not used
}


@contextmanager
def ray_environment() -> Iterator[Path]:
    """A short private folder for Ray's sockets and logs; Ray's variables set while the block runs.

    A cluster of our own asks every client for a token that only this user can read; one that is
    there already (RAY_ADDRESS) brings its own. Import ray inside the block.
    """
    before = dict(os.environ)
    with TemporaryDirectory(prefix="dmi-ray-") as name:
        folder = Path(name)
        os.environ.update(VARIABLES)
        if "RAY_ADDRESS" not in os.environ:
            token = folder / "token"
            token.touch(mode=0o600)
            token.write_text(secrets.token_hex(32))
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))
        try:
            yield folder
        finally:
            os.environ.clear()
            os.environ.update(before)
