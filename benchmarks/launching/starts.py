"""What a starting process asks of the file system: counted by strace, by kind and by path."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

# name of a system call -> what a metadata server is asked for. An open of a folder is part of its
# listing; fstat of an open file (an empty path) is answered by the client itself.
KINDS = {
    **dict.fromkeys(("open", "openat"), "open"),
    **dict.fromkeys(("stat", "lstat", "newfstatat", "statx"), "stat"),
    **dict.fromkeys(("access", "faccessat", "faccessat2"), "stat"),
    **dict.fromkeys(("readlink", "readlinkat"), "stat"),
    **dict.fromkeys(("getdents64",), "list"),
    **dict.fromkeys(("execve",), "open"),
}
_CALL = re.compile(r"^(?P<pid>\d+) +(?P<name>\w+)\((?P<rest>.*)$")
_RESUMED = re.compile(r"^(?P<pid>\d+) +<\.\.\. \w+ resumed>(?P<rest>.*)$")
_UNFINISHED = " <unfinished ...>"
_PATH = re.compile(r'"((?:[^"\\]|\\.)*)"')
_FOLDER = re.compile(r"^(?:AT_FDCWD|\d+)<((?:[^>\\]|\\.)*)>")


@dataclass(frozen=True)
class Call:
    """One system call: kind as in KINDS, absolute path, whether it found what it asked for."""

    kind: str
    path: str
    found: bool


def calls_of(lines: Iterable[str]) -> list[Call]:
    """The metadata calls in the output of `strace -f -y`; a call that another one interrupted is put
    together again."""
    begun: dict[str, tuple[str, str]] = {}
    calls: list[Call | None] = []
    for line in lines:
        whole = line.rstrip("\n")
        if (resumed := _RESUMED.match(whole)) is not None:
            name, head = begun.pop(resumed["pid"], ("", ""))
            calls.append(_call(name, head + resumed["rest"]))
        elif (match := _CALL.match(whole)) is not None:
            if whole.endswith(_UNFINISHED):
                begun[match["pid"]] = match["name"], match["rest"].removesuffix(_UNFINISHED)
            else:
                calls.append(_call(match["name"], match["rest"]))
    return [call for call in calls if call is not None]


def _call(name: str, rest: str) -> Call | None:
    kind, folder, named = KINDS.get(name), _FOLDER.match(rest), _PATH.search(rest)
    if kind is None:
        return None
    base = folder[1] if folder else "/"
    if kind == "list":
        return Call(kind, base, True)
    if named is None or named[1] == "":
        return None
    return Call(
        kind,
        os.path.normpath(named[1] if named[1].startswith("/") else f"{base}/{named[1]}"),
        " = -1 " not in rest,
    )


@dataclass(frozen=True)
class Load:
    """Calls below some folders. paths: different ones, which is what a client asks for that keeps all
    answers; files, bytes: different ones that were opened, and their whole size."""

    opens: int
    stats: int
    lists: int
    missing: int
    paths: int
    files: int
    bytes: int

    @property
    def calls(self) -> int:
        return self.opens + self.stats + self.lists

    def __sub__(self, other: Load) -> Load:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Load(*(mine - theirs for mine, theirs in pairs))


def load_of(calls: Iterable[Call], folders: Sequence[Path]) -> Load:
    """Of the calls whose path lies in one of `folders` (absolute)."""
    heads = tuple(f"{folder}/" for folder in folders)
    ours = [call for call in calls if f"{call.path}/".startswith(heads)]
    kinds = [call.kind for call in ours]
    opened = {call.path for call in ours if call.kind == "open" and call.found}
    files = [path for path in map(Path, opened) if path.is_file()]
    return Load(
        opens=kinds.count("open"),
        stats=kinds.count("stat"),
        lists=kinds.count("list"),
        missing=sum(not call.found for call in ours),
        paths=len({call.path for call in ours}),
        files=len(files),
        bytes=sum(path.stat().st_size for path in files),
    )


def environment_folders() -> tuple[Path, ...]:
    """What would lie on a shared file system: environment, interpreter, and these sources."""
    prefixes = (sys.prefix, sys.base_prefix, str(Path(__file__).parents[2]))
    return tuple(dict.fromkeys(Path(each).resolve() for each in prefixes))


def traced(arguments: Sequence[str], folder: Path, env: dict[str, str] | None = None) -> list[Call]:
    """Run this interpreter with `arguments` under strace. RuntimeError if it fails."""
    log = folder / "strace.log"
    strace = ["strace", "-f", "-y", "-s", "4096", "--seccomp-bpf", "-o", str(log)]
    strace += ["-e", f"trace={','.join(KINDS)}"]
    done = subprocess.run(
        [*strace, sys.executable, "-P", *arguments],
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=600,
    )
    if done.returncode:
        raise RuntimeError(f"{arguments[:3]} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    with log.open(errors="replace") as lines:
        return calls_of(lines)


def seconds_of(arguments: Sequence[str], env: dict[str, str] | None = None) -> tuple[float, float]:
    """(wall, processor) seconds of this interpreter with `arguments`: the better of two, files warm."""
    found = []
    for _ in range(2):
        before, began = os.times(), time.perf_counter()
        command = [sys.executable, "-P", *arguments]
        subprocess.run(
            command, env={**os.environ, **(env or {})}, capture_output=True, check=True, timeout=600
        )
        wall, after = time.perf_counter() - began, os.times()
        used = after.children_user + after.children_system
        found.append((wall, used - before.children_user - before.children_system))
    return min(found)


# Ray with `workers` actors that have imported what a trial needs; ends when all have answered
RAY_PROGRAM = """
import json, sys
import ray
workers, folder = json.loads(sys.argv[1])
ray.init(address="local", num_cpus=max(1, workers), include_dashboard=False,
         object_store_memory=100_000_000, _temp_dir=folder, log_to_driver=False)
@ray.remote(num_cpus=1)
class Actor:
    def ready(self):
        import search.cluster.tune, search.trials.trial
        return 0
actors = [Actor.remote() for _ in range(workers)]
ray.get([actor.ready.remote() for actor in actors])
"""


def ray_arguments(workers: int, folder: Path) -> list[str]:
    return ["-c", RAY_PROGRAM, json.dumps([workers, str(folder)])]
