"""Genes of networks of graphs: drawn and repaired."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dmi_hpc.errors import NetworkError
from dmi_hpc.models.space import NetworkSpace
from search.spaces.draw import pick, within
from search.spaces.genes import GraphGene, GraphPart


def require_graph_space(network: NetworkSpace) -> None:
    """Raises NetworkError if a space with `graph` has what graphs have not."""
    least, most = network.graph_blocks
    if not 0 <= least <= most:
        raise NetworkError(f"graph_blocks: expected 0 <= least <= most, found {least}, {most}")
    others = {
        "conv_blocks": network.conv_blocks[1],
        "recurrent_blocks": network.recurrent_blocks[1],
        "map_output": network.map_output,
    }
    strange = [name for name, found in others.items() if found]
    if strange or len(network.input_shape) != 2:
        raise NetworkError(
            f"graphs need an input (features of a node, nodes), and no {', '.join(others)}; found the "
            f"input {network.input_shape}" + "".join(f", {name}" for name in strange)
        )


def random_graph(network: NetworkSpace, rng: np.random.Generator) -> GraphPart:
    """Depth uniform, then every field uniform over its choices."""
    least, most = network.graph_blocks
    count = int(rng.integers(least, most + 1))
    return GraphPart(
        pick(network.embeddings, rng),
        tuple(random_graph_block(network, rng) for _ in range(count)),
        pick(network.graph_readouts, rng),
    )


def random_graph_block(network: NetworkSpace, rng: np.random.Generator) -> GraphGene:
    """A graph block, each field uniform over its choices."""
    return GraphGene(
        pick(network.graph_convs, rng),
        pick(network.channels, rng),
        pick(network.graph_norms, rng),
        pick(network.graph_activations, rng),
        pick(network.dropouts, rng),
        pick(network.graph_skips, rng),
    )


def repaired_graph(part: GraphPart, network: NetworkSpace) -> GraphPart:
    """With a depth within the limits."""
    plain = GraphGene(
        network.graph_convs[0],
        network.channels[0],
        network.graph_norms[0],
        network.graph_activations[0],
        network.dropouts[0],
        network.graph_skips[0],
    )
    blocks = within(part.blocks, network.graph_blocks, plain)
    return part if blocks == part.blocks else replace(part, blocks=blocks)
