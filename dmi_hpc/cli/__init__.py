"""``dmi``: one command, its sub-commands imported only when named.

Exit codes: 0 done; 1 a failure with a traceback or a typed training failure; 2 something the user
can mend; 69 another rank was lost; 75 stopped by a signal or deadline with all state saved
(``--resume`` continues).
"""

from __future__ import annotations

import importlib
import importlib.util
import signal
import sys
from contextlib import suppress
from pathlib import Path

from dmi_hpc import __version__, knobs
from dmi_hpc.errors import (
    EXIT_INTERRUPTED,
    EXIT_RANK_LOST,
    EXIT_USER_ERROR,
    STOP_SIGNALS,
    DMIError,
    Interrupted,
    RankLost,
    TrialFailure,
)

# name -> (module with a typer `app`, one line of help)
COMMANDS: dict[str, tuple[str, str]] = {
    "data": ("dmi_hpc.cli.data", "build, import and check shard sets"),
    "train": (
        "dmi_hpc.cli.train",
        "train one network, data-parallel over the ranks it is started on",
    ),
    "search": ("search.cli", "asynchronous genetic search for the best network"),
    "evaluate": ("dmi_hpc.cli.evaluate", "score a trained network next to the baselines"),
    "study": ("dmi_hpc.cli.study", "a recipe with several seeds, folds or sizes, and their spread"),
    "predict": ("dmi_hpc.cli.predict", "predict a user's inputs with a trained network"),
    "screen": (
        "dmi_hpc.cli.screen",
        "all compositions of chosen elements, ranked by the convex hull",
    ),
    "rank": ("dmi_hpc.cli.rank", "compounds by substitution, ranked by a classifier of sites"),
    "project": ("dmi_hpc.cli.project", "inputs as a trained network sees them, layer by layer"),
    "export": ("dmi_hpc.cli.export", "a trained network for other programs: ONNX, torch.export"),
    "report": ("dmi_hpc.cli.report", "one self-contained HTML file of a run"),
    "launch": ("launch.cli", "start any of these, or all: here, on many nodes, as a job"),
    "info": ("dmi_hpc.cli.info", "versions, hardware, ranks; or the state of a run"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            f"dmi {__version__}: from a materials data set to the best network",
            "",
            "usage: dmi COMMAND [OPTIONS]        dmi COMMAND --help",
            "",
            *lines,
            "",
        ]
    )


def check_install() -> None:
    """Refuse to run if another `search` or `launch` shadows ours; says which file it is."""
    home = Path(__file__).resolve().parents[2]
    for name in ("search", "launch"):
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).resolve() if spec is not None and spec.origin else None
        if origin != home / name / "__init__.py":
            raise DMIError(
                f"package '{name}': found {origin or 'nothing'}, expected "
                f"{home / name / '__init__.py'}. Rename that file or leave its folder (it stands "
                "before DMI-HPC on Python's path), or reinstall dmi-hpc"
            )


def _is_first() -> bool:
    from dmi_hpc.world import detect

    return detect().is_first


def main() -> None:
    """Entry point of the `dmi` console script."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(usage())
        return
    if arguments[0] == "--version":
        sys.stdout.write(f"{__version__}\n")
        return
    try:
        check_install()
        if arguments[0] not in COMMANDS:
            raise DMIError(f"no command '{arguments[0]}'; commands: {', '.join(COMMANDS)}")
        if arguments[0] in ("train", "launch"):  # until their own handlers stand: imports take long
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        app = importlib.import_module(COMMANDS[arguments[0]][0]).app
        app(arguments[1:], prog_name=f"dmi {arguments[0]}")
    except DMIError as error:
        if knobs.debug():
            raise
        if not error.echo or _is_first():  # not once for each of a thousand ranks
            sys.stderr.write(f"error: {error}\n")
        sys.exit(EXIT_RANK_LOST if isinstance(error, RankLost) else EXIT_USER_ERROR)
    except TrialFailure as failure:
        sys.stderr.write(f"failed ({failure.kind}): {failure.message}\n{failure.traceback}")
        sys.exit(1)
    except Interrupted as stop:
        with suppress(OSError):  # a closed terminal changes nothing: state is saved
            hint = "" if arguments[0] == "study" else knobs.resume_hint()  # it has no --resume
            sys.stderr.write(f"interrupted: {stop}{hint}\n")
        sys.exit(EXIT_INTERRUPTED)
