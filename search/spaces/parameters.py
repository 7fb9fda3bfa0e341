"""Plain parameters as a search space: choices, reals and integers, nested and conditional.

    space = Parameters({
        "optimizer": {
            "name": Choice(values=("adam", "sgd")),
            "learning_rate": Real(low=1e-5, high=1e-1, log=True),
            "momentum": Real(low=0.0, high=0.99, when={"optimizer/name": ("sgd",)}),
        },
        "units": Integer(low=16, high=1024, log=True),
        "epochs": 50,                                   # a constant
    })
    evolution = Evolution(space, EvolutionConfig(seed=1))
    proposal = evolution.ask()
    config = space.config(proposal.genome)              # nested as above, without what is inactive

The same from TOML: ``Parameters.from_data(tomllib.load(file))``, where a table with a ``kind`` is a
parameter and any other one a level of nesting.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any

import numpy as np
import xxhash
from pydantic import TypeAdapter, ValidationError

from dmi_hpc.errors import RecipeError
from search.base import Vector
from search.spaces.kinds import Choice, Integer, Parameter, Real, Value

__all__ = ["Choice", "Integer", "Parameter", "Parameters", "Point", "Real", "Spec", "Value"]

Point = tuple[tuple[str, Value], ...]  # flat names and values of what is active, sorted by name
Spec = Mapping[str, Any]  # of Parameter, Value (a constant) or Spec
Flat = Mapping[str, Value]

SEPARATOR = "/"
AGAIN = 0.4  # chance that a mutation changes one more parameter
AFRESH = 0.25  # chance that a mutation draws a number anew instead of taking a step

_PARAMETER: TypeAdapter[Parameter] = TypeAdapter(Parameter)


class Parameters:
    """Plain parameters as a ``search.base.Space``; names of nested ones are joined by "/"."""

    def __init__(
        self,
        spec: Spec,
        *,
        founders: Sequence[Mapping[str, Any]] = (),
        canonical: Callable[[Flat], Flat] | None = None,
        features: Callable[[Flat], Sequence[float]] | None = None,
    ) -> None:
        """founders: known good configurations, nested or flat and complete, evaluated first.

        canonical: the normal form of a flat configuration, equal for those that mean the same, of
        values that the space has. features: numbers of about unit scale, in place of our own.
        Raises RecipeError if `spec` or a founder makes no sense.
        """
        self.parameters = _in_order(_flat(spec))
        self._canonical, self._own_features = canonical, features
        self._width = sum(len(p.absent()) for p in self.parameters.values())
        self._varied = {name for name, p in self.parameters.items() if p.varies}
        self._coded = {  # of choices: worked out once
            name: {value: p.numbers(value) for value in p.values}
            for name, p in self.parameters.items()
            if isinstance(p, Choice)
        }
        self._founders = [self.point(founder) for founder in founders]

    @classmethod
    def from_data(cls, data: Mapping[str, Any], **options: Any) -> Parameters:
        """From TOML or JSON; options as of the constructor."""
        return cls(_parsed(data), **options)

    def config(self, genome: Point) -> dict[str, Any]:
        """The configuration, nested as the spec was."""
        nested: dict[str, Any] = {}
        for name, value in genome:
            *path, last = name.split(SEPARATOR)
            level = nested
            for part in path:
                level = level.setdefault(part, {})
            level[last] = value
        return nested

    def point(self, config: Mapping[str, Any]) -> Point:
        """The genome of a nested or flat configuration; RecipeError if the space does not have it.

        Values of inactive parameters are dropped.
        """
        values = _flat_values(config)
        if unknown := sorted(set(values) - set(self.parameters)):
            known = ", ".join(self.parameters)
            raise RecipeError(f"unknown parameters {', '.join(unknown)}; the space has {known}")
        for name, parameter in self.parameters.items():
            if not _active(parameter, values):
                values.pop(name, None)
            elif name not in values:
                raise RecipeError(f"parameter {name} has no value; expected one of {parameter!r}")
            elif not parameter.holds(values[name]):
                raise RecipeError(f"{name} = {values[name]!r}; expected a value of {parameter!r}")
        return self._normal(values)

    def founders(self) -> Sequence[Point]:
        return self._founders

    def random(self, rng: np.random.Generator) -> Point:
        return self._completed({}, rng)

    def mutated(self, parent: Point, rng: np.random.Generator) -> Point:
        """One or more parameters change; a number takes a step or is drawn anew."""
        values = dict(parent)
        for name in self._some(values, rng):
            parameter = self.parameters[name]
            anew = parameter.smooth and rng.random() < AFRESH
            values[name] = parameter.random(rng) if anew else parameter.stepped(values[name], rng)
        return self._completed(values, rng)

    def crossed(self, first: Point, second: Point, rng: np.random.Generator) -> Point:
        """Each parameter from either parent."""
        mine, others = dict(first), dict(second)
        values = {**others, **mine}
        values.update((n, v) for n, v in others.items() if n in mine and rng.random() < 0.5)
        return self._completed(values, rng)

    def stepped(self, parent: Point, rng: np.random.Generator) -> Point:
        """Numbers and ordered choices take small steps; sets change only if there is nothing else."""
        values = dict(parent)
        smooth = [name for name in values if self.parameters[name].smooth]
        for name in self._some(smooth or values, rng):
            values[name] = self.parameters[name].stepped(values[name], rng)
        return self._completed(values, rng)

    def restructured(self, parent: Point, rng: np.random.Generator) -> Point:
        """Sets change to another member, and with them what depends on them; numbers are drawn anew
        only if there are no sets."""
        values = dict(parent)
        sets = [name for name in values if not self.parameters[name].smooth]
        kinds = [name for name in sets if name in self._varied]
        for name in self._some(kinds or values, rng):
            parameter = self.parameters[name]
            drawn = (
                parameter.random(rng) if parameter.smooth else parameter.stepped(values[name], rng)
            )
            values[name] = drawn
        return self._completed(values, rng)

    def identity(self, genome: Point) -> str:
        return xxhash.xxh3_128_hexdigest(repr(genome).encode())

    def affordable(self, genome: Point) -> bool:
        return True

    def features(self, genomes: Sequence[Point]) -> Vector:
        if self._own_features is not None:
            return np.array([self._own_features(dict(g)) for g in genomes], dtype=float)
        rows = [self._numbers(dict(genome)) for genome in genomes]
        return np.array(rows, dtype=float).reshape(len(rows), self._width)

    def to_json(self, genome: Point) -> dict[str, Any]:
        return dict(genome)

    def from_json(self, data: Mapping[str, Any]) -> Point:
        return self.point(data)

    def fingerprint(self) -> str:
        spec = {name: p.model_dump(mode="json") for name, p in self.parameters.items()}
        hooks = [getattr(f, "__qualname__", "") for f in (self._canonical, self._own_features)]
        content = [spec, [dict(f) for f in self._founders], hooks]
        return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())

    def _some(self, names: Sequence[str] | Flat, rng: np.random.Generator) -> list[str]:
        """At least one of those of `names` that vary, in an order that no hash of strings decides."""
        varied = [name for name in names if name in self._varied]
        chosen: dict[str, None] = {}
        while varied:
            chosen[varied[int(rng.random() * len(varied))]] = None
            if rng.random() >= AGAIN:
                break
        return list(chosen)

    def _completed(self, values: dict[str, Value], rng: np.random.Generator) -> Point:
        """Inactive values dropped, missing ones drawn; conditions come before what they decide."""
        for name, parameter in self.parameters.items():
            if parameter.when and not _active(parameter, values):
                values.pop(name, None)
            elif name not in values:
                values[name] = parameter.random(rng)
        return self._normal(values)

    def _normal(self, values: Flat) -> Point:
        if self._canonical is not None:
            values = self._canonical(values)
        return tuple(sorted(values.items()))

    def _numbers(self, values: Flat) -> list[float]:
        row: list[float] = []
        for name, parameter in self.parameters.items():
            if name not in values:
                row += parameter.absent()
            elif name in self._coded:
                row += self._coded[name][values[name]]
            else:
                row += parameter.numbers(values[name])
        return row


def _active(parameter: Parameter, values: Flat) -> bool:
    return all(n in values and values[n] in wanted for n, wanted in parameter.when.items())


def _flat(spec: Spec, prefix: str = "") -> dict[str, Parameter]:
    """Nested names joined; a plain value becomes a choice without alternatives."""
    found: dict[str, Parameter] = {}
    for key, entry in spec.items():
        name = prefix + key
        if isinstance(entry, Choice | Real | Integer):
            found[name] = entry
        elif isinstance(entry, Mapping):
            found |= _flat(entry, name + SEPARATOR)
        elif entry is None or isinstance(entry, bool | int | float | str):
            found[name] = Choice(values=(entry,))
        else:
            raise RecipeError(
                f"parameter {name}: found {entry!r}, expected Choice, Real, Integer, a mapping of "
                "them, or a plain value as a constant"
            )
    return found


def _flat_values(config: Mapping[str, Any], prefix: str = "") -> dict[str, Value]:
    found: dict[str, Value] = {}
    for key, value in config.items():
        name = prefix + key
        found |= (
            _flat_values(value, name + SEPARATOR) if isinstance(value, Mapping) else {name: value}
        )
    return found


def _in_order(parameters: dict[str, Parameter]) -> dict[str, Parameter]:
    """Every parameter after those on which its existence depends. RecipeError if it cannot be."""
    for name, parameter in parameters.items():
        for other, wanted in parameter.when.items():
            if other not in parameters:
                known = ", ".join(parameters)
                raise RecipeError(f"{name}: when names '{other}'; the parameters are {known}")
            if strange := [value for value in wanted if not parameters[other].holds(value)]:
                raise RecipeError(f"{name}: when {other} is {strange[0]!r}, which it never is")
    graph = {name: sorted(parameter.when) for name, parameter in parameters.items()}
    try:
        return {name: parameters[name] for name in TopologicalSorter(graph).static_order()}
    except CycleError as error:
        circle = " -> ".join(error.args[1])
        raise RecipeError(f"parameters whose when depend on each other: {circle}") from None


def _parsed(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, entry in data.items():
        if not isinstance(entry, Mapping):
            found[key] = entry
        elif not isinstance(entry.get("kind"), str):
            found[key] = _parsed(entry, f"{prefix}{key}{SEPARATOR}")
        else:
            try:
                found[key] = _PARAMETER.validate_python(entry)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(str(part) for part in first["loc"])
                raise RecipeError(f"parameter {prefix}{key}: {where}: {first['msg']}") from None
    return found
