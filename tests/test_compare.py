"""Comparison against definitions: refinement, the distance of classes, matches, and bad input."""

import copy
import json
import shutil
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from playwright.sync_api import sync_playwright
from scipy.optimize import linprog
from scipy.stats import kstest
from sklearn.linear_model import LinearRegression
from sklearn.metrics import adjusted_mutual_info_score
from transformers import LlamaConfig, LlamaForCausalLM

from circuitgraph.build.build import build_graph
from circuitgraph.build.prompt import Prompt
from circuitgraph.community.links import add_history
from circuitgraph.community.patterns import read_patterns
from circuitgraph.community.search import find_communities
from circuitgraph.compare.compare import Comparison, compare_graphs
from circuitgraph.compare.effects import compare_profiles, describe_sizes, exchange_partners, form_strata
from circuitgraph.compare.effects import measure_cuts, remove_sizes
from circuitgraph.compare.isomorphism import are_fractionally_isomorphic, class_distance, class_vectors
from circuitgraph.compare.isomorphism import compare_colours, permute_weights, read_shares, refine_colours
from circuitgraph.compare.joint import find_joint, score_mixed
from circuitgraph.compare.match import correlate_nodes, cover_words, judge_match, match_communities
from circuitgraph.compare.match import match_nodes
from circuitgraph.compare.match import read_words, split_passages, verify_edges
from circuitgraph.compare.quotients import inequitability, match_classes, quotient_distance
from circuitgraph.compare.sides import find_contexts, name_supernodes
from circuitgraph.data.corpus import load_corpus
from circuitgraph.dictionary.places import neuron_basis
from circuitgraph.graph.graph import Graph
from circuitgraph.graph.prompt_view import save_attribution_graph
from circuitgraph.model.loading import load_model, tiny_model
from circuitgraph.options import Pruning, Run
from feature_oracles import all_dictionaries
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


# Matches


def named_graph(n, seed=0, community=None):
    "A graph of `n` features of one module that a second module's features read, with random weights."
    generator = np.random.default_rng(seed)
    names = [f"m0/{i}" for i in range(n // 2)] + [f"m1/{i}" for i in range(n - n // 2)]
    graph = make_graph(names, generator)
    if community is None:
        return graph
    return add_history(graph, "planted", community=np.asarray(community))


def make_graph(names, generator):
    "All edges from the features of m0 into those of m1."
    model = tiny_model("llama")
    tokens = random_tokens(model, 2, 8)
    meta = build_graph(model, tokens, nodes="layer", run=QUIET).meta
    nodes = pd.DataFrame({"name": names})
    nodes["module"] = nodes["name"].str.split("/").str[0]
    nodes["kind"], nodes["layer"] = "feature", nodes["module"].str[1:].astype(int)
    nodes["index"] = nodes["name"].str.split("/").str[1].astype(int)
    nodes["frequency"], nodes["mean_activation"] = 0.5, 1.0
    first, second = (nodes.loc[nodes["layer"] == layer, "name"].tolist() for layer in (0, 1))
    pairs = [(a, b) for b in second for a in first]
    weight = generator.normal(size=len(pairs))
    edges = pd.DataFrame(pairs, columns=["source", "target"])
    edges = edges.assign(port="mlp", weight=weight, abs_weight=np.abs(weight), rms_weight=np.abs(weight))
    return Graph(nodes, edges.assign(count=1), meta)


def draw_profiles(n_words, n_nodes, seed):
    return np.random.default_rng(seed).gamma(0.3, size=(n_words, n_nodes))


def test_correlations_are_numpys():
    a, b = draw_profiles(50, 4, 0), draw_profiles(50, 3, 1)
    a[:, 2] = 0.1
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = np.nan_to_num(np.corrcoef(a.T, b.T)[:4, 4:])
    assert np.allclose(correlate_nodes(sp.csr_array(a), sp.csr_array(b)), expected)


@pytest.mark.parametrize("seed", range(3))
def test_shared_nodes_are_found_among_others_under_noise(seed):
    n_words, n_shared = 600, 20
    shared = draw_profiles(n_words, n_shared, seed)
    a = np.concatenate(
        [shared + 0.1 * draw_profiles(n_words, n_shared, 50), draw_profiles(n_words, 10, 51)], 1
    )
    order = np.random.default_rng(seed).permutation(n_shared)
    b = np.concatenate([draw_profiles(n_words, 30, 52), shared[:, order]], 1)
    graph, other = named_graph(30), named_graph(50)
    matches = match_nodes(graph, other, (sp.csr_array(a), sp.csr_array(b)))
    names, others = graph.nodes["name"].tolist(), other.nodes["name"].tolist()
    found = {(names.index(x), others.index(y)) for x, y in zip(matches["a"], matches["b"], strict=True)}
    true = {(int(order[j]), 30 + j) for j in range(n_shared)}
    assert true <= found
    sure = matches[matches["p"] < 0.05]
    assert {(names.index(x), others.index(y)) for x, y in zip(sure["a"], sure["b"], strict=True)} >= true
    assert len(sure) <= n_shared + 3


def test_where_nothing_is_shared_few_matches_are_sure():
    graph, other = named_graph(30), named_graph(50)
    shares = []
    for seed in range(20):
        words = sp.csr_array(draw_profiles(300, 30, seed)), sp.csr_array(draw_profiles(300, 50, 100 + seed))
        matches = match_nodes(graph, other, words, seed=seed)
        shares.append((matches["p"] < 0.05).mean())
    assert np.mean(shares) < 0.1


def test_edges_of_a_true_match_agree_and_of_a_shuffled_one_do_not():
    graph = named_graph(40)
    names = graph.nodes["name"].to_numpy()
    true = pd.DataFrame({"a": names, "b": names})
    generator = np.random.default_rng(0)
    first, second = names[:20], names[20:]
    shuffled = np.concatenate([generator.permutation(first), generator.permutation(second)])
    false = pd.DataFrame({"a": names, "b": shuffled})
    good, bad = verify_edges(graph, graph, true), verify_edges(graph, graph, false)
    assert good["correlation"] == pytest.approx(1) and good["p"] < 0.02 and good["z"] > 10
    assert abs(bad["correlation"]) < 0.2 and bad["p"] > 0.02


@pytest.fixture(scope="module")
def sparse():
    "A graph of 60 features with a third of the possible edges, all of positive weight."
    graph = named_graph(60)
    few = graph.keep(np.random.default_rng(1).random(len(graph)) < 1 / 3)
    return with_weights(few, few.edges["abs_weight"].to_numpy())


def with_weights(graph, weight):
    return Graph(graph.nodes, graph.edges.assign(weight=weight, abs_weight=np.abs(weight)), graph.meta)


def test_permuted_weights_of_a_sparse_graph_fail_and_a_noisy_copy_passes(sparse):
    names = sparse.nodes["name"].to_numpy()
    true = pd.DataFrame({"a": names, "b": names})
    generator = np.random.default_rng(0)
    noise = generator.normal(size=len(sparse))
    copy = with_weights(sparse, sparse.edges["weight"].to_numpy() + 0.5 * noise)
    found = verify_edges(sparse, copy, true)
    assert found["null"] == "weights" and found["p"] < 0.02 and found["z"] > 5
    permuted = [permute_weights(sparse, ("kind", "layer"), seed=seed) for seed in range(20)]
    assert np.mean([verify_edges(sparse, one, true, n_null=29)["p"] < 0.05 for one in permuted]) < 0.2
    # a shuffled match does not keep which edges exist, and lets them all pass
    assert all(verify_edges(sparse, one, true, null="match", n_null=20)["z"] > 2 for one in permuted[:5])


def test_p_is_uniform_where_two_graphs_share_only_which_edges_exist(sparse):
    names = sparse.nodes["name"].to_numpy()
    true = pd.DataFrame({"a": names, "b": names})
    p = []
    for seed in range(200):
        weight = np.random.default_rng(1000 + seed).gamma(0.5, size=len(sparse))
        found = verify_edges(sparse, with_weights(sparse, weight), true, n_null=29, seed=seed)
        p.append(found["p"])
    assert kstest(p, "uniform").pvalue > 0.01


def test_a_shuffled_match_is_the_null_where_it_keeps_which_edges_exist(graphs):
    names = graphs[0].nodes["name"].to_numpy()
    matches = pd.DataFrame({"a": names, "b": names})
    assert verify_edges(*graphs, matches)["null"] == "match"
    with pytest.raises(ValueError, match="null must be 'match', 'weights'"):
        verify_edges(*graphs, matches, null="edges")


@pytest.mark.parametrize("seed", range(3))
def test_planted_communities_are_matched(seed):
    generator = np.random.default_rng(seed)
    n_words, n_groups = 800, 6
    topic = draw_profiles(n_words, n_groups, seed)
    sides = []
    for n, own in ((60, 2), (90, 4)):  # graphs of different size, each with communities of its own
        member = np.concatenate([np.arange(n_groups + own), generator.integers(n_groups + own, size=n)])
        own_topics = draw_profiles(n_words, own, 10 * seed + n)
        every = np.concatenate([topic, own_topics], 1)
        acts = every[:, member] * generator.random((n_words, len(member)))
        label = generator.permutation(n_groups + own)
        sides.append((named_graph(len(member), community=label[member]), sp.csr_array(acts), label))
    (a, words_a, label_a), (b, words_b, label_b) = sides
    matches = match_communities(a, b, (words_a, words_b))
    expected = {(int(label_a[i]), int(label_b[i])) for i in range(n_groups)}
    sure = matches[matches["p"] < 0.05]
    assert expected <= set(zip(sure["a"].tolist(), sure["b"].tolist(), strict=True))
    assert len(sure) <= n_groups + 1
    # the partition of matched nodes agrees
    new_b = {int(y): int(x) for x, y in zip(matches["a"], matches["b"], strict=True)}
    mapped = [new_b.get(int(c), -1) for c in b.nodes["community"]]
    truth = [
        int(label_a[list(label_b).index(c)]) if list(label_b).index(c) < n_groups else -1
        for c in b.nodes["community"]
    ]
    rows = [i for i, c in enumerate(truth) if c >= 0]
    assert adjusted_mutual_info_score([truth[i] for i in rows], [mapped[i] for i in rows]) > 0.95


def test_words_are_covered_by_the_tokens_that_touch_them():
    passage = "the cats sat"
    spans = [(0, 3), (3, 7), (7, 8), (8, 12)]  # " cat" + "s": two tokens of one word
    covers = cover_words(passage, spans).toarray()
    assert np.allclose(covers, [[1, 0, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 0, 1]])
    passages = split_passages("a b c d e f g", n_words=3)
    assert passages == ["a b c", "d e f"]
    with pytest.raises(ValueError, match="at least 9 words"):
        split_passages("a b c", n_words=9)


def test_activity_by_word_is_that_of_its_tokens():
    model = load_model("smollm2-135m")
    graph = Graph.load("nbs/results/layer_graph")
    passage = "The unbelievable transformation happened"
    words = read_words(model, graph, [passage], run=QUIET).toarray()
    tokens = torch.tensor([model.tokenizer.encode(passage)])
    pieces = model.tokenizer.convert_ids_to_tokens(tokens[0].tolist())
    activity = read_patterns(model, graph, tokens, skip_first=1, run=QUIET).toarray()
    word = np.cumsum([piece.startswith("Ġ") for piece in pieces])
    expected = [activity[word == i].mean(0) for i in range(1, word.max() + 1)]
    assert np.allclose(words, expected, rtol=1e-5)


def test_matches_refuse_what_does_not_fit():
    graph = named_graph(10)
    words = sp.csr_array(draw_profiles(50, 10, 0))
    with pytest.raises(ValueError, match="same words"):
        match_nodes(graph, graph, (words, sp.csr_array(words[:40])))
    with pytest.raises(ValueError, match="a column for each of 10 nodes"):
        match_nodes(graph, graph, (words, sp.csr_array(draw_profiles(50, 9, 0))))
    with pytest.raises(ValueError, match="n_null"):
        match_nodes(graph, graph, (words, words), n_null=0)
    with pytest.raises(ValueError, match="must have communities"):
        match_communities(graph, graph, (words, words))
    silent = sp.csr_array(np.zeros((50, 10)))
    with pytest.raises(ValueError, match="active on the text"):
        match_nodes(graph, graph, (silent, silent))
    with pytest.raises(ValueError, match="must have a tokenizer"):
        read_words(replace(tiny_model("llama"), tokenizer=None), graph, ["a b"], run=QUIET)


# Quotient graphs


def test_inequitability_is_the_part_of_variance_within_classes(graphs):
    graph = graphs[0]
    classes = np.arange(len(graph.nodes)) % 3
    vectors = class_vectors(read_shares(graph), classes, 3)
    within = sum(((rows - rows.mean(0)) ** 2).sum() for rows in (vectors[classes == c] for c in range(3)))
    total = ((vectors - vectors.mean(0)) ** 2).sum()
    assert inequitability(graph, classes) == pytest.approx(within / total)
    stable = refine_colours(list(read_shares(graph).values()))
    assert inequitability(graph, stable) == pytest.approx(0, abs=1e-9)


def test_partners_have_one_number():
    matches = pd.DataFrame({"a": [2, 0], "b": [1, 3]})
    own, other = match_classes(np.array([0, 1, 2]), np.array([3, 1, 0, -1]), matches)
    assert own[2] == other[1] and own[0] == other[0]
    assert len({*own.tolist(), *other.tolist()}) == 5  # two partners, one without, and two without


def test_quotients_of_a_renamed_copy_are_equal_and_of_unmatched_classes_apart(graphs):
    graph = graphs[0]
    classes = np.arange(len(graph.nodes)) % 3
    renamed = (classes + 1) % 3
    matches = pd.DataFrame({"a": [0, 1, 2], "b": [1, 2, 0]})
    assert quotient_distance(graph, graph, match_classes(classes, renamed, matches)) == 0
    nothing = matches[:0]
    assert quotient_distance(graph, graph, match_classes(classes, renamed, nothing)) == pytest.approx(1)
    found = quotient_distance(*graphs, (classes, classes))
    assert 0 < found < 1 and found == pytest.approx(quotient_distance(*graphs[::-1], (classes, classes)))


def test_classes_of_other_nodes_are_refused(graphs):
    graph = graphs[0]
    short = np.zeros(2, dtype=int)
    with pytest.raises(ValueError, match="one for each of"):
        inequitability(graph, short)
    whole = np.zeros(len(graph.nodes), dtype=int)
    with pytest.raises(ValueError, match="classes of the second graph must be whole numbers"):
        quotient_distance(graph, graph, (whole, whole - 1))


# One call


def test_one_model_on_two_texts_is_itself():
    model = load_model("smollm2-135m")
    graphs = []
    for seed in (0, 1):
        tokens = load_corpus("default", model, 128, seq_len=64, seed=seed)
        graphs.append(build_graph(model, tokens, nodes="layer", attribution="gradient", run=QUIET))
    text = "The cat that the dogs saw was on the old mat. " * 20
    options = {"models": (model, model), "n_classes": 8, "run": QUIET}
    result = compare_graphs(*graphs, text, **options)
    assert (result.nodes["a"] == result.nodes["b"]).all() and result.communities is None
    assert result.edges["correlation"] > 0.9 and result.edges["p"] < 0.05
    assert result.distance == class_distance(*graphs, n_classes=8) < min(result.null_distances)
    assert "edges, correlation" in repr(result)
    grouped = [find_communities(graph, "leiden", seed=0) for graph in graphs]
    of_communities = compare_graphs(*grouped, text, **options).communities
    assert of_communities["correlation"].max() > 0.9
    tokens = load_corpus("default", model, 128, seq_len=64, seed=2)
    assert compare_graphs(*graphs, tokens, **options).n_words > 30
    # what can't be compared is refused
    head = Graph(graphs[0].nodes, graphs[0].edges, graphs[0].meta | {"nodes": "head"})
    with pytest.raises(ValueError, match="one grain, got 'layer' and 'head'"):
        compare_graphs(graphs[0], head, text, **options)
    with pytest.raises(ValueError, match="other weights than the smollm2-135m"):
        compare_graphs(*graphs, text, models=(model, tiny_model("llama")), run=QUIET)
    nothing = graphs[0].keep(np.zeros(len(graphs[0]), dtype=bool))
    with pytest.raises(ValueError, match="must have nodes and edges"):
        compare_graphs(graphs[0], nothing, text, **options)
    with pytest.raises(ValueError, match="at least 40 words"):
        compare_graphs(*graphs, "too short", **options)


# Calibration where nothing is shared


def test_p_of_a_whole_match_and_of_its_best_layer_are_uniform_where_nothing_is_shared():
    graph, other = named_graph(16), named_graph(24)
    found = {"all nodes": [], "best layer": []}
    for seed in range(200):
        words = sp.csr_array(draw_profiles(80, 16, seed)), sp.csr_array(draw_profiles(80, 24, 500 + seed))
        judged = judge_match(graph, other, words, n_null=19, seed=seed)
        for row, p in found.items():
            p.append(judged.loc[row, "p"])
    assert all(kstest(p, "uniform").pvalue > 0.01 for p in found.values())


def test_the_best_layer_is_that_of_its_definition():
    graph, other = named_graph(12), named_graph(14)
    words = draw_profiles(90, 12, 0), draw_profiles(90, 14, 1)
    matches = match_nodes(graph, other, tuple(map(sp.csr_array, words)))
    by_layer = matches.groupby(matches["a"].str[1])["correlation"].median()
    judged = judge_match(graph, other, tuple(map(sp.csr_array, words)), n_null=3)
    assert judged.loc["best layer", "correlation"] == pytest.approx(by_layer.max())
    assert judged.loc["all nodes", "correlation"] == pytest.approx(matches["correlation"].median())


def test_p_of_a_matched_community_is_uniform_where_nothing_is_shared():
    a, b = (named_graph(n, community=np.arange(n) % 5) for n in (20, 30))
    p = []
    for seed in range(200):
        words = sp.csr_array(draw_profiles(100, 20, seed)), sp.csr_array(draw_profiles(100, 30, 500 + seed))
        matches = match_communities(a, b, words, n_null=10, seed=seed).set_index("a")
        p.append(matches.loc[seed % 5, "p"])  # one of each draw, since those of a draw depend on each other
    assert kstest(p, "uniform").pvalue > 0.01


def test_p_of_exchanged_partners_is_uniform_where_profiles_share_nothing():
    stratum = np.arange(15) // 5
    p = []
    for seed in range(200):
        draw = np.random.default_rng(seed)
        profiles = draw.normal(size=(15, 20)), draw.normal(size=(15, 20))
        p.append(compare_profiles(*profiles, stratum, n_null=99, seed=seed)[1]["p"])
    assert kstest(p, "uniform").pvalue > 0.01


# Communities cut out


@pytest.fixture(scope="module")
def llama():
    "A small model of transformers, and the same as a model of ours."
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(config).eval().double()
    return theirs, load_model(copy.deepcopy(theirs))


def losses_of(theirs, tokens):
    logits = theirs(tokens).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")


@torch.no_grad()
def cut_by_hooks(theirs, tokens, columns):
    "The rise of the loss with columns of the inputs of some linear layers held at their means."
    before, seen, handles = losses_of(theirs, tokens), {}, []
    for layer in columns:
        keep = layer.register_forward_pre_hook(lambda layer, args: seen.update({layer: args[0]}))
        handles.append(keep)
    theirs(tokens)
    [handle.remove() for handle in handles]
    means = {layer: x[:, 1:].mean((0, 1)) for layer, x in seen.items()}

    def replace_columns(layer, args):
        x = args[0].clone()
        x[..., columns[layer]] = means[layer][columns[layer]]
        return (x,)

    handles = [layer.register_forward_pre_hook(replace_columns) for layer in columns]
    rise = losses_of(theirs, tokens) - before
    [handle.remove() for handle in handles]
    return rise.numpy()


def test_cut_neurons_and_heads_are_those_of_hooks_in_transformers(llama):
    theirs, model = llama
    tokens = random_tokens(model, 6, 9)
    neurons = {name: neuron_basis(model, name) for name in ("m0", "m1")}
    sets = [["m0/3", "m0/7", "m1/2"], ["a0.h1", "a1.h0", "a1.h3"], ["m1/5", "a0.h2", "m1/err", "logits"]]
    (first, second), head = theirs.model.layers, lambda i: list(range(4 * i, 4 * i + 4))
    columns = [
        {first.mlp.down_proj: [3, 7], second.mlp.down_proj: [2]},
        {first.self_attn.o_proj: head(1), second.self_attn.o_proj: head(0) + head(3)},
        {second.mlp.down_proj: [5], first.self_attn.o_proj: head(2)},
    ]
    rise = measure_cuts(model, tokens, sets, neurons, run=Run(batch_size=4, progress=False))
    expected = [cut_by_hooks(theirs, tokens, one) for one in columns]
    assert np.allclose(rise[:, :, :-1], expected, atol=1e-6) and np.isnan(rise[:, :, -1]).all()
    assert np.abs(expected).max() > 1e-3


def test_cuts_of_unknown_nodes_are_refused(llama):
    _, model = llama
    with pytest.raises(ValueError, match="dictionaries must hold those of the features, but 'm0' is missing"):
        measure_cuts(model, random_tokens(model), [["m0/3"]], run=QUIET)
    with pytest.raises(ValueError, match="no 'a7'"):
        measure_cuts(model, random_tokens(model), [["a7"]], run=QUIET)


def test_sizes_are_counted_edge_by_edge_and_fitted_by_least_squares(graphs):
    graph = graphs[0]
    classes = np.arange(len(graph.nodes)) % 4 - 1
    found = describe_sizes(graph, classes)
    name, edges = graph.nodes["name"].tolist(), graph.edges
    for c in range(3):
        members = {one for one, number in zip(name, classes, strict=True) if number == c}
        ends = [*edges["source"], *edges["target"]]
        frequency = graph.nodes.loc[classes == c, "frequency"].fillna(0).mean()
        expected = [len(members), sum(end in members for end in ends), max(frequency, 1e-6)]
        assert found[c] == pytest.approx(np.log(expected))
    draw = np.random.default_rng(0)
    sizes, effects = draw.normal(size=(12, 3)), draw.normal(size=(12, 7))
    expected = effects - LinearRegression().fit(sizes, effects).predict(sizes)
    assert np.allclose(remove_sizes(effects, sizes), expected)


def test_partners_are_exchanged_within_strata_and_none_keeps_its_own():
    sizes = np.random.default_rng(0).normal(size=(23, 3))
    stratum = form_strata(sizes)
    assert sorted(np.bincount(stratum)) == [5, 6, 6, 6]
    score = ((sizes - sizes.mean(0)) / sizes.std(0)).mean(1)
    ranges = [(score[stratum == s].min(), score[stratum == s].max()) for s in range(4)]
    assert all(high < low for (_, high), (low, _) in pairwise(ranges))
    for seed in range(20):
        moved = exchange_partners(stratum, np.random.default_rng(seed))
        assert sorted(moved) == list(range(23)) and (stratum[moved] == stratum).all()
        assert (moved != np.arange(23)).all()
    with pytest.raises(ValueError, match="at least two pairs, got 1 and 1"):
        compare_profiles(np.ones((1, 3)), np.ones((1, 3)), np.zeros(1, dtype=int))


# Joint communities


def plant_topics(n_words, sides, seed):
    "Activity of models whose nodes follow topics, of which the models share some, and the nodes' topics."
    draw = np.random.default_rng(seed)
    theme = draw.gamma(0.3, size=(n_words, 1 + max(max(topics) for topics, _ in sides)))
    found = []
    for topics, n in sides:
        topic = np.concatenate([topics, topics, topics, draw.choice(topics, n)])
        found.append((sp.csr_array(theme[:, topic] * draw.random((n_words, len(topic)))), topic))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_shared_topics_are_mixed_communities_and_own_ones_are_not(seed):
    (a, topic), (b, other) = plant_topics(600, [(range(6), 30), ([0, 1, 2, 3, 6, 7, 8], 60)], seed)
    joint = find_joint(a, b)
    sure = joint.mixed[joint.mixed["p"] <= 0.05]
    assert len(sure) == 4 and sure["score"].min() > 0.5
    truth, member = np.concatenate([topic, other]), np.concatenate(joint.member)
    assert adjusted_mutual_info_score(truth, member) > 0.95
    of_sure = np.isin(member, sure["community"])
    assert set(truth[of_sure]) == {0, 1, 2, 3}
    # the same words in random order: each model keeps its communities, and none is shared
    order = np.random.default_rng(seed).permutation(600)
    assert not (find_joint(a, sp.csr_array(b[order])).mixed["p"] <= 0.05).any()


def test_a_joint_search_of_strangers_is_rarely_sure():
    n_sure = 0
    for seed in range(40):
        a, b = sp.csr_array(draw_profiles(200, 30, seed)), sp.csr_array(draw_profiles(200, 40, 900 + seed))
        n_sure += (find_joint(a, b, least=0.1, seed=seed).mixed["p"] <= 0.05).any()
    assert n_sure <= 6  # 2 expected; more than 6 in 14 of 10,000


def test_a_score_is_the_correlation_of_mean_standard_scores():
    a, b = draw_profiles(60, 5, 0), draw_profiles(60, 4, 1)
    member = np.array([0, 0, 1, 1, 2, 0, 0, 2, 2])
    scored = score_mixed((sp.csr_array(a), sp.csr_array(b)), member)
    parts = [((x - x.mean(0)) / x.std(0))[:, :2].mean(1) for x in (a, b)]
    assert scored["community"].tolist() == [0] and scored["n_b"].tolist() == [2]
    assert scored["score"].iloc[0] == pytest.approx(np.corrcoef(*parts)[0, 1])


def test_a_joint_search_refuses_what_it_cannot_use():
    a = sp.csr_array(draw_profiles(120, 5, 0))
    with pytest.raises(ValueError, match="same words, at least 100, got 120 and 60"):
        find_joint(a, sp.csr_array(a[:60]))
    for options in ({"n_null": 0}, {"n_neighbours": 0}, {"least": 0.0}):
        with pytest.raises(ValueError, match="n_null and n_neighbours must be at least 1"):
            find_joint(a, a, **options)


# What may be claimed, and the page


@pytest.fixture(scope="module")
def compared(graphs):
    "A comparison of a tiny model's graphs on two texts, by drawn activity."
    grouped = tuple(find_communities(graph, "leiden", seed=0) for graph in graphs)
    passages = ["zero one two three four", "five <b> seven eight nine"]
    n_nodes = len(graphs[0].nodes)
    words = sp.csr_array(draw_profiles(8, n_nodes, 0))
    matches = match_nodes(*grouped, (words, words))
    communities = match_communities(*grouped, (words, words)).assign(p=0.01)
    edges = verify_edges(*grouped, matches)
    return Comparison(grouped, tuple(passages), (words, words), matches, communities, edges, 0.02, (0.9, 0.8))


@pytest.mark.parametrize(
    ("seeds", "distance", "claim"),
    [
        ((), 0.0, "none: it takes the distances of at least 3 pairs"),
        ((0.5, 0.5), 0.0, "none: it takes the distances of at least 3 pairs"),
        ((0.01, 0.02, 0.05), 0.04, "isomorphic at this tolerance"),
        ((0.01, 0.02, 0.05), 0.0471, "none: 95 % of 3 pairs"),
        ((0.9, 0.95, 1.0), 0.85, "none: 95 % of 3 pairs"),  # no nearer than permuted weights
    ],
)
def test_a_claim_needs_other_seeds_and_beats_95_percent_of_them(compared, seeds, distance, claim):
    result = replace(compared, other_seeds=seeds, distance=distance)
    assert result.claim().startswith(claim) and claim in repr(result)


def test_contexts_are_the_words_of_largest_activity(compared):
    activity = compared.activity[0].toarray()[:, 0]
    words = [word for passage in compared.passages for word in passage.split()[1:]]
    best = [words[i] for i in np.argsort(-activity)[:3]]
    assert [context[1] for context in find_contexts(activity, compared.passages)] == best
    assert find_contexts(np.zeros(8), compared.passages) == []


@pytest.fixture
def page(compared, tmp_path):
    "The page in a browser; afterwards it must have said nothing and asked for nothing."
    path = compared.save_page(tmp_path / "compared.html")
    said, asked = [], []
    with sync_playwright() as play:
        chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        yield page
        browser.close()
    assert said == [] and all(url.startswith("file:") for url in asked)


def test_a_click_on_a_node_shows_its_partner_and_both_contexts(compared, page):
    row = compared.nodes.iloc[-1]
    page.focus(f"#graph-0 circle[data-name='{row['a']}']")
    page.keyboard.press("Enter")
    assert f"{row['a']} and {row['b']}: correlation" in page.text_content("#match")
    assert page.text_content("#card-0 h3") == row["a"] and page.text_content("#card-1 h3") == row["b"]
    assert page.get_attribute("#graph-1 circle.chosen", "data-name") == row["b"]
    marked = page.locator("#card-1 mark").all_text_contents()
    column = compared.graphs[1].nodes["name"].tolist().index(row["b"])
    activity = compared.activity[1].toarray()[:, column]
    assert marked == [context[1] for context in find_contexts(activity, compared.passages)]


def test_a_click_on_a_community_shows_its_nodes_in_both_graphs(compared, page):
    page.locator("#communities button").first.click()
    first = compared.communities.iloc[0]
    members = [
        (g.nodes["community"] == first[end]).sum() for g, end in zip(compared.graphs, "ab", strict=True)
    ]
    near = [page.locator(f"#graph-{side} circle:not(.far)") for side in (0, 1)]
    assert [one.count() for one in near] == members
    colours = {one.first.get_attribute("fill") for one in near}
    assert len(colours) == 1 and "claim" in page.text_content("table")


def test_a_page_has_the_suffix_of_one(compared, tmp_path):
    with pytest.raises(ValueError, match="must end in .html"):
        compared.save_page(tmp_path / "compared.txt")


def test_matched_communities_are_supernodes_of_a_prompt_with_one_name_in_both_models(tmp_path):
    model = tiny_model("llama")
    dictionaries = all_dictionaries(model, d_dict=11, k=4)
    pruning = Pruning(None)
    fine = build_graph(model, random_tokens(model), dictionaries, pruning=pruning, run=QUIET)
    fine = find_communities(fine, "leiden", seed=0)
    words = sp.csr_array(draw_profiles(30, len(fine.nodes), 0))
    matches = match_nodes(fine, fine, (words, words))
    communities = match_communities(fine, fine, (words, words))
    result = Comparison((fine, fine), (), (words, words), matches, communities, {}, 0.0, (1.0,))
    prompt = Prompt(random_tokens(model, 1, 6), n_logits=3)
    graph = build_graph(model, prompt, dictionaries, pruning=pruning, run=QUIET)
    named = [name_supernodes(result, side, graph) for side in (0, 1)]
    assert named[0].nodes["supernode"].equals(named[1].nodes["supernode"])
    path = save_attribution_graph(named[0], model, tmp_path / "shared.json", slug="shared")
    supernodes = json.loads(path.read_text())["qParams"]["supernodes"]
    community = fine.nodes.set_index("name")["community"]
    number = {c: i for i, c in enumerate(communities.loc[communities["p"] < 0.05, "a"])}
    shared = graph.nodes["name"].str.partition("@")[0].map(community).map(number)
    assert supernodes and {name for name, *_ in supernodes} <= {f"shared {i:g}" for i in shared.dropna()}
    assert (
        named[0].nodes["supernode"] == shared.map("shared {:.0f}".format, na_action="ignore").fillna("")
    ).all()
    with pytest.raises(ValueError, match="side must be 0 or 1"):
        name_supernodes(result, 2)
    with pytest.raises(ValueError, match="in a matched community"):
        name_supernodes(replace(result, communities=communities.assign(p=1.0)), 0)
    with pytest.raises(ValueError, match="of other weights"):
        other = tiny_model("llama", seed=1)
        name_supernodes(result, 0, build_graph(other, random_tokens(other), nodes="layer", run=QUIET))
