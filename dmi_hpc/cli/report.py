"""``dmi report``: one HTML file of a run."""

from __future__ import annotations

from dmi_hpc.cli.options import RunFolder, new_app
from dmi_hpc.run import open_run, record_command
from dmi_hpc.watch import say

app = new_app()


@app.command()
def report(run_folder: RunFolder) -> None:
    """Write RUN/report.html: self-contained, opens from a file system without network."""
    from dmi_hpc.report import write_report

    run = open_run(run_folder.resolve())
    record_command(run)
    say(f"report: {write_report(run.folder)}")
