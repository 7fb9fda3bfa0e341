"""Libraries that only some imports need."""

from __future__ import annotations

import importlib
from typing import Any

from dmi_hpc.errors import DataError


def library(module: str, use: str) -> Any:
    """The module, loaded now. Raises DataError that says what to install. use: what needs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = {"PIL": "pillow"}.get(module.partition(".")[0], module.partition(".")[0])
        raise DataError(
            f"{use} need {name} ({error}): pip install 'dmi-hpc[import]', or {name} alone"
        ) from None
