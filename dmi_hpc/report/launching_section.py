"""The section about allocations: what the jobs of a run were used for."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import median
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dmi_hpc.errors import counted
from dmi_hpc.report.charts import LIGHT, chart
from dmi_hpc.report.formatting import MISSING, duration, number
from dmi_hpc.report.launching import Allocations, Stay

MOST_BARS = 40
_COLOURS = {
    "data": "founder",
    "search": "network",
    "train": "mutation",
    "evaluate": "incumbent",
    "report": "climb",
}


@dataclass(frozen=True)
class Row:
    """A session as the table shows it."""

    job: str
    continues: str
    nodes: int
    began: str
    stay: Stay
    done: str
    how: str


def launching_context(found: Allocations | None) -> dict[str, Any]:
    """What the template needs; {"allocations": None} if the run had no job of a batch system."""
    if found is None:
        return {"allocations": None}
    return {
        "allocations": found,
        "allocation_summary": summary(found),
        "allocation_rows": [_row(stay) for stay in found.stays],
        "allocation_figure": Markup(timeline(found)) if len(found.stays) <= MOST_BARS else None,
    }


def summary(found: Allocations) -> str:
    """All of it in a few sentences."""
    sessions = [stay.session for stay in found.stays]
    jobs, machines = {s.job for s in sessions}, dict.fromkeys(s.machine for s in sessions)
    text = f"{counted(len(sessions), 'session')} of {counted(len(jobs), 'job')}"
    if any(machines):
        text += f" on {', '.join(filter(None, machines))}"
    text += f" used {number(found.used_h)} node-hours"
    if found.share is not None:
        text += f", {100 * found.share:.0f} % of them in work that counts"
    text += f"; {number(found.lost_h)} went into work that was begun again"
    first = [stay.first_s for stay in found.stays if stay.first_s is not None]
    if first:
        text += f". The first evaluation or training step began after {duration(median(first))}"
        text += " (the middle one of all sessions)" if len(first) > 1 else ""
    if any(session.waited_s is not None for session in sessions):
        text += f". In queues: {duration(found.waited_s)}"
    return text + "."


def _row(stay: Stay) -> Row:
    session = stay.session
    done = [counted(stay.evaluations, "evaluation")] if stay.evaluations else []
    done += [counted(stay.epochs, "epoch")] if stay.epochs else []
    began = datetime.fromtimestamp(session.began, UTC)
    why = session.why.splitlines()[0] if session.why else ""
    return Row(
        job=f"{session.job}{f', restart {session.restart}' if session.restart else ''}",
        continues=session.continues or MISSING,
        nodes=len(session.nodes),
        began=began.strftime("%Y-%m-%d %H:%M"),
        stay=stay,
        done=", ".join(done) or MISSING,
        how=(session.how or "running") + (f": {why}" if why else ""),
    )


def timeline(found: Allocations) -> str:
    """A bar for each session, its stages in it."""
    began = min(stay.session.began for stay in found.stays)
    end = max(stay.session.began + stay.session.seconds for stay in found.stays)
    scale, unit = (3600, "h") if end - began > 3 * 3600 else (60, "min")

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        shown: set[str] = set()
        for row, stay in enumerate(found.stays):
            session = stay.session
            left, width = (session.began - began) / scale, session.seconds / scale
            axes.add_patch(
                Rectangle((left, row + 0.7), width, 0.6, color=LIGHT["random"], alpha=0.4)
            )
            for run in session.runs:
                seconds = run.seconds
                if seconds is None:  # under way, or killed
                    seconds = session.began + session.seconds - run.began
                colour = LIGHT[_COLOURS.get(run.stage, "baseline")]
                box = ((run.began - began) / scale, row + 0.7)
                bar = Rectangle(box, max(0.0, seconds) / scale, 0.6, color=colour, alpha=0.9)
                bar.set_label("" if run.stage in shown else run.stage)
                shown.add(run.stage)
                axes.add_patch(bar)
        count = len(found.stays)
        axes.set(xlim=(0, (end - began) / scale or 1), ylim=(count + 0.6, 0.4))
        axes.set_yticks(range(1, count + 1), [stay.session.job for stay in found.stays])
        axes.grid(visible=False, axis="y")
        axes.set(xlabel=f"time since the first session began / {unit}", ylabel="job")
        if shown:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncol=5, frameon=False)

    size = (900, 120 + 22 * len(found.stays))
    return chart("allocations", "Sessions of the run and the stages in them", size, draw)
