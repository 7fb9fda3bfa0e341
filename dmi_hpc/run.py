"""A run folder: one recipe and everything made from it.

run.json        identity: recipe, its fingerprint, versions, hardware, the commands given
data/           shard set, unless the recipe names another
search/         journal.jsonl, winner.json
train/          network.json, plan.json, metrics.jsonl, status.json, checkpoints/, tensorboard/
evaluation.json predictions.csv gallery/ report.html
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from dmi_hpc.config import Recipe, parse
from dmi_hpc.data.manifest import read_manifest, require_identity
from dmi_hpc.errors import RunError
from dmi_hpc.files import TEMP_PREFIX, write_json, writing
from dmi_hpc.models.spec import NetworkSpec

FORMAT_VERSION = 1
PACKAGES = ("dmi-hpc", "torch", "deepspeed", "ray", "mpi4py", "h5py", "numpy", "scipy")


@dataclass(frozen=True)
class Run:
    """Paths of a run folder; nothing is read or made by constructing it."""

    folder: Path
    recipe: Recipe

    @property
    def data(self) -> Path:
        return self.recipe.data.path or self.folder / "data"

    @property
    def search(self) -> Path:
        return self.folder / "search"

    @property
    def train(self) -> Path:
        return self.folder / "train"

    @property
    def checkpoints(self) -> Path:
        return self.train / "checkpoints"

    @property
    def winner(self) -> Path:
        return self.search / "winner.json"


def open_run(folder: Path, recipe: Recipe | None = None) -> Run:
    """The run in `folder`; with a recipe, made if the folder is new or empty.

    A recipe that differs in its `RESOURCES` alone replaces the stored one. Raises RunError if the
    folder holds another run, something else, or (without recipe) no run.
    """
    identity = folder / "run.json"
    if not identity.exists():
        if recipe is None:
            raise RunError(f"{folder}: no run here (no run.json). Start one with: dmi train RECIPE")
        with writing(folder):
            if folder.exists() and any(_foreign(p) for p in folder.iterdir()):
                raise RunError(
                    f"{folder}: the folder is not empty and holds no run; choose another --out"
                )
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _create(identity, recipe)
        return Run(folder, recipe)
    content = _read(identity)
    stored = parse(Recipe, content["recipe"], where=str(identity))
    if recipe is None or recipe == stored:
        return Run(folder, stored)
    if recipe.fingerprint() != stored.fingerprint():
        raise RunError(
            f"{folder}: holds another run: {_difference(stored, recipe)}. "
            "Choose another --out, or remove the folder if it is no longer needed"
        )
    with writing(folder):
        write_json(identity, {**content, "recipe": recipe.model_dump(mode="json")})
    return Run(folder, recipe)


def _foreign(path: Path) -> bool:
    """Not of a run that begins: islands of a search may begin it together, or a job is to."""
    return path.name not in ("logs", "launch", "run.json") and not path.name.startswith(TEMP_PREFIX)


def _read(identity: Path) -> dict[str, Any]:
    """Content of run.json. Raises RunError if it is damaged or newer."""
    try:
        content = json.loads(identity.read_text())
        version, recipe, commands = (content[key] for key in ("version", "recipe", "commands"))
        whole = isinstance(version, int) and isinstance(recipe, dict) and isinstance(commands, list)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(identity, f"{type(error).__name__}: {error}") from None
    if not whole:
        raise _damaged(identity, "version, recipe or commands are of a wrong type")
    if version > FORMAT_VERSION:
        raise RunError(f"{identity}: written by a newer DMI-HPC (format {version})")
    return dict(content)


def _damaged(identity: Path, reason: str) -> RunError:
    return RunError(
        f"{identity}: damaged ({reason}). Put a copy of the file back, or choose another --out"
    )


def _create(identity: Path, recipe: Recipe) -> None:
    write_json(
        identity,
        {
            "version": FORMAT_VERSION,
            "name": recipe.name,
            "task": recipe.task["name"],
            "seed": recipe.seed,
            "fingerprint": recipe.fingerprint(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "recipe": recipe.model_dump(mode="json"),
            "versions": {"python": platform.python_version(), **versions()},
            "hardware": hardware(),
            "commands": [],
        },
    )


def record_command(run: Run) -> None:
    """Add this process's command, as a shell line for any folder, to the run's list."""
    identity = run.folder / "run.json"
    content = _read(identity)
    paths = os.environ.get("PYTHONPATH")  # where a user's own task is found
    given = f"PYTHONPATH={shlex.quote(paths)} " if paths else ""
    command = f"cd {shlex.quote(str(Path.cwd()))} && {given}{shlex.join(['dmi', *sys.argv[1:]])}"
    if command not in content["commands"]:
        content["commands"].append(command)
        write_json(identity, content)


def _difference(stored: Recipe, given: Recipe) -> str:
    old, new = _flat(stored.identity()), _flat(given.identity())
    return "; ".join(
        f"{key} there is {_short(old.get(key))}, here {_short(new.get(key))}"
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    )


def _flat(tables: dict[str, Any]) -> dict[str, Any]:
    """With keys such as "train.epochs"."""
    flat: dict[str, Any] = {}
    for name, value in tables.items():
        inner = value if isinstance(value, dict) else {}
        flat |= {f"{name}.{key}": each for key, each in inner.items()} if inner else {name: value}
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else text[:200] + "..."


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def hardware() -> dict[str, Any]:
    """Cores this process may use, memory, and GPUs."""
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "host_cores": len(os.sched_getaffinity(0)),
        "memory_GB": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def network_to_train(run: Run, published: NetworkSpec) -> tuple[NetworkSpec, dict[str, Any]]:
    """(network, changed [train] keys) that the recipe's [model] asks for.

    Raises RunError without the search that it asks for, DataError if that was on other data.
    """
    model = run.recipe.model
    if model.source == "published":
        return published, {}
    if model.source == "layers":
        return published.model_copy(update={"layers": model.layers}), {}
    if not run.winner.exists():
        raise RunError(
            f"{run.winner}: model.source is 'search' but no search has finished in this run. "
            f"First: dmi search RECIPE --out {run.folder}"
        )
    winner = json.loads(run.winner.read_text())
    # its validation rows chose it: on another data set they may be test rows
    if recorded := winner.get("data"):
        require_identity(recorded, read_manifest(run.data).identity, maker=f"{run.winner}")
    return NetworkSpec.model_validate(winner["network"]), dict(winner["hyper"])
