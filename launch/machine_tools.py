"""``dmi launch machines`` and ``dmi launch pack``: what jobs are written for, and may carry along."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.table import Table

from dmi_hpc.watch import say
from launch.job import clock
from launch.machines import Machine, detect_machine, load_machine
from launch.machines import machines as all_machines
from launch.pack import pack as write_pack

HIDDEN = {"name", "origin", "sources"}


def machines(
    name: Annotated[str | None, typer.Argument(help="one machine, or its file: all values")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """List the machines that jobs can be written for, or show one: every value and its source."""
    shown = all_machines() if name is None else [load_machine(name)]
    if as_json:
        found = [machine.model_dump(mode="json") for machine in shown]
        say(json.dumps(found if name is None else found[0], indent=1))
        return
    out = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    if name is not None:
        out.print(page(shown[0]), markup=False)
        return
    out.print(listing(shown))
    here = detect_machine(os.environ, socket.gethostname())
    said = "none of them is recognised here" if here is None else f"here: {here[0].name}, {here[1]}"
    out.print(f"\n{said}; values and sources of one: dmi launch machines NAME", markup=False)


def listing(shown: list[Machine]) -> Table:
    """A line for each."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("machine", "", "nodes", "hours", "cores", "GPUs", "goes on by"):
        right = title in ("nodes", "hours", "cores", "GPUs")
        table.add_column(title, justify="right" if right else "left", no_wrap=bool(title))
    for machine in shown:
        longest = machine.time_bins[-1][1] if machine.time_bins else machine.time_max_s
        table.add_row(
            machine.name,
            machine.title,
            "" if machine.nodes_max is None else f"{machine.nodes_max:,}",
            "" if longest is None else f"{longest / 3600:g}",
            "" if machine.cores is None else str(machine.cores),
            str(machine.gpus_per_node) if machine.gpus_per_node else "",
            "" if machine.scheduler == "none" else machine.chain,
        )
    return table


def page(machine: Machine) -> RenderableType:
    """Every value that is set, and where it is from."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(machine.name, no_wrap=True)
    table.add_column("", overflow="fold")
    table.add_column("from", overflow="fold")
    for key, value in machine:
        if key in machine.model_fields_set - HIDDEN and value not in (None, (), {}):
            table.add_row(key, _text(key, value), machine.sources.get(key, ""))
    return table


def _text(key: str, value: Any) -> str:
    if key == "time_bins":
        return "\n".join(f"{nodes:,} nodes or more: {clock(seconds)}" for nodes, seconds in value)
    if isinstance(value, dict):
        return "\n".join(f"{name}={text}" for name, text in value.items())
    if isinstance(value, tuple):
        return "\n".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return clock(value) if key == "time_max_s" else str(value)


def pack(
    target: Annotated[Path, typer.Argument(help="file to write, e.g. $SCRATCH/dmi.tar.gz")],
) -> None:
    """Pack the Python environment of this dmi into one file, which jobs copy to their nodes.

    A job with --packed FILE runs from node-local storage, and starts without thousands of processes
    reading the same files. Pack again after each change of the environment.
    """
    began = time.monotonic()
    sys.stderr.write(f"packing {sys.prefix}: a minute or two\n")
    path = write_pack(target.expanduser().resolve())
    size = path.stat().st_size / 1e6
    say(f"{path}: {size:,.0f} MB, {time.monotonic() - began:.0f} s; give jobs --packed {target}")
