"""Influence against sums over all paths, and selection rules against slow searches, on small graphs."""

from dataclasses import dataclass
from typing import ClassVar

import networkx as nx
import numpy as np
import pandas as pd
import pytest

from circuitgraph.graph.graph import Graph
from circuitgraph.graph.influence import PORT_PARTS, add_influence, measure_influence
from circuitgraph.graph.select import RULES, Coverage, Greedy, Influence, NodeProduct
from circuitgraph.graph.select import SelectionRule, Top, find_rule, register_rule, select_edges
from test_prompt import by_hand

SEEDS = range(8)


def draw_graph(names, kinds, edges, meta=None):
    """A graph of edges given as (source, target, port, weight)."""
    nodes = pd.DataFrame({"name": names, "module": names, "kind": kinds, "layer": -1, "index": -1})
    table = pd.DataFrame(edges, columns=["source", "target", "port", "weight"])
    size = table["weight"].abs()
    table = table.assign(abs_weight=size, rms_weight=size + 1.0, count=1)
    nodes = nodes.assign(frequency=1.0, mean_activation=0.0)
    return Graph(nodes, table, {"nodes": "head"} | (meta or {}))


def random_graph(seed, n_inner=6, share=0.7, error=False):
    """Heads with three ports and MLPs with one, each with an edge from `embed`; weights are integers."""
    rng = np.random.default_rng(seed)
    inner = [f"{'am'[int(kind)]}{i}" for i, kind in enumerate(rng.integers(0, 2, n_inner))]
    names = ["embed", "const", *inner, "logits"]
    kinds = {"e": "embed", "c": "const", "a": "head", "m": "mlp", "l": "logits"}
    kinds = [kinds[name[0]] for name in names]
    if error:
        kinds[4] = "error"
    edges = []
    for j, reader in enumerate(names[2:], 2):
        ports = {"a": ("q", "k", "v"), "m": ("mlp",), "l": ("logits",)}[reader[0]]
        for port in ports:
            for i, writer in enumerate(names[:j]):
                if i == 0 or rng.random() < share:
                    edges.append((writer, reader, port, float(rng.choice([-4, -3, -2, -1, 1, 2, 3, 4, 9]))))
    return draw_graph(names, kinds, edges)


def shares_by_hand(graph):
    """Share times part of each edge, one edge after the other."""
    edges, kind = graph.edges, graph.nodes.set_index("name")["kind"]
    into = {}
    for row in edges.itertuples():
        into.setdefault(row.target, {}).setdefault(row.port, []).append(abs(row.weight))
    shares = []
    for row in edges.itertuples():
        ports = {port: sum(sizes) for port, sizes in into[row.target].items() if sum(sizes)}
        parts = {port: PORT_PARTS.get(port, 1.0) for port in ports}
        is_leaf = kind[row.target] == "error" or row.port not in ports
        part = 0 if is_leaf else parts[row.port] / sum(parts.values())
        shares.append(part * abs(row.weight) / ports.get(row.port, 1))
    return shares


def sum_over_paths(graph):
    """Influence of each node and edge as sums over all paths to `logits`."""
    walks = nx.MultiDiGraph()
    walks.add_nodes_from(graph.nodes["name"])
    for row, share in zip(graph.edges.itertuples(), shares_by_hand(graph), strict=True):
        walks.add_edge(row.source, row.target, key=row.port, share=share)

    def passes(start):
        paths = nx.all_simple_edge_paths(walks, start, "logits")
        return sum(np.prod([walks.edges[step]["share"] for step in path]) for path in paths)

    nodes = {name: 1.0 if name == "logits" else passes(name) for name in walks}
    edges = [walks.edges[s, t, p]["share"] * nodes[t] for s, t, p in graph.edges[KEY].itertuples(index=False)]
    return np.array(list(nodes.values())), np.array(edges)


KEY = ["source", "target", "port"]


# Influence


def test_influence_by_hand():
    """A head without keys, a head whose keys weigh nothing, an error; five nodes and an embedding."""
    edges = [
        ("embed", "a0.h0", "q", 2.0),
        ("embed", "a0.h0", "v", 1.0),
        ("const", "a0.h0", "v", -3.0),
        ("embed", "a1.h0", "k", 0.0),
        ("a0.h0", "a1.h0", "v", 5.0),
        ("embed", "m0/err", "mlp", 7.0),
        ("a0.h0", "logits", "logits", -1.0),
        ("a1.h0", "logits", "logits", 2.0),
        ("m0/err", "logits", "logits", 1.0),
    ]
    names = ["embed", "const", "a0.h0", "a1.h0", "m0/err", "logits"]
    graph = add_influence(draw_graph(names, ["embed", "const", "head", "head", "error", "logits"], edges))
    early, late, error = 1 / 4 + 1 / 2, 1 / 2, 1 / 4
    const = early * 2 / 3 * 3 / 4
    assert np.allclose(graph.nodes["influence"], [early - const, const, early, late, error, 1])
    of_edges = [early / 3, early * 2 / 3 / 4, const, 0, late, 0, 1 / 4, late, error]
    assert np.allclose(graph.edges["influence"], of_edges)
    assert np.isclose(graph.nodes["influence"][[0, 1, 4]].sum(), 1)
    assert np.allclose(graph.nodes["cumulative_influence"].min(), 1 / graph.nodes["influence"].sum())
    by_rms = add_influence(graph, by="rms_weight").edges["influence"]
    assert np.isclose(by_rms.iloc[7], 3 / 7) and by_rms.iloc[3] > 0


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("error", [False, True])
def test_influence_is_the_sum_over_all_paths(seed, error):
    graph = random_graph(seed, error=error)
    nodes, edges = sum_over_paths(graph)
    measured = measure_influence(graph)
    assert np.allclose(measured.nodes, nodes, atol=1e-12) and np.allclose(measured.edges, edges, atol=1e-12)
    order = np.random.default_rng(seed).permutation(len(graph))  # edges in any order
    shuffled = Graph(graph.nodes, graph.edges.iloc[order], graph.meta)
    assert np.allclose(measure_influence(shuffled).edges, edges[order], atol=1e-12)
    leaves = graph.nodes["kind"].isin(["embed", "const", "error"]).to_numpy()
    assert np.isclose(measured.nodes[leaves].sum(), 1)


def test_what_nothing_reads_has_no_influence():
    edges = [("embed", "m0", "mlp", 1.0), ("embed", "m1", "mlp", 9.0), ("m0", "m1", "mlp", 9.0)]
    graph = draw_graph(
        ["embed", "m0", "m1", "logits"],
        ["embed", "mlp", "mlp", "logits"],
        [*edges, ("m0", "logits", "logits", 1.0)],
    )
    graph = add_influence(graph)
    assert graph.nodes["influence"].tolist() == [1, 1, 0, 1]
    assert graph.edges["influence"].tolist() == [1, 0, 0, 1]


def of_a_prompt(graph, probability):
    """The same graph as one that keeps positions."""
    nodes = graph.nodes.assign(probability=np.where(graph.nodes["kind"] == "logits", probability, np.nan))
    return Graph(nodes, graph.edges, graph.meta | {"positions": "keep"})


@pytest.mark.parametrize("seed", SEEDS)
def test_a_prompt_with_merged_ports_has_the_influence_of_any_graph(seed):
    graph = random_graph(seed, error=True)
    merged = graph.keep(~graph.edges["port"].isin(["q", "k"]).to_numpy())
    plain, prompt = measure_influence(merged), measure_influence(of_a_prompt(merged, 0.25))
    assert np.allclose(prompt.nodes[:-1], 0.25 * plain.nodes[:-1]) and prompt.nodes[-1] == 0
    assert np.allclose(prompt.edges, 0.25 * plain.edges) and np.allclose(prompt.reached, 0.25 * plain.reached)


def test_ports_of_a_prompt_are_summed_with_their_signs():
    edges = [
        ("embed", "a0.h0", "q", 3.0),
        ("embed", "a0.h0", "k", -1.0),
        ("const", "a0.h0", "v", 6.0),
        ("a0.h0", "logits", "logits", 5.0),
    ]
    graph = draw_graph(["embed", "const", "a0.h0", "logits"], ["embed", "const", "head", "logits"], edges)
    graph = add_influence(of_a_prompt(graph, 0.5))
    assert np.allclose(graph.nodes["influence"], [0.5 * 2 / 8, 0.5 * 6 / 8, 0.5, 0])
    assert np.allclose(graph.edges["influence"], [0.125 * 3 / 4, 0.125 / 4, 0.375, 0.5])
    hand = add_influence(by_hand())
    out_of = hand.edges.groupby("source", observed=False)["influence"].sum()
    assert np.allclose(out_of, hand.nodes["influence"])


def test_columns_go_with_the_graph_and_not_into_a_merge(tmp_path):
    graph = add_influence(random_graph(1))
    graph.save(tmp_path / "graph")
    loaded = Graph.load(tmp_path / "graph")
    assert loaded == graph and loaded.meta["history"] == ["add_influence(by='weight')"]
    mask = np.arange(len(graph)) % 2 == 0
    kept = graph.keep(mask)
    assert kept.edges["influence"].tolist() == graph.edges["influence"][mask].tolist()
    walks, converted = graph.to_networkx(), graph.to_igraph()
    shown = [walks.edges[edge]["influence"] for edge in graph.edges[KEY].itertuples(index=False)]
    assert shown == converted.es["influence"] == graph.edges["influence"].tolist()
    assert converted.vs["influence"] == graph.nodes["influence"].tolist()
    other = Graph(graph.nodes, graph.edges, graph.meta | {"corpus": [{"n_sequences": 1, "seq_len": 3}]})
    bare = Graph(other.nodes, other.edges.drop(columns="influence"), other.meta)
    text = graph.meta | {"corpus": [{"n_sequences": 2, "seq_len": 3}]}
    graph = Graph(graph.nodes, graph.edges, text)
    for merged in (kept.merge(loaded.keep(~mask)), graph.merge(other), graph.merge(bare), bare.merge(graph)):
        assert not {"influence", "cumulative_influence"} & {*merged.nodes, *merged.edges}
    sparse = [Graph(g.nodes, g.edges, g.meta | {"nodes": "feature", "skip_first": 0}) for g in (graph, bare)]
    assert "influence" not in sparse[0].merge(sparse[1]).edges


def test_influence_needs_logits_and_a_weight():
    graph = random_graph(0)
    with pytest.raises(ValueError, match="by must be one of weight, abs_weight, rms_weight, got 'count'"):
        add_influence(graph, by="count")
    with pytest.raises(ValueError, match="one node of the kind logits"):
        add_influence(graph.subgraph(modules=["embed", "const"]))


# Selection rules, slowly


def positions(graph, names):
    return [list(graph.nodes["name"]).index(name) for name in names]


def largest(scores, n):
    """The first edges in the order of their scores; of equal ones those that stand first."""
    return sorted(range(len(scores)), key=lambda edge: (-scores[edge], edge))[:n]


def greedily(graph, scores, n):
    target, source = graph.edges["target"].astype(str), graph.edges["source"].astype(str)
    taken, leads = [], {"logits"}
    while len(taken) < n:
        able = [edge for edge in range(len(graph)) if target[edge] in leads and edge not in taken]
        if not able:
            break
        taken.append(largest([scores[edge] if edge in able else -np.inf for edge in range(len(graph))], 1)[0])
        leads.add(source[taken[-1]])
    return taken


def covered(graph, chosen, share):
    """The fewest edges between chosen nodes that hold the share, port by port."""
    rows = list(graph.edges.assign(size=graph.edges["weight"].abs()).itertuples())
    kept = []
    for reader in chosen:
        for port in {row.port for row in rows if row.target == reader}:
            into = [row for row in rows if row.target == reader and row.port == port]
            able = sorted(
                (row for row in into if row.source in chosen), key=lambda row: (-row.size, row.Index)
            )
            goal = min(share * sum(row.size for row in into), sum(row.size for row in able))
            held = 0
            for row in able:
                if held >= goal:
                    break
                held += row.size
                kept.append(row.Index)
    return kept


def list_orders(graph):
    """Chosen nodes for each number of nodes, those of largest influence first."""
    names, ends = list(graph.nodes["name"]), ["embed", "const", "logits"]
    ranked = [names[i] for i in largest(measure_influence(graph).nodes, len(names))]
    inner = [name for name in ranked if name not in ends]
    return [{*ends, *inner[:m]} for m in range(len(inner) + 1)]


def cover(graph, share):
    """For each budget the largest number of nodes that fits, and the rest by influence."""
    every = [(covered(graph, chosen, share), chosen) for chosen in list_orders(graph)]
    influence = measure_influence(graph).edges
    ends = list(graph.edges[["source", "target"]].astype(str).itertuples(index=False))
    choices = []
    for n in range(len(graph) + 1):
        fitting = [(kept, among) for kept, among in every if len(kept) <= n]
        kept, among = fitting[-1] if fitting else ([], set())
        inside = [{*ends[edge]} <= among and influence[edge] > 0 for edge in range(len(graph))]
        rest = sorted(set(range(len(graph))) - {*kept}, key=lambda e: (not inside[e], -influence[e], e))  # noqa: B023
        choices.append({*kept, *rest[: n - len(kept)]})
    return choices


def chosen_by(rule, graph, n):
    mask = rule.choose(graph, n)
    assert mask.dtype == bool and mask.sum() <= n
    return set(np.flatnonzero(mask).tolist())


@pytest.mark.parametrize("seed", SEEDS)
def test_rules_choose_what_a_slow_search_chooses(seed):
    graph = random_graph(seed, error=seed % 2 == 1)
    weight = graph.edges["weight"].to_numpy()
    measured = measure_influence(graph)
    source, target = (positions(graph, graph.edges[end]) for end in ("source", "target"))
    product = [measured.nodes[i] * measured.nodes[j] for i, j in zip(source, target, strict=True)]
    by_product = sorted(range(len(graph)), key=lambda e: (-(product[e] ** 0.5), -measured.edges[e], e))
    for n in range(0, len(graph) + 1, 3):
        assert chosen_by(Top(), graph, n) == set(largest(np.abs(weight), n))
        assert chosen_by(Top(signed=True), graph, n) == set(largest(weight, n))
        assert chosen_by(Greedy(), graph, n) == set(greedily(graph, np.abs(weight), n))
        assert chosen_by(Greedy(signed=True), graph, n) == set(greedily(graph, weight, n))
        assert chosen_by(Influence(), graph, n) == set(largest(measured.edges, n))
        assert chosen_by(NodeProduct(), graph, n) == set(by_product[:n])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("share", [0.5, 0.75, 1.0])
def test_coverage_is_the_largest_number_of_nodes_that_fits(seed, share):
    graph = random_graph(seed, n_inner=7, error=seed % 2 == 1)
    for n, wanted in enumerate(cover(graph, share)):
        assert chosen_by(Coverage(share=share), graph, n) == wanted


def test_more_nodes_can_need_fewer_edges():
    """One large writer of small influence makes three small ones superfluous; bisection could miss it."""
    edges = [(f"m{i}", "m4", "mlp", 2.0) for i in range(3)]
    edges += [("embed", f"m{i}", "mlp", 1.0) for i in range(3)] + [("embed", "m3", "mlp", 1.0)]
    edges += [("m3", "m4", "mlp", 30.0), ("m4", "logits", "logits", 1.0)]
    edges += [(f"m{i}", "logits", "logits", 5.0) for i in range(3)]
    names = ["embed", "m0", "m1", "m2", "m3", "m4", "logits"]
    graph = draw_graph(names, ["embed", *["mlp"] * 5, "logits"], edges)
    counts = [len(covered(graph, chosen, 0.75)) for chosen in list_orders(graph)]
    assert counts == [0, 2, 4, 6, 9, 8]
    chosen = select_edges(graph, 8, Coverage(share=0.75), prune=False)
    assert {"embed->m3", "m3->m4"} <= set(chosen.edge_names) and "m0->m4" not in chosen.edge_names


def test_largest_weight_and_largest_influence_differ():
    """m0 and m1 read the embedding; m0 by larger weights, but nearly all of the output comes from m1."""
    edges = [
        ("embed", "m0", "mlp", 60.0),
        ("const", "m0", "mlp", 40.0),
        ("embed", "m1", "mlp", 3.0),
        ("const", "m1", "mlp", 1.0),
        ("m0", "logits", "logits", 0.1),
        ("m1", "logits", "logits", 0.9),
    ]
    names = ["embed", "const", "m0", "m1", "logits"]
    graph = draw_graph(names, ["embed", "const", "mlp", "mlp", "logits"], edges)
    assert np.allclose(measure_influence(graph).edges, [0.06, 0.04, 0.675, 0.225, 0.1, 0.9])
    names = graph.edge_names
    assert select_edges(graph, 2, "top", prune=False).edge_names == names[:2]
    assert select_edges(graph, 2, "influence").edge_names == [names[2], names[5]]
    # with three edges, influence and coverage give m1 all of its input; with five, coverage lacks one for m0
    assert select_edges(graph, 3, "coverage").edge_names == [names[2], names[3], names[5]]
    five = select_edges(graph, 5, "coverage", prune=False).edge_names
    assert five == [names[0], *names[2:]]
    assert select_edges(graph, 6, "coverage").edge_names == names


def test_coverage_keeps_whole_readers_where_influence_keeps_parts():
    edges = [("embed", "m0", "mlp", 1.0)]
    edges += [(writer, reader, "mlp", 1.0) for reader in ("m1", "m2") for writer in ("embed", "m0")]
    edges += [("m1", "logits", "logits", 5.0), ("m2", "logits", "logits", 4.0)]
    names = ["embed", "m0", "m1", "m2", "logits"]
    graph = draw_graph(names, ["embed", "mlp", "mlp", "mlp", "logits"], edges)
    by_coverage = {*select_edges(graph, 5, Coverage(share=1.0), prune=False).edge_names}
    assert {"embed->m0", "embed->m1", "m0->m1", "m1->logits"} < by_coverage
    by_influence = {*select_edges(graph, 4, "influence", prune=False).edge_names}
    assert by_influence == {"m1->logits", "m2->logits", "embed->m0", "embed->m1"}


# Names, options, refusals


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("by", ["weight", "abs_weight", "rms_weight"])
def test_every_rule_keeps_to_its_budget(name, by):
    graph = random_graph(3)
    for n in (0, 1, 5, len(graph) // 2, len(graph)):
        chosen = select_edges(graph, n, name, by=by, prune=False)
        pruned = select_edges(graph, n, name, by=by)
        assert len(chosen) == n or (name == "greedy" and len(chosen) < n)
        assert set(pruned.edge_names) <= set(chosen.edge_names)
        assert chosen.meta["history"] == [f"select_edges({n}, {find_rule(name, by).fit(graph)})"]
    if name != "greedy":
        assert select_edges(graph, len(graph), name, prune=False).edge_names == graph.edge_names


def test_rules_have_names_that_find_them():
    assert set(RULES) == {"top", "greedy", "influence", "node product", "coverage", "default"}
    every = [Top(signed=True), Coverage(share=0.5), Coverage(share=0.9, by="rms_weight"), NodeProduct()]
    for rule in [*RULES.values(), *every]:
        assert find_rule(rule.name) == rule == find_rule(rule)
    assert Coverage(share=0.9, by="rms_weight").name == "coverage(by='rms_weight', share=0.9)"
    assert find_rule("top", by="abs_weight") == Top(by="abs_weight")
    assert find_rule(Top(signed=True), by="abs_weight") == Top(by="abs_weight", signed=True)
    assert find_rule() == RULES["default"]


TEXT = {"n_sequences": 1, "seq_len": 4}


@pytest.mark.parametrize(
    ("meta", "rule"),
    [
        ({"target": "node", "nodes": "head", "corpus": [TEXT]}, Coverage()),
        ({"target": "node", "nodes": "feature", "corpus": [TEXT]}, Influence()),
        ({"target": "node", "nodes": "head", "corpus": []}, Top()),
        ({"target": "logit_diff", "nodes": "head", "corpus": [TEXT]}, Top()),
    ],
)
def test_the_default_rule_follows_what_weights_explain(meta, rule):
    graph = random_graph(0)
    told = Graph(graph.nodes, graph.edges, graph.meta | meta)
    assert find_rule().fit(told) == rule
    by_default, by_rule = (select_edges(told, 7, one, prune=False) for one in ("default", rule))
    assert by_default.edge_names == by_rule.edge_names
    assert by_default.meta["history"] == [f"select_edges(7, {rule})"]


def test_what_is_no_rule_is_refused():
    graph = random_graph(0)
    refused = {
        "best": "method must be one of 'top', 'greedy', 'influence', 'node product', 'coverage'",
        "best(by='weight')": "method must be one of",
        "coverage(size=2)": "options of the rule 'coverage' must be among by, share",
        "coverage(0.9)": "options of the rule 'coverage' must be among",
        "coverage(share=0.9": "options of the rule 'coverage' must be among",
        "coverage(share=len)": "options of the rule 'coverage' must be among",
        "coverage(share=0)": "share must lie in",
        "top(by='count')": "by must be one of weight",
    }
    for name, message in refused.items():
        with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
            select_edges(graph, 3, name)
    with pytest.raises(ValueError, match="method must be a string or a SelectionRule, got 7"):
        select_edges(graph, 3, 7)
    with pytest.raises(ValueError, match="share must lie in"):
        Coverage(share=1.5)


def test_greedy_starts_at_every_output():
    edges = [("embed", "m0", "mlp", 9.0), ("embed", "m1", "mlp", 1.0)]
    edges += [("m0", "first", "logits", 3.0), ("m1", "second", "logits", 5.0)]
    names = ["embed", "m0", "m1", "first", "second"]
    graph = draw_graph(names, ["embed", "mlp", "mlp", "logits", "logits"], edges)
    taken = [set(select_edges(graph, n, "greedy", prune=False).edge_names) for n in (1, 2, 3)]
    assert taken[0] == {"m1->second"}
    assert taken[1] == taken[0] | {"m0->first"}
    assert taken[2] == taken[1] | {"embed->m0"}


@dataclass(frozen=True, kw_only=True)
class Latest(SelectionRule):
    """Edges into the last readers."""

    kind: ClassVar[str] = "latest"

    def score(self, graph):
        return graph.edges["target"].cat.codes.to_numpy()


@dataclass(frozen=True, kw_only=True)
class TooMany(SelectionRule):
    kind: ClassVar[str] = "too many"

    def choose(self, graph, n):  # noqa: ARG002
        return np.ones(len(graph), dtype=bool)


def test_a_rule_from_outside(monkeypatch):
    monkeypatch.setattr("circuitgraph.graph.select.RULES", dict(RULES))
    register_rule(Latest())
    graph = random_graph(2)
    chosen = select_edges(graph, 2, "latest", prune=False)
    assert set(chosen.edges["target"]) == {"logits"} and len(chosen) == 2
    with pytest.raises(ValueError, match="the name 'latest' is taken by Latest"):
        register_rule(type("Other", (Latest,), {})())
    with pytest.raises(ValueError, match="'too many' must choose at most 2 edges by a boolean mask, got"):
        select_edges(graph, 2, TooMany())
    with pytest.raises(NotImplementedError, match="has neither a score nor a way to choose"):
        select_edges(graph, 2, type("Bare", (SelectionRule,), {"kind": "bare"})())
