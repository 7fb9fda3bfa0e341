"""Shard sets: written in parallel, checked block by block, read at the speed of memory.

    from dmi_hpc.data import ShardLoader, ShardSet

works without the rest of DMI-HPC. Names are loaded when first used: `import dmi_hpc.data` needs
neither torch nor h5py.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dmi_hpc.data.manifest import BuildPlan, Compression, Field, Manifest, SplitRule
    from dmi_hpc.data.ragged import Ragged
    from dmi_hpc.data.reader import ShardSet
    from dmi_hpc.data.shardloader import ShardLoader
    from dmi_hpc.data.writer import ShardWriter

__all__ = [
    "BuildPlan",
    "Compression",
    "Field",
    "Manifest",
    "Ragged",
    "ShardLoader",
    "ShardSet",
    "ShardWriter",
    "SplitRule",
]

_HOME = {
    "BuildPlan": "manifest",
    "Compression": "manifest",
    "Field": "manifest",
    "Manifest": "manifest",
    "Ragged": "ragged",
    "ShardLoader": "shardloader",
    "ShardSet": "reader",
    "ShardWriter": "writer",
    "SplitRule": "manifest",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
