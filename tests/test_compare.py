"""Comparison against definitions: refinement, the distance of classes, matches, and bad input."""

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.optimize import linprog

from circuitgraph.build.build import build_graph
from circuitgraph.compare.isomorphism import are_fractionally_isomorphic, class_distance, class_vectors
from circuitgraph.compare.isomorphism import compare_colours, permute_weights, read_shares, refine_colours
from circuitgraph.graph.graph import Graph
from circuitgraph.model.loading import tiny_model
from circuitgraph.options import Run
from oracles import random_tokens

QUIET = Run(progress=False)


@pytest.fixture(scope="module")
def graphs():
    "Graphs of a tiny model on two texts."
    model = tiny_model("llama")
    texts = [random_tokens(model, 8, 16, seed=seed) for seed in (0, 1)]
    return [build_graph(model, text, nodes="head", run=QUIET) for text in texts]


# Exact refinement


def refine_by_hand(ports, colours):
    "Stable colours by sorted tuples of exact sums."
    while True:
        signatures = []
        for i in range(len(colours)):
            sums = []
            for W in ports:
                for row in (W[i], W[:, i]):
                    found = {}
                    for j, weight in enumerate(row):
                        found[colours[j]] = found.get(colours[j], 0) + weight
                    sums.append(tuple(sorted((c, w) for c, w in found.items() if w)))
            signatures.append((colours[i], tuple(sums)))
        numbers = {one: k for k, one in enumerate(sorted(set(signatures)))}
        new = [numbers[one] for one in signatures]
        if len(set(new)) == len(set(colours)):
            return np.array(new)
        colours = new


def same_partition(a, b):
    return len(set(zip(a, b, strict=True))) == len(set(a)) == len(set(b))


@pytest.mark.parametrize("seed", range(12))
def test_stable_colours_are_those_of_exact_sums(seed):
    generator = np.random.default_rng(seed)
    n = int(generator.integers(4, 14))
    ports = [generator.integers(0, 3, (n, n)) * (generator.random((n, n)) < 0.3) for _ in range(2)]
    if seed % 2:  # a graph with symmetries: two copies side by side
        ports = [np.kron(np.eye(2, dtype=int), W) for W in ports]
    start = np.arange(len(ports[0])) % 2 if seed % 3 == 0 else np.zeros(len(ports[0]), dtype=int)
    found = refine_colours([sp.csr_array(W.astype(float)) for W in ports], start)
    assert same_partition(found, refine_by_hand(ports, start.tolist()))


def has_doubly_stochastic(A, B):
    "Whether a doubly stochastic S has A S = S B and S' A = B S', by a linear programme."
    n, eye = len(A), np.eye(len(A))
    forward = np.kron(A, eye) - np.kron(eye, B.T)
    backward = np.kron(A.T, eye) - np.kron(eye, B)
    sums = np.concatenate([np.kron(eye, np.ones(n)), np.kron(np.ones(n), eye)])
    equal = np.concatenate([forward, backward, sums])
    right = np.concatenate([np.zeros(2 * n * n), np.ones(2 * n)])
    return linprog(np.zeros(n * n), A_eq=equal, b_eq=right, method="highs").success


def blow_up(A, generator):
    "Two copies of a graph with some of their edges crossed: fractionally isomorphic to two copies."
    n = len(A)
    crossed = np.kron(np.eye(2), A)
    for i, j in zip(*A.nonzero(), strict=True):
        if generator.random() < 0.5:
            crossed[i, j], crossed[n + i, j] = 0, A[i, j]
            crossed[n + i, n + j], crossed[i, n + j] = 0, A[i, j]
    return crossed


@pytest.mark.parametrize("seed", range(8))
def test_colours_and_doubly_stochastic_matrices_agree(seed):
    generator = np.random.default_rng(seed)
    A = generator.integers(1, 4, (4, 4)) * (generator.random((4, 4)) < 0.5)
    A = A.astype(float)
    first, second = np.kron(np.eye(2), A), blow_up(A, generator)
    near = second.copy()
    i, j = (int(ends[0]) for ends in second.nonzero())
    near[i, j] += 0.1
    for other, expected in ((second, True), (near, False)):
        ours = are_fractionally_isomorphic({"in": sp.csr_array(first)}, {"in": sp.csr_array(other)})
        assert ours == has_doubly_stochastic(first, other) == expected


def test_the_order_of_addition_does_not_split_a_class():
    generator = np.random.default_rng(0)
    row = generator.random(50)
    W = np.zeros((52, 52))
    W[50, :50], W[51, :50] = row, generator.permutation(row)
    counts = compare_colours({"in": sp.csr_array(W)}, {"in": sp.csr_array(W)}, None)
    assert (counts["a"] == counts["b"]).all()
    start = np.array([0] * 50 + [1, 1])
    assert len(set(refine_colours([sp.csr_array(W)], start, n_rounds=1)[50:])) == 1


# The distance


def relabel(graph, seed=0):
    "The same graph with the heads of each layer in another order, and so with other names."
    generator = np.random.default_rng(seed)
    nodes, names = graph.nodes, {}
    for _, rows in nodes.groupby(["kind", "layer"], observed=True, dropna=False):
        own = rows["name"].tolist()
        names.update(zip(own, generator.permutation(own).tolist(), strict=True))
    mapped = dict(names)
    edges = graph.edges.copy()
    for end in ("source", "target"):
        edges[end] = edges[end].astype(str).map(mapped)
    return Graph(nodes, edges, graph.meta)


def test_a_relabelled_copy_is_at_distance_zero(graphs):
    assert class_distance(graphs[0], relabel(graphs[0]), n_classes=6) == 0
    assert class_distance(graphs[0], graphs[1], n_classes=6) > 0


def test_distance_is_symmetric_and_within_bounds(graphs):
    forward, backward = (class_distance(a, b, n_classes=6) for a, b in (graphs, graphs[::-1]))
    assert forward == pytest.approx(backward) and 0 <= forward <= 1


def test_class_vectors_are_sums_of_signed_shares(graphs):
    graph = graphs[0]
    shares = read_shares(graph)
    classes = np.arange(len(graph.nodes)) % 3
    vectors = class_vectors(shares, classes, 3)
    name = graph.nodes["name"].tolist()
    expected = np.zeros((len(name), len(shares), 2, 3))
    edges = graph.edges
    ports = sorted(shares)
    total = edges.assign(size=edges["weight"].abs()).groupby(["target", "port"], observed=True)["size"].sum()
    for source, target, port, weight in edges[["source", "target", "port", "weight"]].itertuples(index=False):
        share = weight / total[target, port]
        i, j, p = name.index(target), name.index(source), ports.index(port)
        expected[i, p, 0, classes[j]] += share
        expected[j, p, 1, classes[i]] += share
    expected = np.sign(expected) * np.sqrt(np.abs(expected))
    assert np.allclose(vectors, expected.reshape(len(name), -1), atol=1e-9)


def test_permuted_weights_stay_within_their_group(graphs):
    graph = graphs[0]
    permuted = permute_weights(graph, ("kind", "layer"), seed=1)
    assert permuted.edge_names == graph.edge_names
    nodes = graph.nodes.set_index("name")
    columns = [
        graph.edges[end].astype(str).map(nodes[column].astype(str))
        for end in ("source", "target")
        for column in ("kind", "layer")
    ]
    columns.append(graph.edges["port"].astype(str))
    for _, before in graph.edges.groupby(columns)["weight"]:
        after = permuted.edges.loc[before.index, "weight"]
        assert sorted(before) == sorted(after)
    assert (permuted.edges["weight"] != graph.edges["weight"]).mean() > 0.3


def test_what_cannot_be_compared_is_refused(graphs):
    graph = graphs[0]
    only_v = graph.keep((graph.edges["port"] == "v").to_numpy())
    with pytest.raises(ValueError, match="same ports"):
        class_distance(graph, only_v)
    with pytest.raises(ValueError, match="n_classes must be at least 2"):
        class_distance(graph, graph, n_classes=1)
    nothing = graph.keep(np.zeros(len(graph), dtype=bool))
    with pytest.raises(ValueError, match="must have edges"):
        class_distance(nothing, nothing)
