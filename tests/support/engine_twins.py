"""Trains one network with both engines and with plain torch; prints the largest differences.

A process of its own: DeepSpeed changes global state when it is imported.
"""

import json
import sys

import torch
from torch import nn

from dmi_hpc import collectives
from dmi_hpc.config import TrainConfig
from dmi_hpc.engine import make_engine
from dmi_hpc.world import World

STEPS, GRADIENT = 20, 1e3  # the loss's factor: far beyond any usual clipping norm
PLAIN = {
    "adam": lambda p: torch.optim.Adam(p, 1e-2, weight_decay=0.3),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.3),
    "sgd": lambda p: torch.optim.SGD(p, 1e-6, momentum=0.9),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(20, 8, generator=generator) for _ in range(STEPS)]


def loss_of(output, inputs):
    return GRADIENT * (output.squeeze(1) - inputs.sum(dim=1)).square().mean()


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def by_engine(engine, optimizer, clip_norm):
    config = TrainConfig(
        engine=engine,
        optimizer=optimizer,
        batch_size=20,
        learning_rate=1e-6 if optimizer == "sgd" else 1e-2,
        weight_decay=0.0 if optimizer == "sgd" else 0.3,
        clip_norm=clip_norm,
    )
    made = make_engine(network(), config, World())
    for inputs in batches():
        made.backward(loss_of(made(inputs), inputs), last=True)
        made.update()
    made.close()
    return weights(made.module)


def by_hand(optimizer):
    module = network()
    chosen = PLAIN[optimizer](module.parameters())
    for inputs in batches():
        chosen.zero_grad()
        loss_of(module(inputs), inputs).backward()
        chosen.step()
    return weights(module)


def main():
    found = {}
    with collectives.group(World(), torch.device("cpu")):
        for optimizer in PLAIN:
            hand = by_hand(optimizer)
            for engine in ("deepspeed", "torch"):
                difference = (by_engine(engine, optimizer, 0.0) - hand).abs().max()
                found[f"{engine} {optimizer}"] = float(difference)
        clipped = by_engine("deepspeed", "sgd", 1.0)
        found["clipped twins"] = float((clipped - by_engine("torch", "sgd", 1.0)).abs().max())
        found["clipping"] = float((clipped - hand).abs().max())
        found["adam - adamw"] = float((by_hand("adam") - by_hand("adamw")).abs().max())
    sys.stdout.write(json.dumps(found))


main()
