"""Ray Tune's ``param_space`` as `search.spaces.parameters`: domains and the rest."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import ceil, floor, isfinite
from typing import Any

from pydantic import TypeAdapter
from ray.tune.search.sample import (
    Categorical,
    Domain,
    Float,
    Function,
    Integer,
    LogUniform,
    Normal,
    Quantized,
    Uniform,
)

from dmi_hpc.errors import RecipeError
from search.spaces.parameters import SEPARATOR, Choice, Parameter, Parameters, Point, Value
from search.spaces.parameters import Integer as IntegerRange
from search.spaces.parameters import Real as RealRange

ROUNDING = 1e-9  # of bounds in units of the quantum, as Ray forgives
SIGMAS = 3
PARAMETER: TypeAdapter[Choice | RealRange | IntegerRange] = TypeAdapter(Parameter)


@dataclass(frozen=True)
class ParamSpace:
    """The searched part of a param_space.

    spec: nested, for `Parameters`. labels: of a choice among things that are no plain values, by its
    path: what stands for each of them in genomes and journals.
    """

    spec: Mapping[str, Any]
    labels: Mapping[str, Mapping[str, Any]]

    def config(self, space: Parameters, point: Point) -> dict[str, Any]:
        """The part of a trial's config that is searched, nested as in the param_space."""
        return _translated(space.config(point), self.labels, lambda table, label: table[label])

    def plain(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """`config` reduced to what is searched; inverse of `config` for `Parameters.point`.

        config: nested, or flat with "/" in the names. Raises RecipeError if something is missing.
        """
        chosen = _selected(self.spec, config, "")
        return _translated(chosen, self.labels, _label_of)

    def to_json(self) -> dict[str, Any]:
        """Plain data; of labels only where there are any: what they stand for may be no data."""
        return {"spec": _dumped(self.spec), "labels": sorted(self.labels)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ParamSpace | None:
        """Inverse of `to_json`; None if it was empty or had labels."""
        if data["labels"] or not data["spec"]:
            return None
        return cls(_read(data["spec"]), {})


def _dumped(part: Any) -> Any:
    if isinstance(part, Choice | RealRange | IntegerRange):
        return part.model_dump(mode="json")
    if isinstance(part, Mapping):
        return {name: _dumped(inner) for name, inner in part.items()}
    return part  # a constant


def _read(part: Any) -> Any:
    if not isinstance(part, Mapping):
        return part
    if isinstance(part.get("kind"), str):
        return PARAMETER.validate_python(part)
    return {name: _read(inner) for name, inner in part.items()}


def _label_of(table: Mapping[str, Any], value: Any) -> str:
    for label, known in table.items():
        if known is value or known == value:
            return label
    raise RecipeError(f"found {value!r}, expected one of {', '.join(table)}")


def _selected(spec: Mapping[str, Any], config: Mapping[str, Any], path: str) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    for name, part in spec.items():
        where = f"{path}{name}"
        if isinstance(part, Mapping):
            inner = config.get(name, config)
            chosen[name] = _selected(part, inner, f"{where}{SEPARATOR}")
        elif name in config or where in config:
            chosen[name] = config[name] if name in config else config[where]
        else:
            raise RecipeError(
                f"an evaluated point has no value for '{where}'; it has: {', '.join(config)}"
            )
    return chosen


def _translated(
    config: Mapping[str, Any],
    labels: Mapping[str, Mapping[str, Any]],
    translate: Callable[[Mapping[str, Any], Any], Any],
    path: str = "",
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in config.items():
        where = f"{path}{name}"
        if where in labels:
            result[name] = translate(labels[where], value)
        elif isinstance(value, Mapping):
            result[name] = _translated(value, labels, translate, f"{where}{SEPARATOR}")
        else:
            result[name] = value
    return result


def converted(param_space: Mapping[str, Any]) -> ParamSpace:
    """Raises RecipeError for what cannot be searched, and says what to write instead."""
    labels: dict[str, dict[str, Any]] = {}
    spec = _level(param_space, "", labels)
    return ParamSpace(spec, labels)


def _level(
    level: Mapping[str, Any], path: str, labels: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    spec: dict[str, Any] = {}
    for name, value in level.items():
        where = f"{path}{name}"
        if isinstance(value, Domain):
            _require_plain_name(name, where)
            spec[name] = _parameter(value, where, labels)
        elif isinstance(value, Mapping):
            if set(value) == {"grid_search"}:
                raise _refused(where, "tune.grid_search", "tune.choice with the same values")
            inner = _level(value, f"{where}{SEPARATOR}", labels)
            if inner:
                _require_plain_name(name, where)
                spec[name] = inner
        elif isinstance(value, list | tuple) and any(_domains(value)):
            raise _refused(where, "a domain inside a list", "a dict, with a key for each entry")
    return spec


def _domains(value: Any) -> Iterator[Domain]:
    """All domains anywhere in a value."""
    if isinstance(value, Domain):
        yield value
    elif isinstance(value, Mapping):
        yield from _domains(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _domains(item)


def _require_plain_name(name: Any, where: str) -> None:
    if not isinstance(name, str) or SEPARATOR in name:
        raise _refused(where, f"the key {name!r}", f"a string without '{SEPARATOR}'")


def _refused(where: str, found: str, instead: str) -> RecipeError:
    return RecipeError(f"param_space: '{where}' is {found}, which is not searched: use {instead}")


def _parameter(domain: Domain, where: str, labels: dict[str, dict[str, Any]]) -> Any:
    sampler, quantum = domain.get_sampler(), None
    if isinstance(sampler, Quantized):
        quantum, sampler = sampler.q, sampler.get_sampler()
    if isinstance(domain, Function):
        raise _refused(where, "tune.sample_from", "a domain here, and compute in the trainable")
    if isinstance(sampler, Normal):
        low, high = sampler.mean - SIGMAS * sampler.sd, sampler.mean + SIGMAS * sampler.sd
        raise _refused(where, "tune.randn, without bounds", f"tune.uniform({low:g}, {high:g})")
    if isinstance(domain, Categorical) and isinstance(sampler, Uniform):
        return _choice(domain.categories, where, labels)
    if isinstance(domain, Float | Integer) and isinstance(sampler, Uniform | LogUniform):
        return _range(domain, quantum, isinstance(sampler, LogUniform), where)
    raise _refused(where, f"a {type(domain).__name__} domain ({sampler})", "tune.choice or a range")


def _range(domain: Float | Integer, quantum: float | None, log: bool, where: str) -> Any:
    low, high = domain.lower, domain.upper
    if not (isfinite(low) and isfinite(high)):
        raise _refused(where, f"a range from {low} to {high}", "finite bounds")
    if quantum is not None:
        low = ceil(low / quantum - ROUNDING) * quantum
        high = floor(high / quantum + ROUNDING) * quantum
    whole = isinstance(domain, Integer)
    if whole and quantum in (None, 1):
        high -= 1  # Ray's upper bounds of integers are exclusive, unless quantised
    if high < low:
        raise _refused(where, f"{domain.domain_str}, which holds no value", "wider bounds")
    if high == low:
        return Choice(values=(low,))
    if whole:
        return IntegerRange(low=int(low), high=int(high), log=log, step=int(quantum or 1))
    return RealRange(low=low, high=high, log=log, step=quantum)


def _choice(values: list[Any], where: str, labels: dict[str, dict[str, Any]]) -> Choice:
    if any(_domains(values)):
        raise _refused(
            where,
            "a tune.choice among values that hold domains",
            "keys beside each other: the trainable ignores those that do not apply",
        )
    if all(isinstance(value, Value) for value in values):
        distinct = {json.dumps(value): value for value in values}
        if len(set(distinct.values())) == len(distinct):
            return Choice(values=tuple(distinct.values()))
    # by number and not by text alone: two functions may look alike
    labels[where] = {f"{number}: {value!r:.60}": value for number, value in enumerate(values)}
    return Choice(values=tuple(labels[where]))
