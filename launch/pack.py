"""The Python environment as one file, copied to each node's own storage when a job starts.

Thousands of processes that import torch from a shared file system wait for it, and so does everybody
else on the machine; one broadcast file does not.
"""

from __future__ import annotations

import shlex
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

from dmi_hpc import knobs
from dmi_hpc.errors import LaunchError
from dmi_hpc.files import atomic_file, writing
from launch.job import Job
from launch.shell import expanding

# The unpacked environment on a node, for the batch script and for who tidies up after it.


def pack(target: Path, prefix: Path | None = None) -> Path:
    """Write the environment at `prefix`, or this one, to `target`, a compressed tar; whole or not.

    A virtual environment still needs the interpreter that it was made from (`home` in its
    pyvenv.cfg) where it is. What was installed as editable stays where its sources are.

    Raises LaunchError if `prefix` is no environment, RunError if `target` cannot be written.
    """
    prefix = prefix or Path(sys.prefix)
    kinds = (prefix / "pyvenv.cfg", prefix / "conda-meta")
    if not any(kind.exists() for kind in kinds) or not (prefix / "bin" / "python").exists():
        raise LaunchError(
            f"{prefix}: expected a virtual environment, or one of conda, to be packed; install "
            "DMI-HPC into one and use its python"
        )
    with (
        writing(target.parent),
        atomic_file(target) as temp,
        tarfile.open(temp, "w:gz", compresslevel=1) as archive,  # more costs minutes, saves little
    ):
        hidden = {target.resolve(), temp.resolve()}
        root = prefix.resolve()
        archive.add(root, ".", filter=lambda member: _kept(member, root, hidden))
    return target


def _kept(member: tarfile.TarInfo, root: Path, hidden: set[Path]) -> tarfile.TarInfo | None:
    """The member without its owner; None for the archive itself, if it lies in the environment."""
    if root / member.name in hidden:
        return None
    if member.name == ".":
        member.mode = 0o700  # the folder that it is unpacked in stays private
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def unpack_lines(job: Job) -> list[str]:
    """Lines of the batch script that bring `job.packed` to a private folder on every node.

    A step that fails ends the job: half an environment would fail later, and in stranger ways.
    """
    if job.packed is None:
        return []
    pbs = job.machine.scheduler == "pbs"
    folder = f'"${knobs.NODE_ENVIRONMENT}"'
    file, archive = f"{folder}/packed.tar.gz", shlex.quote(str(job.packed))
    each = f"mpiexec -n {job.nodes} -ppn 1" if pbs else f"srun --nodes={job.nodes} {_ONE_TASK}"
    steps = (
        f"{each} rm -rf {folder}",
        # not -p: a folder that somebody else has made there is refused
        f"{each} mkdir -m 700 {folder}",
        f"{each} cp {archive} {file}" if pbs else f"sbcast --force {archive} {file}",
        f"{each} tar -xzf {file} -C {folder}",
        f"{each} rm {file}",
    )
    place = f"{job.machine.node_storage}/dmi-${_JOB_ID[pbs]}"
    return [
        "# The Python environment, to every node's own storage: no start waits for the shared one.",
        f"export {knobs.NODE_ENVIRONMENT}={expanding(place)}",
        "failed() {",
        '  echo "the packed environment did not reach every node: look above" >&2',
        "  exit 2",
        "}",
        *(f"{step} || failed" for step in steps),
    ]


def tidy_command(env: Mapping[str, str]) -> tuple[str, ...]:
    """Removes the unpacked environment from a node: the last that a session starts on each. () if
    nothing was unpacked. What runs from there must have loaded all that it still needs."""
    folder = env.get(knobs.NODE_ENVIRONMENT, "")
    return ("rm", "-rf", "--", folder) if Path(folder).name.startswith("dmi-") else ()


_JOB_ID = {True: "PBS_JOBID", False: "SLURM_JOB_ID"}
_ONE_TASK = "--ntasks-per-node=1 --mpi=none"
