"""LEAP and Propulate without Dask and MPI: their own operators, called as their own loops call them.

Both loops are asynchronous: a worker that has finished one evaluation gets one child of the population
as it is. What is left out is the transport alone.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from math import exp, inf, log, nan
from typing import Any

import numpy as np

from search.spaces.parameters import Choice, Integer, Parameter, Value
from searching.tables import Problem


class Leap:
    """``leap_ec.distrib.asynchronous.steady_state``: as many random individuals as `population`, then
    one child for every finished evaluation, which is inserted greedily (the worst makes room).

    Pipeline: binary tournaments, clone, one expected mutation (uniform for choices, Gaussian of a
    tenth of the range for numbers), uniform crossover. Genomes are all choices or all numbers: LEAP
    has no operators for both in one. Its random numbers are Python's and NumPy's global ones.
    """

    def __init__(self, problem: Problem, seed: int, *, population: int) -> None:
        from leap_ec import Representation, ops
        from leap_ec.distrib import DistributedIndividual
        from leap_ec.int_rep.initializers import create_int_vector
        from leap_ec.int_rep.ops import mutate_randint
        from leap_ec.problem import FunctionProblem
        from leap_ec.real_rep.initializers import create_real_vector
        from leap_ec.real_rep.ops import mutate_gaussian

        random.seed(seed)
        np.random.mtrand.seed(seed)  # NumPy's global generator
        self._parameters = problem.parameters
        choices = [p for p in self._parameters.values() if isinstance(p, Choice)]
        assert len(choices) in (0, len(self._parameters)), "choices and numbers in one genome"
        if choices:
            places = [(0, len(p.values) - 1) for p in choices]
            initialize = create_int_vector(places)
            mutate = mutate_randint(bounds=places, expected_num_mutations=1)
        else:
            unit = [(0.0, 1.0)] * len(self._parameters)
            initialize = create_real_vector(unit)
            mutate = mutate_gaussian(std=0.1, expected_num_mutations=1, bounds=unit)
        kind = Representation(initialize=initialize, individual_cls=DistributedIndividual)
        self._waiting = kind.create_population(population, FunctionProblem(None, maximize=True))
        self._pipeline = (
            ops.tournament_selection,
            ops.clone,
            mutate,
            ops.UniformCrossover(),
            ops.pool(size=1),
        )
        self._population: list[Any] = []
        self._size = population

    def ask(self) -> tuple[Any, Mapping[str, Value]]:
        import toolz

        if self._waiting:
            individual = self._waiting.pop(0)
        else:
            (individual,) = toolz.pipe(self._population, *self._pipeline)
        genes = zip(self._parameters.items(), individual.genome, strict=True)
        return individual, {name: _decoded(p, gene) for (name, p), gene in genes}

    def tell(self, token: Any, score: float | None) -> None:
        from leap_ec.distrib.asynchronous import greedy_insert_into_pop

        token.is_viable = score is not None
        token.fitness = nan if score is None else score
        greedy_insert_into_pop(token, self._population, self._size)


def _decoded(parameter: Parameter, gene: Any) -> Value:
    if isinstance(parameter, Choice):
        return parameter.values[int(gene)]
    number = parameter.at(float(gene))
    return round(number) if isinstance(parameter, Integer) else number


class Propulate:
    """Propulate's default propagator (``get_default_propagator``) on one island.

    Every worker breeds from all evaluations known so far, as `Propulator` does; failures have the loss
    inf. Choices are integers: none of its default operators uses their order, and of text genes
    ``Individual.__setitem__`` (1.2.2) clears the wrong entries, so that mutations get lost.
    Logarithms of numbers on a log scale.
    """

    def __init__(self, problem: Problem, seed: int, *, population: int) -> None:
        from propulate.utils import get_default_propagator

        self._parameters = problem.parameters
        limits = {name: _limits(p) for name, p in self._parameters.items()}
        self._propagator = get_default_propagator(population, limits, rng=random.Random(seed))
        self._evaluated: list[Any] = []

    def ask(self) -> tuple[Any, Mapping[str, Value]]:
        individual = self._propagator(self._evaluated)
        return individual, {n: _at(p, individual[n]) for n, p in self._parameters.items()}

    def tell(self, token: Any, score: float | None) -> None:
        token.loss = inf if score is None else -score
        self._evaluated.append(token)


def _limits(parameter: Parameter) -> tuple[int, int] | tuple[float, float]:
    if isinstance(parameter, Choice):
        return 0, len(parameter.values) - 1
    if parameter.log:
        return log(parameter.low), log(parameter.high)
    if isinstance(parameter, Integer):
        return int(parameter.low), int(parameter.high)
    return float(parameter.low), float(parameter.high)


def _at(parameter: Parameter, gene: float) -> Value:
    if isinstance(parameter, Choice):
        return parameter.values[int(gene)]
    number = exp(gene) if parameter.log else gene
    if isinstance(parameter, Integer):
        number = round(number)
    return min(max(number, parameter.low), parameter.high)
