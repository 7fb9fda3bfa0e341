"""One self-contained HTML page about a run: result, training, search, network, data, how to repeat.

``collect`` reads the run folder into plain data, ``figures`` and ``diagrams`` draw SVG, ``page``
renders the template. Nothing here knows a task: whatever the run folder holds is shown.
"""

from __future__ import annotations

from pathlib import Path

from dmi_hpc import files

REPORT_NAME = "report.html"


def write_report(run: Path) -> Path:
    """Write ``run/report.html`` (atomically; equal inputs give equal bytes) and return its path.

    A stage that has not been run is left out, and the page says so. Raises RunError if `run` is no
    run folder or one of its files cannot be understood.
    """
    from dmi_hpc.report.collect import read_run  # matplotlib and jinja2 only when needed
    from dmi_hpc.report.page import render

    target = run / REPORT_NAME
    files.write_text(target, render(read_run(run)))
    return target


__all__ = ["REPORT_NAME", "write_report"]
