"""The batch script of a job, as text. Pure.

The script sets the environment and is then replaced (exec) by the very command that the user gave,
now inside the allocation: steps, signals and continuation are Python, none of it is shell.
"""

from __future__ import annotations

import re
import shlex

from dmi_hpc import knobs
from dmi_hpc.errors import LaunchError
from launch.job import Job, clock, launch_arguments
from launch.pack import unpack_lines
from launch.shell import expanding, pbs_option, slurm_option

NAME_MAX = 60
PBS_NAME_MAX = 15


def script(job: Job) -> str:
    """The batch script of `job`, for sbatch or qsub. LaunchError for what a script cannot hold."""
    slurm = job.machine.scheduler == "slurm"
    directives = (
        [f"#SBATCH {slurm_option(option)}" for option in slurm_options(job)]
        if slurm
        else [f"#PBS {pbs_option(option)}" for option in pbs_options(job)]
    )
    # only a login shell is sure to know `module`; PBS hands on nothing of the user's own shell
    shell = "#!/bin/bash" if slurm and not job.machine.modules else "#!/bin/bash -l"
    parts = [
        [shell, f"# dmi launch: {job.stage} on {job.machine.title}", *directives],
        _environment(job),
        unpack_lines(job),
        _command(job),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def job_name(job: Job) -> str:
    """A name that every scheduler takes: letters, digits, - and _, beginning with a letter."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", job.name or job.recipe.stem).strip("-_")
    return f"dmi-{name}"[:NAME_MAX].rstrip("-_")


def slurm_options(job: Job) -> list[str]:
    """What sbatch is asked for, unquoted."""
    machine = job.machine
    places = {
        "account": job.account,
        "partition": job.queue or machine.queue,
        "qos": job.qos or machine.qos,
        "constraint": job.constraint or machine.constraint,
        "reservation": job.reservation,
    }
    return [
        f"--job-name={job_name(job)}",
        f"--nodes={job.nodes}",
        f"--time={clock(job.time_s)}",
        *(f"--{key}={value}" for key, value in places.items() if value),
        "--ntasks-per-node=1",
        *_if(machine.cpus, f"--cpus-per-task={machine.cpus}"),
        *_if(machine.gpus_per_node, f"--gpus-per-node={machine.gpus_per_node}"),
        *_if(machine.exclusive, "--exclusive"),
        *_if(job.islands, f"--array=0-{job.islands - 1}"),
        f"--signal=B:USR1@{job.signal_s}",
        "--requeue" if job.chain == "requeue" else "--no-requeue",
        # the search goes on with the nodes that are left
        *_if(job.stage in ("search", "all", "check"), "--no-kill"),
        "--open-mode=append",
        f"--output={_output(job)}",
        *machine.directives,
        *job.options,
    ]


def _output(job: Job) -> str:
    """File of the job's output; Slurm puts its id for %j (of an array's %A and %a), a % for %%."""
    folder = str(job.out)
    if "\\" in folder:
        raise LaunchError(
            f"run folder {folder!r}: Slurm would not put the job's id into a name with a backslash; "
            "choose another folder (--out)"
        )
    name = "job-%A_%a.out" if job.islands else "job-%j.out"
    return f"{folder.replace('%', '%%')}/logs/{name}"


def pbs_options(job: Job) -> list[str]:
    """What qsub is asked for."""
    machine = job.machine
    kind = job.constraint or machine.constraint
    queue = job.queue or machine.queue
    return [
        f"-N {job_name(job)[:PBS_NAME_MAX].rstrip('-_')}",
        f"-l select={job.nodes}{f':{kind}' if kind else ''}",
        f"-l walltime={clock(job.time_s)}",
        *_if(job.account, f"-A {job.account}"),
        *_if(queue, f"-q {queue}"),
        *_if(job.islands, f"-J 0-{job.islands - 1}"),
        # an array must be rerunnable
        "-r y" if job.chain == "requeue" or job.islands else "-r n",
        "-j oe",
        "-k doe",
        f"-o {job.out}/logs/",
        *machine.directives,
        *job.options,
    ]


def _if(wanted: object, option: str) -> tuple[str, ...]:
    return (option,) if wanted else ()


def _environment(job: Job) -> list[str]:
    machine = job.machine
    software = [
        *(f"module load {shlex.quote(name)} || exit 2" for name in machine.modules),
        *machine.setup,
    ]
    variables = [f"export {name}={expanding(text)}" for name, text in machine.environment.items()]
    return [
        *_if(software, "# The software of this machine."),
        *software,
        *_if(variables, "# Its network and its devices."),
        *variables,
        "# What this job writes is its user's alone; nothing is imported from the folder it starts in.",
        "umask 077",
        "export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1",
    ]


def _command(job: Job) -> list[str]:
    python = (
        f'"${knobs.NODE_ENVIRONMENT}"/bin/python' if job.packed else shlex.quote(str(job.python))
    )
    words = [shlex.quote(word) for word in launch_arguments(job)]
    return [
        "# All the rest is this command's, which takes the place of the shell: signals reach it.",
        f"exec {python} -P -m dmi_hpc launch \\",
        *(f"  {word} \\" for word in words[:-1]),
        f"  {words[-1]}",
    ]
