"""Communities against planted ones, against chance, and the search against the definition of what it climbs."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import adjusted_mutual_info_score

from circuitgraph.community import find_communities, judge_communities, levels_of, quality, rewire, share_weights
from circuitgraph.graph import Graph


def make_graph(source, target, weights, level):
    names = [f"m{r}/{i}" for i, r in enumerate(level)]
    nodes = pd.DataFrame({"name": names, "module": [f"m{r}" for r in level], "kind": "feature", "layer": level, "index": np.arange(len(level)), "frequency": 1.0, "mean_activation": 1.0})
    edges = pd.DataFrame({"source": pd.Categorical.from_codes(source, names), "target": pd.Categorical.from_codes(target, names), "port": "mlp", "weight": weights, "abs_weight": np.abs(weights), "rms_weight": np.abs(weights), "count": 1})
    return Graph(nodes, edges, {"nodes": "feature"})


def draw(n_levels=10, width=30, n_planted=6, n_edges=5_000, within=0.85, near=0.35, seed=0):
    generator, n = np.random.default_rng(seed), n_levels * width
    planted, level = generator.integers(n_planted, size=n), np.repeat(np.arange(n_levels), width)
    source, target = generator.integers(n, size=(2, 40 * n_edges))
    fits = (level[source] < level[target]) & ((planted[source] == planted[target]) | (generator.random(len(source)) > within)) & (generator.random(len(source)) < near ** (level[target] - level[source] - 1.0))
    pairs = np.unique(np.stack([source[fits], target[fits]])[:, :n_edges], axis=1)
    return make_graph(*pairs, generator.uniform(0.5, 1.5, pairs.shape[1]), level), planted, level


def communities(graph, *args, **options): return find_communities(graph, *args, weight="abs_weight", **options).nodes["community"].to_numpy()


def test_the_layered_null_finds_what_is_planted_and_the_usual_one_levels():
    graph, planted, level = draw(12, 40, 6, 8_000, within=0.8)
    layered, usual = communities(graph, "layered"), communities(graph, "leiden")
    assert adjusted_mutual_info_score(planted, layered) > 0.8 > 0.1 > adjusted_mutual_info_score(planted, usual)
    assert adjusted_mutual_info_score(level, layered) < 0.1 < 0.3 < adjusted_mutual_info_score(level, usual)


def test_noise_is_no_more_than_chance_and_what_is_planted_is():
    z = [judge_communities(draw(within=within, seed=seed)[0], weight="abs_weight", n_null=8)["z"] for within, seed in ((0.0, 1), (0.0, 2), (0.85, 1))]
    assert max(abs(z[0]), abs(z[1])) < 4 < 10 < z[2]


def test_two_parts_without_an_edge_between_them_are_apart():
    level = np.repeat(np.arange(3), 4)
    pairs = np.array([(i, j) for i in range(12) for j in range(12) if level[i] < level[j] and i % 2 == j % 2])
    graph = make_graph(*pairs.T, np.ones(len(pairs)), np.append(level, 3))
    for method in ("leiden", "layered", "infomap"):
        found = communities(graph, method)
        assert found[-1] == -1 and len(set(found[:12])) == 2 and all(len(set(found[k:12:2])) == 1 for k in (0, 1)), method


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
            if member[i] != member[j] or member[i] < 0: continue
            if null == "configuration": expected = w[i].sum() * w[:, j].sum() / w.sum()
            else:
                block, sent, got = w[np.ix_(level == level[i], level == level[j])].sum(), w[level == level[i]].sum(), w[:, level == level[j]].sum()
                expected = 0.0 if block == 0 else w[i].sum() / sent * w[:, j].sum() / got * block
            total += w[i, j] - resolution * expected
    assert np.isclose(quality(graph, null, weight="abs_weight", resolution=resolution), total / w.sum())


def test_no_single_move_improves_what_the_search_returns():
    graph, _, _ = draw(5, 8, 3, 200)
    found = find_communities(graph, "layered", weight="abs_weight")
    best, member = quality(found, weight="abs_weight"), found.nodes["community"].to_numpy()
    assert best > quality(Graph(graph.nodes.assign(community=0), graph.edges, graph.meta), weight="abs_weight")
    for i in range(len(member)):
        for c in range(member.max() + 2):
            moved = member.copy()
            moved[i] = c
            assert quality(Graph(graph.nodes.assign(community=moved), graph.edges, graph.meta), weight="abs_weight") < best + 1e-9


def test_rewiring_keeps_what_the_null_holds_fixed():
    graph, _, _ = draw()
    other, level = rewire(graph, seed=3), levels_of(graph)
    tables = [g.edges.assign(r=level[g.edges["source"].cat.codes], s=level[g.edges["target"].cat.codes]) for g in (graph, other)]
    for keys in (["r", "s"], ["source"], ["target"]):
        a, b = (table.groupby(keys, observed=True)["weight"].sum() for table in tables)
        assert np.allclose(a, b, rtol=2e-3)
    assert tables[0]["target"].value_counts().sort_index().equals(tables[1]["target"].value_counts().sort_index())
    assert len(other) == len(graph) == len(set(other.edge_names)) and len(set(graph.edge_names) & set(other.edge_names)) < len(graph) / 2
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
        (lambda: find_communities(graph, "louvain"), "method must be"), (lambda: find_communities(graph, resolution=0), "resolution must be above 0"), (lambda: find_communities(graph, resolution=float("nan")), "resolution must be above 0"),
        (lambda: find_communities(graph.keep([])), "edge whose share is not zero"), (lambda: find_communities(graph, weight="count"), "by must be"), (lambda: quality(graph), "call find_communities first"),
        (lambda: quality(find_communities(graph), "none"), "null must be"), (lambda: judge_communities(graph, n_null=1), "at least 2"),
    ]:
        with pytest.raises(ValueError, match=words): run()
    one = make_graph([0], [1], np.ones(1), [0, 1])
    assert find_communities(one).nodes["community"].tolist() == [0, 0] and find_communities(one, "layered").nodes["community"].nunique() <= 2
