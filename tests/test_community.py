"""Communities against planted ones and against chance, and the search against what it climbs."""

import networkx as nx
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from sklearn.metrics import adjusted_mutual_info_score

from circuitgraph.build.build import complete_graph
from circuitgraph.community.confirm import confirm_communities
from circuitgraph.community.groupings import count_tokens, nest_communities, other_groupings
from circuitgraph.community.groupings import profile_resolutions, read_directions
from circuitgraph.community.links import NULLS, Null, fit_weights, kept_sums, leave_out, node_levels
from circuitgraph.community.links import read_links, share_weights
from circuitgraph.community.nulls import fit_logs, judge_communities, quality, redraw, rewire
from circuitgraph.community.patterns import MEASURES, cluster_patterns, compare_patterns, judge_patterns
from circuitgraph.community.patterns import read_patterns, shuffle_patterns
from circuitgraph.community.search import consensus, find_communities, find_search
from circuitgraph.dictionary.places import read_places
from circuitgraph.dictionary.protocol import FunctionDictionary, LinearDictionary
from circuitgraph.graph.graph import Graph
from circuitgraph.graph.tables import GraphError
from circuitgraph.model.loading import tiny_model
from circuitgraph.model.modules import trace_modules
from circuitgraph.options import Run
from feature_oracles import all_dictionaries
from oracles import random_tokens
from planted import draw_layered, draw_tokens, halve, make_graph
from short import build_graph


def draw(n_levels=10, width=30, n_planted=6, n_edges=5_000, within=0.85, seed=0):
    return draw_layered(n_levels, width, n_planted, n_edges, within, spread=0.5, seed=seed)


def communities(graph, *args, **options):
    return find_communities(graph, *args, weight="abs_weight", **options).nodes["community"].to_numpy()


def test_the_layered_null_finds_what_is_planted_and_the_usual_one_levels():
    graph, planted, level = draw(12, 40, 6, 8_000, within=0.8)
    layered, usual = communities(graph, "layered"), communities(graph, "leiden")
    assert (
        adjusted_mutual_info_score(planted, layered) > 0.8 > 0.1 > adjusted_mutual_info_score(planted, usual)
    )
    assert adjusted_mutual_info_score(level, layered) < 0.1 < 0.3 < adjusted_mutual_info_score(level, usual)


def test_noise_is_no_more_than_chance_and_what_is_planted_is():
    z = [
        judge_communities(draw(within=within, seed=seed)[0], weight="abs_weight", n_null=8)["z"]
        for within, seed in ((0.0, 1), (0.0, 2), (0.85, 1))
    ]
    assert max(abs(z[0]), abs(z[1])) < 4 < 10 < z[2]


def test_two_parts_without_an_edge_between_them_are_apart():
    level = np.repeat(np.arange(3), 4)
    pairs = np.array([(i, j) for i in range(12) for j in range(12) if level[i] < level[j] and i % 2 == j % 2])
    graph = make_graph(*pairs.T, np.ones(len(pairs)), np.append(level, 3))
    for method in ("leiden", "layered", "infomap"):
        found = communities(graph, method)
        assert (
            found[-1] == -1
            and len(set(found[:12])) == 2
            and all(len(set(found[k:12:2])) == 1 for k in (0, 1))
        ), method


@pytest.mark.parametrize("null", ["layered", "configuration"])
@pytest.mark.parametrize("resolution", [0.7, 1.5])
def test_quality_by_definition(null, resolution):
    graph, _, level = draw(4, 6, 2, 60)
    graph = find_communities(graph, "layered", weight="abs_weight")
    w, member = np.zeros((24, 24)), graph.nodes["community"].to_numpy()
    w[graph.edges["source"].cat.codes, graph.edges["target"].cat.codes] = graph.edges["abs_weight"]
    total = 0.0
    for i in range(24):
        for j in range(24):
            if member[i] != member[j] or member[i] < 0:
                continue
            if null == "configuration":
                expected = w[i].sum() * w[:, j].sum() / w.sum()
            else:
                block, sent, got = (
                    w[np.ix_(level == level[i], level == level[j])].sum(),
                    w[level == level[i]].sum(),
                    w[:, level == level[j]].sum(),
                )
                expected = 0.0 if block == 0 else w[i].sum() / sent * w[:, j].sum() / got * block
            total += w[i, j] - resolution * expected
    assert np.isclose(quality(graph, null, weight="abs_weight", resolution=resolution), total / w.sum())


def test_no_single_move_improves_what_the_search_returns():
    graph, _, _ = draw(5, 8, 3, 200)
    found = find_communities(graph, "layered", weight="abs_weight")
    best, member = quality(found, weight="abs_weight"), found.nodes["community"].to_numpy()
    assert best > quality(
        Graph(graph.nodes.assign(community=0), graph.edges, graph.meta), weight="abs_weight"
    )
    for i in range(len(member)):
        for c in range(member.max() + 2):
            moved = member.copy()
            moved[i] = c
            assert (
                quality(
                    Graph(graph.nodes.assign(community=moved), graph.edges, graph.meta), weight="abs_weight"
                )
                < best + 1e-9
            )


@pytest.mark.parametrize("seed", range(3))
def test_communities_are_connected_and_nodes_without_an_edge_change_nothing(seed):
    """Noise, sparse: moves alone, without refinement, leave a community of the first graph in two parts."""
    graph, _, _ = draw(12, 160, 20, 4_000, within=0.0, seed=seed)
    member, more = (
        communities(graph, "layered"),
        Graph(
            pd.concat(
                [graph.nodes, graph.nodes.iloc[-50:].assign(name=[f"m11/{2_000 + i}" for i in range(50)])],
                ignore_index=True,
            ),
            graph.edges.astype({"source": str, "target": str}),
            graph.meta,
        ),
    )
    whole = nx.Graph(zip(graph.edges["source"].cat.codes, graph.edges["target"].cat.codes, strict=True))
    assert member.max() > 5 and all(
        nx.is_connected(whole.subgraph(np.flatnonzero(member == c).tolist())) for c in range(member.max() + 1)
    )
    assert communities(more, "layered").tolist() == [*member, *[-1] * 50]


def test_the_constant_potts_model_tells_cliques_of_a_ring_apart_which_modularity_merges():
    """Thirty cliques of five, one edge from each to the next.

    By hand: joining neighbours changes modularity by 2 (1 - 22^2 / (2 * 330)) / 660 > 0; at resolution one
    half the Potts model loses 1 - 25 / 2.
    """
    n, size = 30, 5
    pairs = [
        (size * c + i, size * c + j) for c in range(n) for i in range(size) for j in range(i + 1, size)
    ] + [tuple(sorted((size * c, (size * c + size + 1) % (n * size)))) for c in range(n)]
    graph, cliques = (
        make_graph(*np.array(pairs).T, np.ones(len(pairs)), np.zeros(n * size, dtype=int)),
        np.arange(n * size) // size,
    )
    potts, usual = communities(graph, "cpm", resolution=0.5), communities(graph, "leiden")
    assert adjusted_mutual_info_score(cliques, potts) == 1 and potts.max() == n - 1
    assert usual.max() < n - 1 and all(
        len(set(usual[cliques == c])) == 1 for c in range(n)
    )  # whole cliques, some of them joined
    assert communities(graph, "cpm", resolution=0.03).max() < n - 1  # below 1 / 25 they are joined here too


def test_rewiring_keeps_what_the_null_holds_fixed():
    graph, _, _ = draw()
    other, level = rewire(graph, seed=3), node_levels(graph.nodes)
    tables = [
        g.edges.assign(r=level[g.edges["source"].cat.codes], s=level[g.edges["target"].cat.codes])
        for g in (graph, other)
    ]
    for keys in (["r", "s"], ["source"], ["target"]):
        a, b = (table.groupby(keys, observed=True)["weight"].sum() for table in tables)
        assert np.allclose(a, b, rtol=2e-3)
    assert (
        tables[0]["target"]
        .value_counts()
        .sort_index()
        .equals(tables[1]["target"].value_counts().sort_index())
    )
    assert (
        len(other) == len(graph) == len(set(other.edge_names))
        and len(set(graph.edge_names) & set(other.edge_names)) < len(graph) / 2
    )
    assert other.edge_names == rewire(graph, seed=3).edge_names != rewire(graph, seed=4).edge_names


@pytest.mark.parametrize("method", ["leiden", "layered", "infomap"])
def test_a_seed_is_its_communities_and_they_are_saved(method, tmp_path):
    graph, _, _ = draw(within=0.5)
    found = find_communities(graph, method, seed=1)
    assert found == find_communities(graph, method, seed=1) and "community" not in graph.nodes
    found.save(tmp_path / "g")
    assert Graph.load(tmp_path / "g") == found
    sizes = found.nodes["community"].value_counts()
    assert (sizes.sort_index().diff().dropna() <= 0).all()


def test_shares_of_readers():
    graph, _, _ = draw()
    share = share_weights(graph)
    into = graph.edges.assign(share=share).groupby("target", observed=True)["share"].sum()
    assert np.allclose(into, 1)
    kept = Graph(graph.nodes.assign(kept=0.5, frequency=0.2), graph.edges, graph.meta)
    assert np.allclose(share_weights(kept), 0.1 * share)


def test_refusals():
    graph, _, _ = draw(3, 4, 2, 12)
    for run, words in [
        (lambda: find_communities(graph, "louvain"), "method must be"),
        (lambda: find_communities(graph, resolution=0), "resolution must be above 0"),
        (lambda: find_communities(graph, resolution=float("nan")), "resolution must be a finite number"),
        (lambda: find_communities(graph.keep([])), "edge whose share is not zero"),
        (lambda: find_communities(graph, weight="count"), "by must be"),
        (lambda: quality(graph), "call find_communities first"),
        (lambda: quality(find_communities(graph), "none"), "null must be"),
        (lambda: judge_communities(graph, n_null=1), "at least 2"),
    ]:
        with pytest.raises(ValueError, match=words):
            run()
    one = make_graph([0], [1], np.ones(1), [0, 1])
    assert (
        find_communities(one).nodes["community"].tolist() == [0, 0]
        and find_communities(one, "layered").nodes["community"].nunique() <= 2
    )


# Planted benchmarks


def test_lfr_graphs_are_cut_where_they_were_planted():
    lfr = nx.LFR_benchmark_graph(
        1_000, 3, 1.5, 0.3, average_degree=20, max_degree=50, min_community=20, max_community=100, seed=1
    )
    lfr.remove_edges_from(nx.selfloop_edges(lfr))
    planted = np.array([min(lfr.nodes[i]["community"]) for i in range(1_000)])
    graph = make_graph(
        *np.array([sorted(pair) for pair in lfr.edges]).T,
        np.ones(lfr.number_of_edges()),
        np.zeros(1_000, dtype=int),
    )
    found = {
        method: [communities(graph, method, resolution=2.0, seed=s) for s in (0, 1)]
        for method in ("leiden", "layered", "infomap")
    }
    for method, (one, two) in found.items():
        assert (
            adjusted_mutual_info_score(planted, one) > 0.95 and adjusted_mutual_info_score(one, two) > 0.95
        ), method


def draw_signed(n=1_000, n_planted=5, degree=20, wrong=0.05, seed=0):
    """Pairs at random; an edge raises within a community and lowers between two, but for a wrong share."""
    generator = np.random.default_rng(seed)
    planted, pairs = (
        generator.integers(n_planted, size=n),
        np.unique(np.sort(generator.integers(n, size=(n * degree, 2)), axis=1), axis=0),
    )
    source, target = pairs[pairs[:, 0] < pairs[:, 1]].T
    sign = np.where(planted[source] == planted[target], 1.0, -1.0) * np.where(
        generator.random(len(source)) < wrong, -1, 1
    )
    return make_graph(source, target, sign, np.zeros(n, dtype=int)), planted


def test_signs_alone_make_communities():
    graph, planted = draw_signed()
    assert (
        adjusted_mutual_info_score(planted, communities(graph, "signed"))
        > 0.95
        > 0.05
        > adjusted_mutual_info_score(planted, communities(graph, "leiden"))
    )
    assert communities(graph, "signed").tolist() == communities(graph, "signed").tolist()


# Nulls, cross-fitting


def test_on_noise_the_layered_null_reports_nothing_and_the_usual_one_levels():
    noise, _, _ = draw(within=0.0)
    judged = {
        null: judge_communities(noise, method, null=null, weight="abs_weight", n_null=19)
        for method, null in (("layered", "layered"), ("leiden", "configuration"))
    }
    assert (
        judged["layered"]["p"] > 0.05
        and judged["configuration"]["p"] == 0.05
        and judged["configuration"]["z"] > 20
    )


def test_what_is_found_on_one_half_holds_on_the_other_only_if_it_was_planted():
    smallest = [
        confirm_communities(
            *halve(draw(within=0.0, n_edges=2_000, seed=seed)[0]), weight="abs_weight", n_null=19
        )["p"].min()
        for seed in range(6)
    ]
    assert np.sum(np.array(smallest) <= 0.05) <= 1  # of six, at a twentieth each
    one, two = halve(draw()[0])
    table = confirm_communities(one, two, weight="abs_weight", n_null=19)
    member = communities(one, "layered")
    inside = member[two.edges["source"].cat.codes] == member[two.edges["target"].cat.codes]
    assert (
        len(table) == 6
        and (table["p"] == 0.05).all()
        and np.isclose(
            table["within"].sum(), two.edges["abs_weight"][inside].sum() / two.edges["abs_weight"].sum()
        )
    )
    assert (
        confirm_communities(*halve(draw(within=0.0)[0]), "leiden", weight="abs_weight", n_null=19)["p"]
        == 0.05
    ).any()
    with pytest.raises(ValueError, match="nodes of graph"):
        confirm_communities(one, draw(n_levels=9)[0])


def test_features_that_are_active_together_are_no_communities():
    """Weights that are noise among features of one kind of token: rewiring calls them communities."""
    many_kinds, _ = draw_tokens(n_kinds=12, width=24)
    rewired = judge_communities(many_kinds, "layered", weight="abs_weight", n_null=4)
    assert rewired["z"] > 10
    smallest = []
    for seed, noise in enumerate(["tokens", "heavy", "hubs"] * 4):
        graph, _ = draw_tokens(n_kinds=5, width=20, noise=noise, seed=seed)
        halves = halve(graph, seed)
        tested = confirm_communities(*halves, "co-active", weight="abs_weight", n_null=9)
        smallest.append(tested["p"].min())
    assert np.sum(np.array(smallest) <= 0.1) <= 4  # of twelve, at a tenth each; more in one of 230 runs
    graph, _ = draw_tokens(n_kinds=6, width=40, strength=16.0)
    as_features = [Graph(half.nodes, half.edges, half.meta | {"nodes": "feature"}) for half in halve(graph)]
    tested = confirm_communities(*as_features, weight="abs_weight", n_null=19)  # the search of features
    assert (tested["p"] == 0.05).sum() >= 3


def test_weights_change_places_and_pairs_stay():
    graph, _ = draw_tokens(n_kinds=3, width=12)
    one, two = (read_links(half, "abs_weight") for half in halve(graph))
    two = two._replace(weight=np.where(np.arange(len(two.weight)) % 7 == 0, 0, two.weight))
    null = NULLS["co-active"]
    first, second = redraw([one, two], null, np.random.default_rng(0))
    for before, after in ((one, first), (two, second)):
        assert (before.source == after.source).all() and (before.target == after.target).all()
        assert (before.weight == 0).sum() == (after.weight == 0).sum()
    assert (first.weight != one.weight).mean() > 0.9
    # the logarithms' fit by least squares, from a table of sources, targets and blocks
    block = kept_sums(one, null)[2]
    columns = [pd.get_dummies(x).to_numpy(float) for x in (one.source, one.target, block)]
    table = np.concatenate(columns, axis=1)
    solved = table @ np.linalg.lstsq(table, np.log(one.weight), rcond=None)[0]
    assert np.allclose(fit_logs(one, null, n_rounds=3_000, tolerance=1e-12), solved, atol=1e-6)
    fit = fit_weights(one, null)
    for key in kept_sums(one, null):
        assert np.allclose(np.bincount(key, fit), np.bincount(key, one.weight), rtol=1e-2)
    with pytest.raises(ValueError, match="is one to compare with"):
        find_communities(graph, "layered", null="co-active")


def test_half_an_edge_list_in_each_half():
    graph = draw()[0]
    pick = np.random.default_rng(0).random(len(graph)) < 0.5
    table = confirm_communities(
        graph.keep(pick), graph.keep(~pick), weight="abs_weight", n_null=9
    )  # no edge in both
    assert (table["p"] == 0.1).any()


def test_shares_are_carried_along_when_edges_are_rewired():
    """Readers of other units.

    With shares taken anew after rewiring, one edge would be most of its reader, and chance would seem better
    than what is there.
    """
    graph, _, _ = draw(within=0.0)
    unit = 10.0 ** np.random.default_rng(0).uniform(-3, 3, len(graph.nodes))
    mixed = Graph(
        graph.nodes,
        graph.edges.assign(abs_weight=graph.edges["abs_weight"] * unit[graph.edges["target"].cat.codes]),
        graph.meta,
    )
    assert abs(judge_communities(mixed, n_null=10)["z"]) < 4
    assert np.allclose(share_weights(mixed), share_weights(graph))


def test_where_every_pair_has_an_edge_weights_change_places():
    level = np.repeat(np.arange(3), 9)
    pairs = np.array([(i, j) for i in range(27) for j in range(27) if level[i] < level[j]])
    graph = make_graph(*pairs.T, np.random.default_rng(0).exponential(size=len(pairs)), level)
    other = rewire(graph, 1)
    assert set(other.edge_names) == set(graph.edge_names) and len(other) == len(graph)
    weights = [
        g.edges.assign(name=g.edge_names).set_index("name")["weight"].sort_index() for g in (graph, other)
    ]
    assert (
        np.corrcoef(weights[0], weights[1])[0, 1] < 0.5
        and np.allclose(graph.in_strength(), other.in_strength(), rtol=1e-2, atol=1e-3)
        and np.allclose(graph.out_strength(), other.out_strength(), rtol=1e-2, atol=1e-3)
    )
    planted = np.arange(27) % 3
    within = Graph(
        graph.nodes,
        graph.edges.assign(
            abs_weight=graph.edges["abs_weight"]
            * np.where(planted[pairs[:, 0]] == planted[pairs[:, 1]], 4, 1)
        ),
        graph.meta,
    )
    assert (
        judge_communities(within, weight="abs_weight", n_null=10)["z"]
        > 5
        > abs(judge_communities(graph, weight="abs_weight", n_null=10)["z"])
    )


# Consensus, profiles, nesting


def test_consensus_is_the_partition_with_fewest_disagreements():
    found = np.array([[0, 0, 1, 1, 2], [0, 0, 1, 1, 1], [0, 1, 1, 1, 2]])
    together = [(a[:, None] == a).astype(int) for a in found]

    def disagree(member):
        return sum(np.abs((member[:, None] == member) - t).sum() for t in together)

    best = min((np.array(p) for p in np.ndindex(5, 5, 5, 5, 5)), key=disagree)
    assert disagree(consensus(found)) == disagree(best)
    assert (
        consensus(found[[0, 0]]).tolist() == [0, 0, 1, 1, 2]
        or adjusted_mutual_info_score(consensus(found[[0, 0]]), found[0]) == 1
    )


def test_profile_and_nesting():
    graph, planted, _ = draw()
    profile = profile_resolutions(
        graph, "layered", (0.1, 0.75, 1.0, 1.1, 1.2, 4.0), weight="abs_weight", n_seeds=2
    )
    assert (
        profile["communities"].is_monotonic_increasing
        and set(profile.loc[profile["plateau"], "communities"]) == {6.0}
        and np.isnan(profile["next"].iloc[-1])
    )
    for method in ("leiden", "layered", "infomap"):
        nodes = nest_communities(graph, method, (0.1, 1.0, 3.0), weight="abs_weight").nodes
        assert all(
            nodes.groupby(f"community_{k + 1}")[f"community_{k}"].nunique().max() == 1 for k in (0, 1)
        ), method
    assert (
        adjusted_mutual_info_score(
            planted, nest_communities(graph, "layered", (0.1, 1.0), weight="abs_weight").nodes["community"]
        )
        > 0.9
    )


# Activation patterns


@pytest.mark.parametrize("measure", MEASURES)
def test_measures_by_definition(measure):
    draw_from = np.random.default_rng(1)
    x = (draw_from.random((200, 7)) < 0.3) * draw_from.normal(1, 0.3, (200, 7))
    x[:, 3] = x[:, 2] * (draw_from.random(200) < 0.9)
    x = x[(x != 0).any(1)]
    on, expected = (x != 0).astype(float), np.zeros((7, 7))
    for i in range(7):
        for j in range(7):
            both = (on[:, i] * on[:, j]).mean()
            expected[i, j] = {
                "phi": np.corrcoef(on[:, i], on[:, j])[0, 1],
                "correlation": np.corrcoef(x[:, i], x[:, j])[0, 1],
                "cosine": x[:, i] @ x[:, j] / np.linalg.norm(x[:, i]) / np.linalg.norm(x[:, j]),
                "jaccard": both / (on[:, i].mean() + on[:, j].mean() - both),
                "npmi": np.log(both / on[:, i].mean() / on[:, j].mean()) / -np.log(both),
            }[measure]
    found = compare_patterns(sp.csr_array(x), measure, n_neighbours=7, least=1e-9, block=3).toarray()
    assert np.allclose(found, np.where((expected > 0) & ~np.eye(7, dtype=bool), expected, 0))
    two = compare_patterns(sp.csr_array(x), measure, n_neighbours=1, least=1e-9).toarray()
    assert (
        (two[2, 3], two[3, 2]) == (found[2, 3], found[3, 2])
        and ((two > 0).sum(1) >= 1).sum() >= 2
        and (two == two.T).all()
    )


def test_nodes_that_are_hardly_active_have_no_neighbours():
    x = np.zeros((50, 3))
    x[:4, :2] = 1
    x[10:30, 2] = 1
    assert (
        compare_patterns(sp.csr_array(x), n_active=5).nnz == 0
        and compare_patterns(sp.csr_array(x), n_active=4)[0, 1] > 0.99
    )
    always = np.ones((50, 2))
    assert compare_patterns(sp.csr_array(always)).nnz == 0  # always active: nothing can be said


def test_shuffling_keeps_each_pattern_and_breaks_them_apart():
    x = np.repeat((np.random.default_rng(0).random((400, 1)) < 0.1) * 2.0, 20, axis=1)
    x[:, 0] = 1  # so that no position is left out
    shuffled = shuffle_patterns(sp.csr_array(x), 1).toarray()
    assert (np.sort(shuffled, axis=0) == np.sort(x, axis=0)).all() and compare_patterns(
        sp.csr_array(x)
    ).nnz > 0
    alike = np.corrcoef(shuffled[:, 1:].T)[np.triu_indices(19, 1)]
    two = np.where(np.arange(20) < 10, x, np.roll(x, 17, axis=0))
    assert np.mean(alike > 0.99) < 0.1 and judge_patterns(sp.csr_array(two), n_null=10)["z"] > 3


def test_patterns_are_what_nodes_do():
    model = tiny_model("llama")
    tokens, dictionaries = random_tokens(model, 3, 8), all_dictionaries(model)
    graph = build_graph(model, tokens, dictionaries, progress=False)
    patterns, module = (
        read_patterns(model, graph, tokens, dictionaries, run=Run(batch_size=2, progress=False)).toarray(),
        graph.nodes["module"].to_numpy(),
    )
    assert patterns.shape == (24, len(graph.nodes))
    for name, dictionary in dictionaries.items():
        acts = (
            dictionary.encode(read_places(model, tokens, [(name, dictionary.reads)])[name, dictionary.reads])
            .flatten(0, 1)
            .detach()
            .numpy()
        )
        acts[::8] = 0
        mine = (module == name) & (graph.nodes["kind"] == "feature").to_numpy()
        assert np.allclose(patterns[:, mine], acts[:, graph.nodes["index"][mine]])
    assert not patterns[:, (graph.nodes["kind"] != "feature").to_numpy()].any()
    heads, trace = (
        complete_graph(model),
        trace_modules(model, tokens, "head").writes.norm(dim=-1).flatten(0, 1).detach().numpy(),
    )
    found = read_patterns(model, heads, tokens, skip_first=0, run=Run(progress=False)).toarray()
    row = {name: i for i, name in enumerate(heads.nodes["name"])}
    assert (
        np.allclose(found[:, row["a1.h1"]], trace[:, row["a1.h1"]], atol=1e-5)
        and not found[:, [row["const"], row["logits"]]].any()
        if "const" in row
        else True
    )
    with pytest.raises(ValueError, match="is missing"):
        read_patterns(model, graph, tokens, {}, run=Run(progress=False))


def test_joint_communities_need_both():
    """Edges tell halves apart by one cut, activity by another: together they make four."""
    generator, n = np.random.default_rng(0), 80
    group = np.arange(n) % 4
    pairs = np.array(
        [
            (i, j)
            for i in range(n)
            for j in range(i + 1, n)
            if (group[i] < 2) == (group[j] < 2) and generator.random() < 0.5
        ]
    )
    graph = make_graph(*pairs.T, np.ones(len(pairs)), np.zeros(n, dtype=int))
    topic = generator.integers(2, size=1_000)
    similarity = compare_patterns(
        sp.csr_array(
            (generator.random((1_000, n)) < np.where(group % 2 == topic[:, None], 0.3, 0.02)).astype(float)
        ),
        n_neighbours=20,
    )
    assert (
        adjusted_mutual_info_score(group, communities(graph, "joint", similarity=similarity, resolution=1.2))
        > 0.95
    )
    assert (
        adjusted_mutual_info_score(group % 2, communities(graph, "activation", similarity=similarity))
        == 1
        == adjusted_mutual_info_score(group < 2, communities(graph, "leiden"))
    )


# Other ways to group nodes


def test_clusters_of_patterns():
    generator, n = np.random.default_rng(0), 120
    topic, group = generator.integers(4, size=1_500), np.arange(n) % 4
    x = (generator.random((1_500, n)) < np.where(group == topic[:, None], 0.3, 0.02)) * generator.exponential(
        size=(1_500, n)
    )
    x[:, 7] = 0
    on = np.arange(n) != 7
    for method in ("nmf", "cocluster"):
        found = cluster_patterns(sp.csr_array(x), 4, method, seed=1)
        assert (
            adjusted_mutual_info_score(group[on], found[on]) > 0.9
            and found[7] == -1
            and (found == cluster_patterns(sp.csr_array(x), 4, method, seed=1)).all()
        ), method
        assert (
            cluster_patterns(shuffle_patterns(sp.csr_array(x), 1), 4, method).max() == 3
        )  # in noise as many, for they are asked for
        scaled = cluster_patterns(
            sp.csr_array(x * np.where(np.arange(n) % 3, 1, 5)), 4, method
        )  # nodes in other units
        assert adjusted_mutual_info_score(group[on], scaled[on]) > 0.9, method
    for run, words in [
        (lambda: cluster_patterns(sp.csr_array(x), 4, "kmeans"), "method must be"),
        (lambda: cluster_patterns(sp.csr_array(x), 120), r"n must lie in \[2, 119\]"),
        (lambda: cluster_patterns(sp.csr_array(-x), 4), "not negative"),
        (lambda: cluster_patterns(sp.csr_array(x[:3]), 4), "n must lie"),
    ]:
        with pytest.raises(ValueError, match=words):
            run()


def test_tables_may_be_dense():
    x = np.random.default_rng(0).normal(size=(30, 12))
    for measure in MEASURES:
        assert np.allclose(
            compare_patterns(x, measure, least=1e-9).toarray(),
            compare_patterns(sp.csr_array(x), measure, least=1e-9).toarray(),
        )
    with pytest.raises(ValueError, match="finite"):
        compare_patterns(0 * x)


def test_directions_by_definition():
    model = tiny_model("gpt2")
    tokens, dictionaries = random_tokens(model, 5, 8), all_dictionaries(model)
    graph = build_graph(model, tokens, dictionaries, progress=False)
    found, nodes = read_directions(model, graph, dictionaries=dictionaries), graph.nodes
    for i, row in nodes.iterrows():
        if row["kind"] != "feature":
            assert not found[:, i].any()
            continue
        dictionary = dictionaries[row["module"]]
        alone = torch.eye(dictionary.d_dict, dtype=torch.float64)[row["index"]] * row["mean_activation"]
        written = (dictionary.decode(alone) - dictionary.decode(0 * alone)).numpy()
        if np.linalg.norm(written) > 1e-6:
            assert np.isclose(
                written @ found[:, i] / np.linalg.norm(written) / np.linalg.norm(found[:, i]), 1, atol=1e-5
            ), row["name"]
    heads, writes = complete_graph(model), trace_modules(model, tokens, "head").writes.detach().numpy()[:, 1:]
    mean, row = (
        read_directions(model, heads, tokens, run=Run(batch_size=2)),
        {name: i for i, name in enumerate(heads.nodes["name"])},
    )
    assert np.allclose(
        mean[:, row["a1.h1"]],
        np.mean(
            [
                y / np.linalg.norm(y)
                for y in writes[:, :, list(heads.nodes["name"]).index("a1.h1")].reshape(-1, 16)
            ],
            axis=0,
        ),
        atol=1e-5,
    )
    assert not mean[:, [row["const"], row["logits"]]].any()
    with pytest.raises(ValueError, match="corpus must be given"):
        read_directions(model, heads)
    with pytest.raises(ValueError, match="is missing"):
        read_directions(model, graph, tokens, {})


def test_a_decoder_that_is_not_linear_has_directions():
    model = tiny_model("llama")
    W = torch.randn(6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens, bent = (
        random_tokens(model, 3, 8),
        FunctionDictionary(
            "m0", "output", 6, lambda y: y[..., :6].relu(), lambda acts: torch.tanh(acts @ W.to(acts))
        ),
    )
    graph = build_graph(model, tokens, {"m0": bent}, progress=False)
    found, mean = read_directions(model, graph, None, {"m0": bent}), graph.nodes["mean_activation"]
    features = graph.nodes.index[graph.nodes["kind"] == "feature"]
    assert len(features) and all(
        np.allclose(found[:, i], np.tanh(mean[i] * W[graph.nodes["index"][i]].numpy()), atol=1e-6)
        for i in features
    )


def test_sums_by_token():
    corpus = torch.tensor([[3, 5, 3], [5, 5, 9]])
    x = np.array(
        [[0, 0], [1, 2], [3, 0], [0, 0], [4, 1], [0, 2.0]]
    )  # the first and the fourth position are idle
    assert count_tokens(sp.csr_array(x), corpus).toarray().tolist() == [[3, 0], [5, 3], [0, 2]]
    assert np.allclose(
        count_tokens(sp.csr_array(x), corpus, excess=True).toarray(),
        np.array([[3, 0], [5, 3], [0, 2]]) - np.outer([1, 2, 1], [2, 1.25]),
    )
    with pytest.raises(ValueError, match="6 positions, got 3"):
        count_tokens(sp.csr_array(x), corpus[:1])


def test_other_groupings_of_heads_and_features():
    model = tiny_model("llama")
    tokens, toward = random_tokens(model, 8, 12), np.arange(40) % 4
    generator = torch.Generator().manual_seed(0)
    axes, random = (
        torch.randn(4, 16, dtype=torch.float64, generator=generator),
        torch.randn(2, 16, 40, dtype=torch.float64, generator=generator),
    )
    dictionaries = {
        name: LinearDictionary(
            name,
            "output",
            random[k, :, :20],
            axes[toward[20 * k : 20 * k + 20]] + 0.2 * random[k, :, 20:].mT,
            torch.zeros(20).double(),
            torch.zeros(16).double(),
        )
        for k, name in enumerate(("m0", "m1"))
    }
    fine = find_communities(
        leave_out(
            build_graph(model, tokens, dictionaries, keep=None, progress=False), ["embed", "logits", "error"]
        ),
        "layered",
        resolution=1.0,
    )
    heads = find_communities(
        leave_out(build_graph(model, tokens, "head", progress=False), ["embed", "logits"]), "layered"
    )
    for graph, given in ((fine, dictionaries), (heads, None)):
        others, again = (other_groupings(model, graph, tokens, given, seed=2) for _ in range(2))
        own = graph.nodes["community"].to_numpy()
        assert list(others) == ["rewired", "directions", "tokens"] and all(
            others[name] == again[name] and others[name].edges.equals(graph.edges) for name in others
        )
        for name, other in others.items():
            member = other.nodes["community"].to_numpy()
            assert (
                (member[own < 0] == -1).all()
                and set(member[member >= 0]) == set(range(member.max() + 1))
                and (name != "rewired" or ((member >= 0) == (own >= 0)).all())
            )
    on, directions = (
        (fine.nodes["kind"] == "feature").to_numpy(),
        other_groupings(model, fine, tokens, dictionaries)["directions"].nodes,
    )
    assert (
        adjusted_mutual_info_score(
            toward[directions["index"][on] + 20 * (directions["module"][on] == "m1")],
            directions["community"][on],
        )
        > 0.9
    )
    with pytest.raises(ValueError, match="find_communities first"):
        other_groupings(model, build_graph(model, tokens, "head", progress=False), tokens)
    with pytest.raises(ValueError, match="is missing"):
        other_groupings(model, fine, tokens)
    with pytest.raises(ValueError, match="resolution must be above 0"):
        other_groupings(model, heads, tokens, resolutions=(0.0,))
    with pytest.raises(ValueError, match="method must be"):
        other_groupings(model, heads, tokens, method="louvain")


def test_groups_of_rewired_edges_are_not_those_that_were_planted():
    graph, planted, _ = draw(within=0.85)
    assert (
        adjusted_mutual_info_score(planted, communities(graph, "layered"))
        > 0.8
        > 0.1
        > adjusted_mutual_info_score(planted, communities(rewire(graph, 1), "layered"))
    )


# Bad input


def test_hubs_left_out_leave_other_shares_as_they_were():
    graph, _, _ = draw()
    hub = graph.edges["source"].astype(str).iloc[0]
    without = leave_out(graph, [hub])
    stays = ((graph.edges["source"] != hub) & (graph.edges["target"] != hub)).to_numpy()
    assert np.allclose(share_weights(without), share_weights(graph)[stays]) and len(without.nodes) == len(
        graph.nodes
    )
    assert np.allclose(
        share_weights(leave_out(without, ["m3/95"])), share_weights(leave_out(graph, [hub, "m3/95"]))
    )
    with pytest.raises(ValueError, match="kinds are feature"):
        leave_out(graph, ["const"])


def test_what_can_not_be_cut_is_refused():
    graph, _, _ = draw(3, 4, 2, 12)
    one, empty = (
        make_graph([], [], np.zeros(0), [0]),
        Graph(graph.nodes.iloc[:0], graph.edges.iloc[:0].astype({"source": str, "target": str}), graph.meta),
    )
    zero, unknown = (
        Graph(graph.nodes, graph.edges.assign(abs_weight=0.0), graph.meta),
        Graph(graph.nodes.assign(frequency=np.nan), graph.edges, graph.meta),
    )
    active = sp.csr_array(np.ones((30, 12)))
    for run, words in [
        (lambda: find_communities(one), "got 0 edges"),
        (lambda: find_communities(empty), "got 0 edges"),
        (lambda: find_communities(zero), "is not zero, got"),
        (lambda: judge_communities(zero), "is not zero, got"),
        (lambda: find_communities(unknown), "must be finite"),
        (lambda: Graph(graph.nodes, graph.edges.assign(abs_weight=np.nan), graph.meta), "must be finite"),
        (lambda: find_communities(graph, resolution=-1), "above 0"),
        (lambda: find_communities(graph, resolution=np.inf), "finite"),
        (lambda: find_communities(graph, n_seeds=0), "n_seeds"),
        (lambda: find_communities(graph, "joint"), "compare_patterns makes it"),
        (lambda: find_communities(graph, similarity=active), "with no other"),
        (lambda: find_communities(graph, "joint", similarity=active), "row and a column for each of the 12"),
        (lambda: find_communities(graph, "activation", similarity=sp.csr_array((12, 12))), "no two nodes"),
        (lambda: profile_resolutions(graph, resolutions=(1, 1)), "must rise"),
        (lambda: nest_communities(graph, resolutions=()), "must rise"),
        (lambda: nest_communities(graph, resolutions=(0, 1)), "above 0"),
        (lambda: compare_patterns(active, "pearson"), "measure must be"),
        (lambda: compare_patterns(active, least=0), "least above 0"),
        (lambda: compare_patterns(0 * active), "node that is active"),
        (lambda: compare_patterns(active * np.nan), "finite"),
    ]:
        with pytest.raises(ValueError, match=words):
            run()


def test_parts_without_an_edge_between_them_are_no_trouble():
    graph = make_graph([0, 2, 4], [1, 3, 5], np.ones(3), [0, 1] * 3 + [0])
    for run in (
        lambda: find_communities(graph, "signed"),
        lambda: find_communities(graph, "cpm", resolution=0.1),
        lambda: find_communities(graph, n_seeds=3),
        lambda: nest_communities(graph),
    ):
        member = run().nodes["community"].to_numpy()
        assert (
            member[6] == -1
            and len(set(member[[0, 2, 4]])) == 3
            and (member[[0, 2, 4]] == member[[1, 3, 5]]).all()
        )


# Null models and searches from outside the package


def alternate(nodes):
    """A null model that knows attention and MLPs, but no depth."""
    return nodes["layer"].to_numpy() % 2


def test_a_null_model_is_a_function_of_the_nodes():
    graph, _, level = draw()
    found = find_communities(graph, "layered", null=alternate, weight="abs_weight")
    assert found.meta["history"][-1].endswith("null alternate")
    member = found.nodes["community"].to_numpy()
    best = quality(found, alternate, weight="abs_weight")
    for other in (0 * member, level, communities(graph, "layered")):
        rival = Graph(graph.nodes.assign(community=other), graph.edges, graph.meta)
        assert quality(rival, alternate, weight="abs_weight") < best
    one = Graph(graph.nodes.assign(community=0), graph.edges, graph.meta)
    assert np.isclose(quality(one, alternate, weight="abs_weight"), 0)
    search = find_search("layered", alternate)
    judged = judge_communities(graph, search, null=alternate, weight="abs_weight", n_null=4, n_seeds=2)
    assert np.isclose(judged["quality"], best, atol=0.02) and judged["z"] > 5
    halves = halve(graph)
    tested = confirm_communities(*halves, search, weight="abs_weight", n_null=9)
    assert (tested["p"] == 0.1).any()


def by_index(nodes):
    """Levels, each in two parts."""
    return 2 * node_levels(nodes) + nodes["index"].to_numpy() % 2


def test_rewiring_keeps_what_a_null_from_outside_holds_fixed():
    graph, _, _ = draw()
    other = rewire(graph, 1, null=by_index)
    assert set(graph.edge_names) & set(other.edge_names) < set(graph.edge_names)
    sums = []
    for one in (graph, other):
        links = read_links(one, "abs_weight")
        level = by_index(links.nodes)
        between = np.zeros((20, 20))
        np.add.at(between, (level[links.source], level[links.target]), links.weight)
        sums.append(between)
    assert np.allclose(*sums, rtol=1e-2, atol=0.1)
    with pytest.raises(GraphError, match="point forward"):  # no graph without depth
        rewire(graph, 1, null="configuration")


def test_the_named_null_models_are_functions_too():
    graph, _, _ = draw(within=0.5)
    named = find_communities(graph, "layered", seed=2)
    given = find_communities(graph, "layered", null=Null("layered", node_levels), seed=2)
    assert named.nodes.equals(given.nodes)
    for null in (lambda nodes: node_levels(nodes), "layered"):
        assert quality(named, null) == quality(named, "layered")
    with pytest.raises(ValueError, match="climbs no other null"):
        find_communities(graph, "leiden", null="layered")


def by_module(links, _):
    """A search that looks at nothing: a community for each module."""
    return links.nodes["module"].factorize()[0]


def test_a_search_is_a_function_of_links_and_options():
    graph, _, level = draw()
    assert adjusted_mutual_info_score(level, communities(graph, by_module)) == 1
    judged = judge_communities(graph, by_module, n_null=4, n_seeds=2)
    assert judged["communities"] == 10 and judged["agreement"] == 1
    assert nest_communities(graph, by_module, (1.0, 2.0)).nodes["community"].nunique() == 10
