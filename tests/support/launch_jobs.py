"""Jobs to describe in tests, and what users could write into them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from launch.job import Job, describe
from launch.machines import load_machine


def job(**changed: Any) -> Job:
    values: dict[str, Any] = {
        "stage": "search",
        "recipe": Path("/home/ada/recipes/elemnet.toml"),
        "out": Path("/scratch/ada/runs/elemnet"),
        "machine": load_machine("cpu"),
        "python": Path("/home/ada/env/bin/python"),
        "nodes": 4,
        "time_s": 7200,
    }
    return describe({**values, **changed})


PRINTABLE = st.sampled_from("ab'\"\\`$(){}[]<>|&;!*?~#%=-+ é…") | st.characters(
    codec="utf-8", categories=("L", "N", "P", "S")
)
NASTY = st.text(PRINTABLE | st.sampled_from("\t\n\r\x7f/"), max_size=12)
LINE = st.text(PRINTABLE, min_size=1, max_size=12).filter(lambda text: bool(text.strip()))
FOLDER = st.text(PRINTABLE.filter(lambda one: one not in "/\\."), min_size=1, max_size=12)
PATHS = NASTY.map(lambda name: Path("/tmp") / f"a{name}")
SOME = settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
