"""DMI-HPC: from a materials data set to the best network an allocation can find.

    from dmi_hpc import load
    model = load("runs/elemnet")

`load` (see `dmi_hpc.predict`) is imported when first used: `import dmi_hpc` needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dmi_hpc.predict import load

__all__ = ["__version__", "load"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dmi_hpc.predict import load

    return load
