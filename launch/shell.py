"""Words for the shell, and for the lines that schedulers read at the top of a batch script. Pure."""

from __future__ import annotations

import re
import shlex

from dmi_hpc.errors import LaunchError

_VARIABLE = re.compile(r"(\$[A-Za-z_][A-Za-z0-9_]*|\$\{[A-Za-z_][A-Za-z0-9_]*\})", re.ASCII)
_SPECIAL = re.compile(r'([\\"`$])')
_PLAIN = re.compile(r"[\w./:=@%+,&|*()\[\]-]+", re.ASCII)
_PLAIN_PBS = re.compile(r"[\w./:=@%+,^ -]+", re.ASCII)


def expanding(text: str) -> str:
    """A word in which $NAME and ${NAME} stand for variables, and nothing else is special."""
    if not _VARIABLE.search(text):
        return shlex.quote(text)
    parts = _VARIABLE.split(text)
    words = (part if i % 2 else _SPECIAL.sub(r"\\\1", part) for i, part in enumerate(parts))
    return f'"{"".join(words)}"'


def slurm_option(option: str) -> str:
    """An option as sbatch reads it from its script: a value may be in "..." with \\\\ and \\".

    Raises LaunchError for one that no line can hold.
    """
    if not option.isprintable():
        raise LaunchError(_REFUSED.format(repr(option), "it must be one line of plain text"))
    if _PLAIN.fullmatch(option):
        return option
    key, _, value = option.partition("=")
    if not re.fullmatch(r"--[a-z-]+", key):
        key, value = "", option
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{key}="{quoted}"' if key else f'"{quoted}"'


def pbs_option(option: str) -> str:
    """An option as qsub reads it from its script. Raises LaunchError for one it might misread."""
    if not _PLAIN_PBS.fullmatch(option):
        raise LaunchError(_REFUSED.format(repr(option), "letters, digits and ./:=@%+,^- only"))
    return option


_REFUSED = (
    "{}: a batch script cannot hold this option of the scheduler: {}. If it is the name of the run "
    "folder, choose another one (--out)"
)
