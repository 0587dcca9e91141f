"""Comparison against definitions: refinement, the distance of classes, matches, and bad input."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from scipy.optimize import linprog
from scipy.stats import kstest
from sklearn.metrics import adjusted_mutual_info_score

from circuitgraph.build.build import build_graph
from circuitgraph.community.links import add_history
from circuitgraph.community.patterns import read_patterns
from circuitgraph.community.search import find_communities
from circuitgraph.compare.compare import compare_graphs
from circuitgraph.compare.isomorphism import are_fractionally_isomorphic, class_distance, class_vectors
from circuitgraph.compare.isomorphism import compare_colours, permute_weights, read_shares, refine_colours
from circuitgraph.compare.match import correlate_nodes, cover_words, match_communities, match_nodes
from circuitgraph.compare.match import read_words, split_passages, verify_edges
from circuitgraph.compare.quotients import inequitability, match_classes, quotient_distance
from circuitgraph.data.corpus import load_corpus
from circuitgraph.graph.graph import Graph
from circuitgraph.model.loading import load_model, tiny_model
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
