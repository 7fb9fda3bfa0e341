"""`GeneticSearch`: this package's evolution as the ``search_alg`` of any Ray Tune `Tuner`.

    from ray import tune
    from search.genetic_search import GeneticSearch

    tuner = tune.Tuner(
        trainable,
        param_space={"lr": tune.loguniform(1e-4, 1e-1), "units": tune.randint(8, 129)},
        tune_config=tune.TuneConfig(
            search_alg=GeneticSearch(seed=1), scheduler=tune.schedulers.ASHAScheduler(),
            metric="loss", mode="min", num_samples=100, max_concurrent_trials=8, reuse_actors=True,
        ),
    )

Set ``max_concurrent_trials``: without it Tune starts one trial at a time for any searcher that it
does not know itself. The names of the methods' arguments are Tune's calling convention.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from math import isfinite, isnan
from pathlib import Path
from typing import Any, Literal

from ray.tune.search import Searcher

from dmi_hpc.errors import RecipeError, RunError
from dmi_hpc.files import write_json
from search.evolution.evolve import (
    Evolution,
    EvolutionConfig,
    Failure,
    Outcome,
    Proposal,
    SpaceExhausted,
    Success,
)
from search.evolution.standing import Curve, Standing
from search.param_space import ParamSpace, converted
from search.records.journal import Journal, outcome_of, replay
from search.spaces.parameters import Parameters, Point

VERSION = 1
Mode = Literal["min", "max"]


class GeneticSearch(Searcher):  # type: ignore[misc]
    """Asynchronous evolution with an SVM that screens children, for Ray Tune.

    Trials that a scheduler stopped are compared with others at the last iteration that both reached.
    A score that is not a number, a missing one and an error are failures: they breed nothing, and
    the surrogate learns to avoid them. No configuration is tried twice.
    """

    def __init__(
        self,
        metric: str | None = None,
        mode: Mode | None = None,
        *,
        space: Mapping[str, Any] | None = None,
        points_to_evaluate: Sequence[Mapping[str, Any]] = (),
        journal: str | Path | None = None,
        time_attr: str = "training_iteration",
        **constants: Any,
    ) -> None:
        """metric, mode: may be left to the TuneConfig.

        space: as of `search.spaces.parameters.Parameters`, which knows conditional parameters, instead
        of domains in the param_space. points_to_evaluate: configurations to begin with, of the searched
        parameters. journal: file that records everything at once; if it exists, its evaluations are
        taken over and not repeated. time_attr: what a scheduler counts. constants: of
        `EvolutionConfig` (seed, population, initial, surrogate ...).
        """
        super().__init__(metric=metric, mode=mode)
        self.constants = EvolutionConfig(**constants)
        self._points, self._time_attr = list(points_to_evaluate), time_attr
        self._path = None if journal is None else Path(journal).absolute()
        self._given = None if space is None else ParamSpace(space, {})
        self._evaluated: list[tuple[Mapping[str, Any], Outcome | Curve]] = []
        self._state: dict[str, Any] | None = None  # to be taken over once the space is known
        self._clear()

    def _clear(self) -> None:
        self._param_space: ParamSpace | None = None
        self._evolution: Evolution[Point] | None = None
        self._journal: Journal | None = None
        self._standing = Standing()
        self._events: list[dict[str, Any]] = []  # asks and tells, as a journal has them
        self._again: deque[Proposal[Point]] = deque()
        self._numbers: dict[str, int] = {}  # of the trials in flight
        self._curves: dict[str, list[tuple[float, float]]] = {}

    # --- what Tune calls --------------------------------------------------------------------------

    def set_search_properties(
        self, metric: str | None, mode: Mode | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        self._metric: str | None = metric or self._metric
        self._mode: Mode | None = mode or self._mode
        found = converted(config)
        if found.spec and (self._evolution is not None or self._given is not None):
            return False  # Tune says that there are two spaces
        if self._evolution is None:
            self._begin(self._given or found)
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        evolution, param_space = self._ready()
        try:
            proposal = self._again.popleft() if self._again else self._asked(evolution)
        except SpaceExhausted:
            return str(Searcher.FINISHED)
        self._numbers[trial_id] = proposal.id
        assert isinstance(evolution.space, Parameters)
        return param_space.config(evolution.space, proposal.genome)

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        self._note(trial_id, result)

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        number = self._numbers.pop(trial_id, None)
        if number is None:
            return
        # Tune shows us no result for which a scheduler stops a trial, until it is complete
        stopped = result is not None and self._note(trial_id, result)
        curve = self._curves.pop(trial_id, [])
        if number in self._ready()[0].outcomes:
            return  # it was finished by the journal, and Tune had forgotten
        if error:
            why = "the trial ended with an error; Tune keeps it in the trial's error.txt"
            self._tell(number, Failure("exception", why))
        elif result is None:
            self._tell(number, Failure("lost", "the trial ended without a result"))
        elif not curve or not isfinite(curve[-1][1]):
            found = result.get(self._metric or "", "no value")
            self._tell(number, Failure("nan", f"the last result has {self._metric} = {found}"))
        else:
            self._tell(number, _curve(curve, ended=not stopped))

    def add_evaluated_point(
        self,
        parameters: Mapping[str, Any],
        value: float,
        error: bool = False,
        pruned: bool = False,
        intermediate_values: list[float] | None = None,
    ) -> None:
        """Take over a configuration evaluated elsewhere; one that is known already is left out.

        intermediate_values: at iterations 1, 2, ...; a pruned point needs them to count.
        """
        if error or value is None or not isfinite(value):
            outcome: Outcome | Curve = Failure(
                "exception" if error else "nan", "evaluated elsewhere"
            )
        elif pruned and not intermediate_values:
            outcome = Failure("lost", "stopped, nobody said when")
        else:
            scores = intermediate_values or [value]
            signed = [(float(i), self._signed(v)) for i, v in enumerate(scores, start=1)]
            outcome = _curve(signed, ended=not pruned)
        self._evaluated.append((parameters, outcome))
        if self._evolution is not None:
            self._take_evaluated()

    def save(self, checkpoint_path: str) -> None:
        write_json(Path(checkpoint_path), self._as_state())

    def restore(self, checkpoint_path: str) -> None:
        state = json.loads(Path(checkpoint_path).read_text(encoding="utf-8"))
        if state.get("version") != VERSION:
            raise RunError(f"{checkpoint_path}: found no state of GeneticSearch, version {VERSION}")
        # a restored Tuner tells neither space nor metric, unless it is given a param_space again
        param_space = self._param_space or ParamSpace.from_json(state["space"])
        self._metric = self._metric or state["metric"]
        self._mode = self._mode or state["mode"]
        self._clear()
        self._state = state
        if param_space is not None:
            self._begin(param_space)

    def __getstate__(self) -> dict[str, Any]:
        kept = {k: v for k, v in self.__dict__.items() if k not in ("_evolution", "_standing")}
        return {**kept, "_state": self._as_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        param_space = self._param_space
        self._clear()
        if param_space is not None:
            self._begin(param_space)

    # --- the search -------------------------------------------------------------------------------

    @property
    def evolution(self) -> Evolution[Point]:
        """The evolution within; RunError before Tune has told the space."""
        return self._ready()[0]

    def _ready(self) -> tuple[Evolution[Point], ParamSpace]:
        if self._evolution is None or self._param_space is None:
            raise RunError(
                "GeneticSearch knows no space yet: give it to a Tuner with a param_space"
            )
        return self._evolution, self._param_space

    def _begin(self, param_space: ParamSpace) -> None:
        """Make the evolution of this space, and bring it to where journal and state say."""
        if not param_space.spec:
            raise RecipeError(
                "param_space: found no domain to search, expected some, e.g. tune.uniform(0, 1); or "
                "give GeneticSearch a space of search.parameters"
            )
        founders = [param_space.plain(point) for point in self._points]
        space = Parameters(param_space.spec, founders=founders)
        self._param_space = param_space
        self._evolution = Evolution(space, self.constants)
        state = self._state or {"events": [], "numbers": {}, "curves": {}}
        if self._path is not None:
            self._open_journal(self._evolution, self._path)
        else:
            for event in state["events"]:
                self._replay(event)
        self._numbers = dict(state["numbers"])
        self._curves = {t: [(i, v) for i, v in curve] for t, curve in state["curves"].items()}
        running = set(self._numbers.values())
        self._again.extend(p for p in self._evolution.pending() if p.id not in running)
        self._state = None
        self._take_evaluated()

    def _open_journal(self, evolution: Evolution[Point], path: Path) -> None:
        if not path.exists():
            extra = {"metric": self._metric, "mode": self._mode}
            self._journal = Journal.create(path, evolution, extra)
            return
        self._journal = Journal.open(path)
        was = self._journal.header()["config"]
        if (was.get("metric"), was.get("mode")) != (self._metric, self._mode):
            raise RunError(
                f"{path}: the journal of metric {was.get('metric')} ({was.get('mode')}), found "
                f"{self._metric} ({self._mode}): choose another file"
            )
        replay(self._journal, evolution)
        for event in self._journal.events():
            self._place(event)
        self._journal.resumed()

    def _replay(self, event: dict[str, Any]) -> None:
        """An ask or tell of a saved state."""
        evolution, _ = self._ready()
        if event["event"] == "ask":
            genome = evolution.space.from_json(event["genome"])
            identity, parents = evolution.space.identity(genome), tuple(event["parents"])
            evolution.restore_ask(
                Proposal(
                    event["id"], genome, event["origin"], parents, identity, event["predicted"]
                )
            )
        else:
            evolution.tell(event["id"], outcome_of(event))
            self._place(event)
        self._events.append(event)

    def _place(self, event: Mapping[str, Any]) -> None:
        """Remember the curve of a recorded success."""
        if event["event"] == "tell" and event["status"] == "ok":
            told = event["metrics"]
            curve = Curve(tuple(told["iterations"]), tuple(told["scores"]), told["ended"])
            self._standing.restore(curve, event["fitness"])

    def _asked(self, evolution: Evolution[Point]) -> Proposal[Point]:
        return self._recorded(evolution.ask())

    def _recorded(self, proposal: Proposal[Point]) -> Proposal[Point]:
        genome = self._ready()[0].space.to_json(proposal.genome)
        if self._journal is not None:
            self._journal.ask(proposal, genome)
        else:
            about = {
                name: getattr(proposal, name) for name in ("id", "origin", "parents", "predicted")
            }
            self._events.append({"event": "ask", "genome": genome, **about})
        return proposal

    def _note(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """Add a result to the trial's curve; False if it is not newer than the last one."""
        curve = self._curves.setdefault(trial_id, [])
        iteration = float(result.get(self._time_attr, len(curve) + 1))
        if self._metric is None or self._metric not in result:
            return False
        if curve and iteration <= curve[-1][0]:
            return False
        curve.append((iteration, self._signed(result[self._metric])))
        return True

    def _signed(self, value: float) -> float:
        return -float(value) if self._mode == "max" else float(value)

    def _tell(self, number: int, ended: Outcome | Curve) -> None:
        """Record how a trial ended, then let the evolution learn it."""
        metrics: dict[str, Any] = {}
        outcome = ended
        if isinstance(ended, Curve):
            outcome = Success(self._standing.add(ended))
            metrics = {
                "iterations": list(ended.iterations),
                "scores": list(ended.scores),
                "ended": ended.ended,
            }
        assert isinstance(outcome, Success | Failure)
        if self._journal is not None:
            self._journal.tell(number, outcome, 0.0, metrics)
        else:
            self._events.append(_tell_event(number, outcome, metrics))
        self.evolution.tell(number, outcome)

    def _take_evaluated(self) -> None:
        evolution, param_space = self._ready()
        assert isinstance(evolution.space, Parameters)
        known = {proposal.hash for proposal in evolution.proposals.values()}
        for parameters, ended in self._evaluated:
            genome = evolution.space.point(param_space.plain(parameters))
            identity = evolution.space.identity(genome)
            if identity in known:
                continue
            number = max(evolution.proposals, default=-1) + 1
            proposal = Proposal(number, genome, "given", (), identity)
            evolution.restore_ask(proposal)
            self._recorded(proposal)
            self._tell(number, ended)
            known.add(identity)
        self._evaluated = []

    def _as_state(self) -> dict[str, Any]:
        """Plain data, from which `_begin` continues."""
        if self._state is not None:
            return self._state
        param_space = self._param_space or ParamSpace({}, {})
        return {
            "version": VERSION,
            "metric": self._metric,
            "mode": self._mode,
            "space": param_space.to_json(),
            "events": list(self._events),
            "numbers": dict(self._numbers),
            "curves": {trial: list(curve) for trial, curve in self._curves.items()},
        }


def _curve(points: Sequence[tuple[float, float]], *, ended: bool) -> Curve:
    """Without what is no number on the way: the last one is one."""
    iterations, scores = zip(*[(i, v) for i, v in points if not isnan(v)], strict=True)
    return Curve(iterations, scores, ended)


def _tell_event(number: int, outcome: Outcome, metrics: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(outcome, Success):
        told: dict[str, Any] = {"status": "ok", "fitness": outcome.fitness}
    else:
        told = {"status": "failed", "failure": outcome.kind, "message": outcome.message}
        told["traceback"] = ""
    return {"event": "tell", "id": number, **told, "metrics": metrics}
