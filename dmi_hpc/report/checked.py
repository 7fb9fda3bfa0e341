"""Foreign JSON into typed data, or a RunError that names file and key."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from dmi_hpc.errors import RunError

T = TypeVar("T")


def validate(raw: Any, kind: type[T], path: Path) -> T:
    """`raw`, found in `path`, as a `kind`."""
    try:
        found: T = _adapter(cast(Any, kind)).validate_python(raw)
    except ValidationError as error:
        raise _explain(error, path) from None
    return found


def read_json(path: Path, kind: type[T]) -> T | None:
    """The file as a `kind`; None if there is no such file."""
    if not path.exists():
        return None
    try:
        found: T = _adapter(cast(Any, kind)).validate_json(path.read_bytes())
    except ValidationError as error:
        raise _explain(error, path) from None
    return found


@cache  # building one takes longer than using it, and a journal has thousands of lines
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _explain(error: ValidationError, path: Path) -> RunError:
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"]) or "content"
    return RunError(f"{path}: {key}: {problem['msg']}. Run the stage that writes this file again")
