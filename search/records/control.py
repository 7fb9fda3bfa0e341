"""What a user tells a search that runs elsewhere: a small file that the search looks at.

``RUN/search/control.json`` is replaced as a whole, from any node. A stop carries a token of its own:
a search obeys tokens that came after its start, so nobody has to remove the file, and all islands see
it. A raised budget lasts.
"""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Literal

from dmi_hpc.config import Config
from dmi_hpc.errors import RunError
from dmi_hpc.files import write_text, writing

FILE = "control.json"


class Control(Config):
    """stop: token of the last request; how: let running trials end, or not; evaluations: budget."""

    stop: str = ""
    how: Literal["drain", "now"] = "drain"
    evaluations: int = 0


def read_control(search: Path) -> Control:
    """What ``RUN/search`` was told; nothing if nothing was. Raises OSError, RunError if damaged."""
    path = search / FILE
    try:
        return Control.model_validate(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return Control()
    except ValueError as error:
        raise RunError(
            f"{path}: damaged ({error}). Remove it, and give the command again"
        ) from None


def request_stop(search: Path, how: Literal["drain", "now"]) -> None:
    """Ask every search in ``RUN/search`` to stop."""
    _write(search, read_control(search).model_copy(update={"stop": uuid.uuid4().hex, "how": how}))


def raise_budget(search: Path, evaluations: int) -> None:
    """Let the searches in ``RUN/search`` evaluate so many networks in all."""
    _write(search, read_control(search).model_copy(update={"evaluations": evaluations}))


def _write(search: Path, control: Control) -> None:
    with writing(search):
        write_text(search / FILE, control.model_dump_json() + "\n")
