"""Every error that a user or a search can meet.

``DMIError`` (a ``ValueError``) is for the user: its message says what was found, what was expected
and what to do; the command line prints it without a traceback and exits with ``EXIT_USER_ERROR``.
``TrialFailure`` is for the search: a typed reason why one network got no fitness; never fatal.

Exit codes of every command: 0 done; 1 the training failed (``TrialFailure``) or a traceback; 2 the
user can mend it (``DMIError``); 69 another rank was lost; 75 interrupted: state is saved, requeue
it.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

EXIT_OK = 0
EXIT_USER_ERROR = 2
# EX_UNAVAILABLE of sysexits.h: another rank is gone, perhaps with its node; the last checkpoint is
# whole, and the same command with --resume continues. The machine's fault as long as it is not again.
EXIT_RANK_LOST = 69
# EX_TEMPFAIL of sysexits.h: state is saved, the same command with --resume continues. What a batch
# script tests to requeue its job.
EXIT_INTERRUPTED = 75
# schedulers, terminals and users ask for a stop by these
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

FailureKind = Literal["invalid", "memory", "nan", "timeout", "exception", "lost", "data", "limit"]
# of the machine, not of the network: a process that died, data or a disk that cannot be read
TRANSIENT: frozenset[FailureKind] = frozenset({"lost", "data"})


class DMIError(ValueError):
    """Something the user can mend: found / expected / what to do. echo: another rank met it."""

    echo = False


class RecipeError(DMIError):
    """A recipe key is unknown, mistyped or out of range."""


class DataError(DMIError):
    """A data set is missing, incomplete, corrupt, or not what the task expects."""


class CorruptShardError(DataError):
    """A shard's bytes are not the ones that were committed."""


class FormatVersionError(DataError):
    """A file was written by a newer version of its format than this one can read."""


class RunError(DMIError):
    """A run folder holds something else than what was asked for."""


class NetworkError(DMIError):
    """A network specification that cannot be built; names the layer."""


class CheckpointError(DMIError):
    """A checkpoint is missing, torn, or belongs to another network."""


class LaunchError(DMIError):
    """The ranks of a job contradict each other or cannot be started."""


class RankLost(LaunchError):
    """Another rank died, hangs, or left alone; names it. The last checkpoint is whole."""


class Interrupted(Exception):
    """A signal or deadline was obeyed: state is on disk, resume continues. Exit code 75."""


class TrialFailure(Exception):
    """One network got no fitness, and why.

    kind: ``invalid`` cannot be built; ``memory`` does not fit; ``nan`` loss not finite;
    ``timeout`` over its time limit; ``exception`` user code raised; ``lost`` its process died.
    """

    def __init__(self, kind: FailureKind, message: str, traceback: str = "") -> None:
        super().__init__(message)
        self.kind: FailureKind = kind
        self.message = message
        self.traceback = traceback


Failed = tuple[type[DMIError], str]  # how a rank tells the others


@contextmanager
def together(share: Callable[[Failed | None], list[Failed | None]]) -> Iterator[None]:
    """All ranks leave the block alike: if one fails in it, all raise, and none waits for it.

    share: from a rank's value to those of all ranks, in order, on every rank. A rank that failed
    raises its own error, the others one of its kind (a DMIError if it is another exception). No
    collectives inside the block.
    """
    try:
        yield
    except Exception as error:
        kind = type(error) if isinstance(error, DMIError) else DMIError
        share((kind, str(error) or type(error).__name__))
        raise
    for rank, failed in enumerate(share(None)):
        if failed is not None:
            kind, text = failed
            told = kind(f"rank {rank}: {text}")
            told.echo = True
            raise told


def counted(count: int, noun: str) -> str:
    """For messages: "1 row", "2,000 rows"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
