"""Compounds that a given split puts on several sides: a test that has been learnt from."""

from __future__ import annotations

import itertools

from dmi_hpc.data.importing.records import LISTED
from dmi_hpc.data.manifest import SPLITS


class Crossing:
    """Which splits each compound is in. Holds about 200 bytes a compound."""

    def __init__(self) -> None:
        self._seen: dict[str, dict[int, str]] = {}  # compound -> split -> place of the first

    def add(self, compound: str, split: int, place: str) -> None:
        self._seen.setdefault(compound, {}).setdefault(split, place)

    def found(self) -> tuple[int, list[str]]:
        """How many compounds are in several splits, and the first of them with their places."""
        several = {name: places for name, places in self._seen.items() if len(places) > 1}
        listed = [
            f"{name}: " + ", ".join(f"{SPLITS[s]} ({places[s]}, ...)" for s in sorted(places))
            for name, places in itertools.islice(several.items(), LISTED)
        ]
        return len(several), listed
