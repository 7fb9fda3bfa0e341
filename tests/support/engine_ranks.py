"""Engines over real gloo ranks, held against plain PyTorch written out by hand.

Prints one JSON object: "RANKS ranks: comparison" -> the largest difference of weights, or a figure
of the engine. A process of its own: DeepSpeed changes global state when it is imported. Ranks are
forked from it, for the import takes seconds.
"""

import importlib
import json
import os
import sys
import tempfile
from itertools import chain
from pathlib import Path
from unittest import mock

import torch
from torch import multiprocessing, nn

from dmi_hpc import collectives, knobs
from dmi_hpc.config import TrainConfig
from dmi_hpc.engine import EngineState, deepspeed_config, gradients, make_engine
from dmi_hpc.engine.library import import_deepspeed
from dmi_hpc.errors import RecipeError
from dmi_hpc.world import World

ROWS, STEPS = 48, 5
# small parameters are shared too, as they are in large networks
SHARED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
ENGINES = {
    "torch": {"engine": "torch"},
    **{
        f"stage {stage}": {"engine": "deepspeed", "zero_stage": stage, "deepspeed": SHARED}
        for stage in range(4)
    },
}
ENGINES["stage 0"] = {"engine": "deepspeed", "zero_stage": 0}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def network(config=None):
    """Odd sizes: ranks' parts are padded. No bias before a norm: its gradient is rounding alone."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(7, 19, bias=False),
        nn.BatchNorm1d(19),
        nn.Tanh(),
        nn.Linear(19, 11),
        nn.Tanh(),
        nn.Linear(11, 1),
    )
    if config is not None and config.freeze:
        module[0].requires_grad_(False)
    return module


def batch(step):
    generator = torch.Generator().manual_seed(step + 1)
    inputs = torch.randn(ROWS, 7, generator=generator)
    return inputs, inputs.sum(dim=1).sin()


def loss_of(output, targets):
    """Scaled such that the sum over micro-batches, averaged over ranks, is twice the batch's mean.

    Twice, for then DeepSpeed's own clipping, of norms above 1, would show.
    """
    return 2 * (output.squeeze(1) - targets).square().sum() / ROWS


def recipe(**changes):
    return TrainConfig(
        **{"batch_size": ROWS, "learning_rate": 1e-2, "weight_decay": 0.3, **changes}
    )


def by_hand(config, *legs, left_out=()):
    """One process, torch only: the parts of all ranks one after the other.

    legs: (number of ranks, steps) in turn.
    """
    module = network(config)
    decays = zip(((0, 1), (3,), (5,)), (config.layer_decay**d for d in (2, 1, 0)), strict=True)
    groups = [
        {
            "params": [*chain(*(module[i].parameters() for i in layer))],
            "lr": config.learning_rate * d,
        }
        for layer, d in decays
    ]
    rate, decay, momentum = config.learning_rate, config.weight_decay, config.momentum
    optimizer = {
        "adam": lambda p: torch.optim.Adam(p, rate, weight_decay=decay),
        "adamw": lambda p: torch.optim.AdamW(p, rate, weight_decay=decay),
        "sgd": lambda p: torch.optim.SGD(p, rate, weight_decay=decay, momentum=momentum),
    }[config.optimizer](groups)
    dtype = PRECISIONS[config.precision]
    for step, ranks in enumerate([ranks for ranks, steps in legs for _ in range(steps)]):
        if step in left_out:
            continue
        parts = [t.chunk(ranks * config.accumulation) for t in batch(step)]
        for inputs, targets in zip(*parts, strict=True):
            with torch.autocast("cpu", dtype, enabled=config.precision != "fp32"):
                output = module(inputs)
            loss_of(output.float(), targets).backward()
        if config.clip_norm:
            nn.utils.clip_grad_norm_(module.parameters(), config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(module)


def train(engine, config, world, steps, spoilt=None):
    updates = []
    for step in steps:
        mine = [t.chunk(world.size)[world.rank].chunk(config.accumulation) for t in batch(step)]
        if step == spoilt and world.rank == world.size - 1:
            mine[1][0][0] = torch.nan
        for group in engine.optimizer.param_groups:
            group["lr"] = config.learning_rate * group["lr_scale"]
        for number, (inputs, targets) in enumerate(zip(*mine, strict=True)):
            loss = loss_of(engine(inputs), targets) * world.size
            engine.backward(loss, last=number == config.accumulation - 1)
        updates.append(engine.update())
    return updates


def weights_of(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def by_engine(config, world, spoilt=None):
    """(weights, updates) after STEPS steps; at step `spoilt` the last rank has a NaN."""
    engine = make_engine(network(config), config, world)
    updates = train(engine, config, world, range(STEPS), spoilt)
    with engine.whole() as module:
        found = weights_of(module)
    engine.close()
    return found, updates


def difference(a, b):
    return float((a - b).abs().max())


def equal(world, _):
    """Both engines, all stages, both precisions, accumulation 1 and 4."""
    found = {}
    accumulations = (1, 4) if world.size < 4 else (4,)
    for precision in ("fp32", "bf16") if world.size < 4 else ("fp32",):
        for accumulation in accumulations:
            common = {"precision": precision, "accumulation": accumulation, "optimizer": "adam"}
            expected = by_hand(recipe(**common), (world.size, STEPS))
            for name, keys in ENGINES.items():
                got, _ = by_engine(recipe(**common, **keys), world)
                found[f"{name} {precision} x{accumulation}"] = difference(got, expected)
    return found


def traps(world, _):
    """Clipping only if asked for, and the right Adam: DeepSpeed's defaults are others."""
    legs, found = (world.size, STEPS), {}
    hand = {name: by_hand(recipe(optimizer=name), legs) for name in ("adam", "adamw")}
    found["adam - adamw"] = difference(*hand.values())
    sgd = {"optimizer": "sgd", "weight_decay": 0.0}
    clipped = by_hand(recipe(clip_norm=0.05, **sgd), legs)
    unclipped = by_hand(recipe(**sgd), legs)
    found["clipped - unclipped"] = difference(clipped, unclipped)
    by_default = by_hand(recipe(clip_norm=1.0, **sgd), legs)
    found["clipped by default - unclipped"] = difference(by_default, unclipped)
    for name, keys in ENGINES.items():
        got, updates = by_engine(recipe(clip_norm=0.05, **sgd, **keys), world)
        found[f"{name} clipped"] = difference(got, clipped)
        found[f"{name} norm"] = float(updates[0].norm)
        got, updates = by_engine(recipe(**sgd, **keys), world)
        found[f"{name} unclipped"] = difference(got, unclipped)
        got, _ = by_engine(recipe(optimizer="adamw", **keys), world)
        found[f"{name} adamw"] = difference(got, hand["adamw"])
    return found


def options(world, _):
    """Checkpointed activations, loss scale, steps left out, offload."""
    found, adam = {}, {"optimizer": "adam"}
    plain = by_hand(recipe(**adam), (world.size, STEPS))
    without = by_hand(recipe(**adam), (world.size, STEPS), left_out=(2,))
    for name, keys in ENGINES.items():
        config = recipe(activation_checkpointing=True, **adam, **keys)
        found[f"{name} activations"] = difference(by_engine(config, world)[0], plain)
        config = recipe(precision="fp16", **adam, **keys)
        found[f"{name} fp16"] = difference(by_engine(config, world)[0], plain)
        with mock.patch.object(gradients, "FIRST_SCALE", 2.0**21):
            got, updates = by_engine(config, world)
        found[f"{name} fp16 overflown"] = [update.skipped for update in updates]
        found[f"{name} fp16 finite"] = bool(got.isfinite().all())
        got, updates = by_engine(recipe(not_finite="skip", **adam, **keys), world, spoilt=2)
        found[f"{name} skip"] = difference(got, without)
        found[f"{name} skipped"] = [update.skipped for update in updates]
    found |= fewer_parts(world)
    for stage, offload in ((1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "all")):
        for accumulation in (1, 4):
            common = {"accumulation": accumulation, **adam}
            config = recipe(offload=offload, **common, **ENGINES[f"stage {stage}"])
            expected = by_hand(recipe(**common), (world.size, STEPS))
            got, _ = by_engine(config, world)
            found[f"stage {stage} offload {offload} x{accumulation}"] = difference(got, expected)
    return found


def fewer_parts(world):
    """A ragged last batch has fewer micro-batches than the recipe's accumulation."""
    found, expected = {}, by_hand(recipe(optimizer="adam"), (world.size, STEPS))
    offloads = {
        f"{stage} offload": {**ENGINES[stage], "offload": "optimizer"}
        for stage in ("stage 1", "stage 2", "stage 3")
    }
    for name, keys in {**ENGINES, **offloads}.items():
        config = recipe(optimizer="adam", accumulation=4, **keys)
        engine = make_engine(network(config), config, world)
        train(engine, config.model_copy(update={"accumulation": 1}), world, range(STEPS))
        with engine.whole() as module:
            found[f"{name} fewer parts"] = difference(weights_of(module), expected)
        engine.close()
    return found


def resumed(world, folder):
    """One leg of each chain: another engine at each world size, from the leg before's state."""
    found = {}
    leg = int((folder / "leg").read_text())
    steps = range(leg * LEG_STEPS, (leg + 1) * LEG_STEPS)
    for name, (keys, engines) in CHAINS.items():
        config = recipe(**keys, **ENGINES[engines[leg]])
        file = folder / f"{name}.pt"
        engine = make_engine(network(config), config, world)
        if leg:
            state = EngineState(**torch.load(file, weights_only=True)) if world.is_first else None
            engine.load(state)
            again = engine.state()
            if state is not None and again is not None:
                found[f"{name} leg {leg} loaded"] = apart(state, again)
        train(engine, config, world, steps)
        state = engine.state()
        with engine.whole() as module:
            got = weights_of(module)
        engine.close()
        if state is not None:
            torch.save(vars(state), file)
        expected = by_hand(recipe(**keys), *[(ranks, LEG_STEPS) for ranks in WORLDS[: leg + 1]])
        found[f"{name} leg {leg} trained"] = difference(got, expected)
    return found


def apart(a, b):
    """Largest difference of two states; 1 if one holds what the other does not."""
    flat_a, flat_b = ({**s.weights, **flattened(s.optimizer)} for s in (a, b))
    if flat_a.keys() != flat_b.keys() or a.scaler != b.scaler:
        return 1.0
    return max(difference(flat_a[k].double(), flat_b[k].double()) for k in flat_a)


def flattened(states):
    return {f"{name} {key}": t for name, own in states.items() for key, t in own.items()}


REFUSED = {
    "unknown": {"gradient_cliping": 1.0},
    "unknown in zero": {"zero_optimization": {"reduce_bucket": 2}},
    "unknown deeper": {"zero_optimization": {"offload_optimizer": {"pin": True}}},
    "unknown in a lenient section": {"flops_profiler": {"enabled": True, "top": 3}},
    "removed": {"elasticity": {"enabled": True}},
    "given up": {"zero_optimization": {"cpu_offload": True}},
    "contradiction": {"gradient_clipping": 1.0},
    "contradiction in zero": {"zero_optimization": {"stage": 2}},
    "another optimiser": {"optimizer": {"type": "Adam", "params": {"lr": 1e-3}}},
    "another precision": {"bf16": {"enabled": True}},
    "no effect": {"data_efficiency": {"enabled": True}},
    "auto": {"zero_optimization": {"reduce_bucket_size": "auto"}},
    "out of range": {"zero_optimization": {"reduce_bucket_size": -1}},
    "accepted": {
        "zero_optimization": {"prefetch_bucket_size": 1000},
        "flops_profiler": {"enabled": False, "top_modules": 3},
        "gradient_accumulation_steps": 1,
    },
}


def refused():
    """What a user is told of each configuration, "" where it is taken; and one that is taken."""
    said = {}
    for name, keys in REFUSED.items():
        config = recipe(zero_stage=3, deepspeed=keys)
        try:
            made = deepspeed_config(network(), config, World(), 3, on_cpu=True)
            said[name] = ""
        except RecipeError as error:
            said[name] = str(error)
    return {"refused": said, "merged": made}


def rank_main(rank, parts, ranks, folder, store):
    torch.set_num_threads(1)
    os.environ[knobs.RENDEZVOUS] = f"file://{store}"
    world, found = World(rank, ranks, rank, ranks), {}
    with collectives.group(world, torch.device("cpu")):
        for part in parts:
            for name, value in part(world, folder).items():
                found[f"{ranks} ranks: {name}"] = value
    if rank == 0:
        store.with_suffix(".json").write_text(json.dumps(found))


def main(folder):
    import_deepspeed()
    # what each rank would import at its first step, for seconds
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    found = refused()
    for leg, ranks in enumerate(WORLDS):
        (folder / "leg").write_text(str(leg))
        store = folder / f"store-{leg}"
        parts = (resumed, *PARTS.get((leg, ranks), ()))
        multiprocessing.start_processes(
            rank_main, (parts, ranks, folder, store), nprocs=ranks, start_method="fork"
        )
        found |= json.loads(store.with_suffix(".json").read_text())
    return found


WORLDS, LEG_STEPS = (4, 2, 1, 4), 3
PARTS = {(0, 4): (equal,), (1, 2): (equal, traps, options), (2, 1): (equal, traps)}
CHAINS = {
    "2 0 3 1": ({"optimizer": "adam"}, ["stage 2", "stage 0", "stage 3", "stage 1"]),
    "torch 3 2 torch": ({"optimizer": "adamw"}, ["torch", "stage 3", "stage 2", "torch"]),
    "layers 1 3 2 0": (
        {"optimizer": "adam", "layer_decay": 0.5},
        ["stage 1", "stage 3", "stage 2", "stage 0"],
    ),
    "frozen 3 2 torch 1": (
        {"optimizer": "adamw", "freeze": ("0.*",)},
        ["stage 3", "stage 2", "torch", "stage 1"],
    ),
    "offload 3 2 1 3": (
        {"optimizer": "adam", "offload": "optimizer"},
        ["stage 3", "stage 2", "stage 1", "stage 3"],
    ),
    "3 torch 1 3": (
        {"optimizer": "sgd", "clip_norm": 0.5},
        ["stage 3", "torch", "stage 1", "stage 3"],
    ),
    "1 2 torch 0": (
        {"optimizer": "adamw", "accumulation": 2},
        ["stage 1", "stage 2", "torch", "stage 0"],
    ),
}

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        sys.stdout.write(json.dumps(main(Path(name))))
