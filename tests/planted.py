"""Graphs and patterns made at random, whose communities are known."""

import numpy as np
import pandas as pd
import scipy.sparse as sp

from circuitgraph.graph.graph import Graph


def make_graph(source, target, weight, level):
    """A graph of features from arrays: the ends of each edge, its weight, and the level of each node."""
    names = [f"m{r}/{i}" for i, r in enumerate(level)]
    nodes = pd.DataFrame(
        {
            "name": names,
            "module": [f"m{r}" for r in level],
            "kind": "feature",
            "layer": level,
            "index": np.arange(len(level)),
            "frequency": 1.0,
            "mean_activation": 1.0,
        }
    )
    ends = {
        "source": pd.Categorical.from_codes(source, names),
        "target": pd.Categorical.from_codes(target, names),
    }
    size = np.abs(weight)
    weights = {"weight": weight, "abs_weight": size, "rms_weight": size, "count": 1}
    return Graph(nodes, pd.DataFrame({**ends, "port": "mlp", **weights}), {"nodes": "head"})


def draw_layered(
    n_levels=12, width=40, n_planted=8, n_edges=8_000, within=0.85, near=0.35, spread=0.0, seed=0
):
    """A random layered acyclic graph; returns graph, planted community and level of each node.

    Edges that leave a community are drawn with probability 1 - `within`, those over d levels with
    `near` ** (d - 1), and weights are uniform in 1 - `spread` to 1 + `spread`.
    """
    generator, n = np.random.default_rng(seed), n_levels * width
    planted, level = generator.integers(n_planted, size=n), np.repeat(np.arange(n_levels), width)
    source, target = generator.integers(n, size=(2, 40 * n_edges))
    fits = (
        (level[source] < level[target])
        & ((planted[source] == planted[target]) | (generator.random(len(source)) > within))
        & (generator.random(len(source)) < near ** (level[target] - level[source] - 1.0))
    )
    pairs = np.unique(np.stack([source[fits], target[fits]])[:, :n_edges], axis=1)
    weight = generator.uniform(1 - spread, 1 + spread, pairs.shape[1])
    return make_graph(*pairs, weight, level), planted, level


def halve(graph, seed=0):
    """The same edges as two halves of a text would weigh them, each with noise of its own."""
    noise = np.random.default_rng(seed).gamma(4, 1 / 4, size=(2, len(graph)))
    size = graph.edges["abs_weight"]
    return [Graph(graph.nodes, graph.edges.assign(abs_weight=size * n), graph.meta) for n in noise]


def draw_topics(n_positions=2_000, n_topics=5, width=50, seed=0):
    """Activations `[position node]`, topic of each position, and topic that each node likes.

    The last `width` nodes like none (`n_topics`).
    """
    generator = np.random.default_rng(seed)
    topic = generator.integers(n_topics, size=n_positions)
    likes = np.repeat(np.arange(n_topics + 1), width)
    chance = np.where(likes[None] == topic[:, None], 0.15, 0.01)
    active = generator.random(chance.shape) < np.where(likes == n_topics, 0.05, chance)
    return sp.csr_array(active * generator.exponential(size=chance.shape)), topic, likes


def draw_tokens(n_kinds=12, width=40, n_levels=6, strength=1.0, noise="tokens", seed=0):
    """A graph of features that are each active on one kind of token; returns graph and group of each node.

    Any two features of a kind and of different levels may be joined, and no others. A weight is a factor of
    its source, times one of its target, times noise. Half of the features of each kind are a group, within
    which weights are `strength` times as large; -1 marks the others. `noise` is "tokens" (log-normal),
    "heavy" (its largest values are hundreds of times the median), "hubs" (a few sources and targets have most
    of the weight), "normal" (many values near zero) or "none".
    """
    generator, n = np.random.default_rng(seed), n_kinds * width
    kind, level = np.repeat(np.arange(n_kinds), width), np.tile(np.arange(n_levels), n)[:n]
    order = np.argsort(level, kind="stable")
    kind, level = kind[order], level[order]
    group = np.where(generator.random(n) < 0.5, kind, -1)
    source, target = np.nonzero((kind[:, None] == kind) & (level[:, None] < level))
    sends, receives = np.exp((2.0 if noise == "hubs" else 0.5) * generator.normal(size=(2, n)))
    normal, tail = generator.normal(size=len(source)), generator.standard_t(1.5, len(source))
    kinds = {"heavy": np.abs(tail), "normal": np.abs(normal), "none": np.ones(len(source))}
    weight = sends[source] * receives[target] * kinds.get(noise, np.exp(normal / 2))
    weight[(group[source] == group[target]) & (group[source] >= 0)] *= strength
    return make_graph(source, target, weight, level), group
