"""The libraries of other fields: loaded when needed, their many exceptions made one."""

from __future__ import annotations

import csv
import importlib
import lzma
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dmi_hpc.errors import DataError, DMIError

# found by feeding damaged files to each of them
_ON_DAMAGED_FILES = (
    OSError, ValueError, EOFError, LookupError, TypeError, AttributeError, ArithmeticError,
    AssertionError, SyntaxError, RuntimeError, MemoryError, StopIteration,
    UserWarning,  # pymatgen raises one of a damaged POSCAR
    csv.Error, struct.error, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tokenize.TokenError,
)  # fmt: skip


def library(module: str, use: str, extra: str = "import") -> Any:
    """The module, loaded now. Raises DataError that says what to install. use: what needs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = {"PIL": "pillow"}.get(module.partition(".")[0], module.partition(".")[0])
        raise DataError(
            f"{use} need {name} ({error}): pip install 'dmi-hpc[{extra}]', or {name} alone"
        ) from None


@contextmanager
def readable(problem: str) -> Iterator[None]:
    """Raises DataError, beginning with `problem`, for whatever a library raises on a damaged file."""
    try:
        yield
    except DMIError:
        raise
    except _ON_DAMAGED_FILES as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{problem}: {text if len(text) <= 160 else text[:157] + '...'}") from None
