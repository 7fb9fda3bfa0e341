"""What a recipe's [search] makes of a search: its space, its algorithm, its rungs."""

from __future__ import annotations

from math import inf

from dmi_hpc.config import Recipe, SearchConfig, TrainConfig, with_train
from dmi_hpc.errors import RunError
from dmi_hpc.models.space import HyperValue, SearchSpace
from search.evolution.evolve import Evolution, EvolutionConfig
from search.evolution.fidelity import Rungs, ladder
from search.records.islands import island_seed
from search.spaces.genome import Genome
from search.spaces.networks import Networks


def networks_of(recipe: Recipe, space: SearchSpace) -> Networks:
    search = recipe.search
    usual = with_train(recipe, search.train, where="search.train")
    return Networks(
        space,
        founder_defaults(space, recipe.train),
        max_flops=search.max_flops,
        limits=search.limits,
        batch_size=usual.batch_size,
        accumulation=usual.accumulation,
        ranks=search.ranks,
    )


def evolution_of(recipe: Recipe, networks: Networks, island: str) -> Evolution[Genome]:
    search = recipe.search
    return Evolution(
        networks,
        EvolutionConfig(
            seed=island_seed(recipe.seed, island),
            population=search.population,
            initial=search.initial,
            surrogate=search.surrogate,
            adaptive=search.adaptive,
            replacement=search.replacement,
            patience=search.patience,
        ),
    )


def rungs_of(search: SearchConfig) -> Rungs:
    """The last one is the whole training, whatever that is in the unit of the others."""
    budgets: tuple[float, ...] = (*search.rungs, inf)
    if search.least_epochs is not None:
        budgets = ladder(search.least_epochs, search.epochs, search.reduction)
    elif search.rung_unit == "epochs":
        budgets = (*search.rungs, search.epochs)
    return Rungs(budgets, search.reduction, extrapolate=search.extrapolate)


def founder_defaults(space: SearchSpace, train: TrainConfig) -> dict[str, HyperValue]:
    """What a founder uses for the hyper-parameters it leaves open: the recipe's [train]."""
    known = train.model_dump()
    unknown = sorted(set(space.hyper) - set(known))
    if unknown:
        raise RunError(
            f"the task's search space varies {', '.join(unknown)}, which [train] does not have; "
            f"valid names: {', '.join(sorted(known))}"
        )
    return {name: known[name] for name in space.hyper}
