"""Questions of a graph: parents, children, paths and cards, against brute force and by hand."""

import re

import networkx as nx
import numpy as np
import pandas as pd
import pytest
import torch

from circuitgraph.build.build import build_graph
from circuitgraph.build.prompt import Prompt
from circuitgraph.cut import cut_model
from circuitgraph.data.task import Task
from circuitgraph.dictionary.protocol import Gate, LinearDictionary
from circuitgraph.graph.ask import port_shares
from circuitgraph.graph.figures import joins_features, rank_edges, rank_shown
from circuitgraph.graph.graph import Graph
from circuitgraph.graph.influence import add_influence, measure_influence, share_edges
from circuitgraph.graph.viewer import write_report
from circuitgraph.model.loading import tiny_model
from circuitgraph.options import Pruning, Run
from oracles import random_tokens

QUIET = Run(progress=False)
pytestmark = pytest.mark.filterwarnings("ignore", "error:::circuitgraph")


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def heads(model):
    return build_graph(model, random_tokens(model, 3, 8), "head", run=QUIET)


@pytest.fixture(scope="module")
def prompt(model):
    options = {"pruning": Pruning(None), "run": QUIET}
    return build_graph(model, Prompt(random_tokens(model, 1, 4)), cut_model(model, {}, "layer"), **options)


def features(model):
    """A graph of features in which they have labels and communities."""
    draw = torch.Generator().manual_seed(0)
    W_enc, W_dec = (torch.randn(*shape, generator=draw, dtype=model.dtype) for shape in ((16, 6), (6, 16)))
    zeros = torch.zeros(6, dtype=model.dtype), torch.zeros(16, dtype=model.dtype)
    dictionaries = {
        name: LinearDictionary(name, "output", W_enc, W_dec, *zeros, Gate("relu")) for name in ("m0", "m1")
    }
    graph = build_graph(model, random_tokens(model, 3, 8), dictionaries, run=QUIET)
    is_feature = graph.nodes["kind"] == "feature"
    label = np.where(is_feature, "fires <b>here</b>", "")
    return Graph(
        graph.nodes.assign(label=label, community=is_feature.astype(int) - 1), graph.edges, graph.meta
    )


def test_parents_are_the_edges_into_a_port_and_their_shares_sum_to_one(heads):
    table = heads.parents("a1.h2", port="k")
    rows = heads.edges.query("target == 'a1.h2' and port == 'k'")
    assert set(table["source"]) == set(rows["source"]) and len(table) == len(rows)
    assert set(heads.edges.columns) | {"share"} == set(table.columns)
    weight = rows.set_index("source")["weight"].abs()
    expected = (weight / weight.sum())[table["source"]]
    assert np.allclose(table["share"], expected) and table["share"].is_monotonic_decreasing
    every = heads.parents("a1.h2")
    assert np.allclose(every.groupby("port", observed=True)["share"].sum(), 1) and len(every) > len(table)


def test_children_have_their_share_of_each_reader(heads):
    table = heads.children("m0", port="mlp")
    assert table["share"].is_monotonic_decreasing and set(table["port"]) == {"mlp"}
    for row in table.itertuples():
        mine = heads.parents(row.target, "mlp").set_index("source")["share"]
        assert row.share == mine["m0"]


def test_shares_follow_the_weight_that_is_asked_for(heads):
    shares = heads.parents("m1", by="abs_weight").set_index("source")["share"]
    weight = heads.edges.query("target == 'm1'").set_index("source")["abs_weight"]
    assert np.allclose(shares, (weight / weight.sum())[shares.index])
    with pytest.raises(ValueError, match="by must be one of"):
        heads.parents("m1", by="count")


def list_all_paths(graph, share, first, last):
    """Products of all paths between two nodes, by walking along each."""
    convert = nx.MultiDiGraph()
    edges = zip(graph.edges["source"], graph.edges["target"], range(len(graph)), strict=True)
    convert.add_edges_from(edges)
    found = nx.all_simple_edge_paths(convert, first, last)
    return {tuple(edge for *_, edge in path): np.prod([share[edge] for *_, edge in path]) for path in found}


@pytest.mark.parametrize("kind", ["heads", "prompt"])
def test_the_strongest_paths_are_those_of_brute_force(request, kind):
    graph = request.getfixturevalue(kind)
    if kind == "heads":
        graph = graph.subgraph(modules=["embed", "a0.h1", "a0.h2", "m0", "a1.h0", "m1", "logits"])
    first, last = ("embed", "logits") if kind == "heads" else ("embed@1", "m1@2")
    share = share_edges(graph)
    every = list_all_paths(graph, share, first, last)
    positive = sorted((product for product in every.values() if product > 0), reverse=True)
    table = graph.paths(first, last, n=30)
    assert len(table) == min(30, len(positive)) and len(positive) > 10
    assert np.allclose(table["product"], positive[:30], rtol=1e-12)
    for row in table.itertuples():
        assert np.isclose(every[tuple(row.edges)], row.product)
    whole = graph.paths(first, last, n=len(every) + 5)
    assert len(whole) == len(positive) and not whole["path"].duplicated().any()


def test_products_of_all_paths_sum_to_influence(heads, prompt):
    graph = heads.subgraph(modules=["embed", "a0.h1", "m0", "a1.h0", "m1", "logits"])
    every = graph.paths("embed", "logits", n=3_000)["product"]
    assert len(every) < 3_000 and np.isclose(every.sum(), measure_influence(graph).nodes[0])
    outputs = prompt.nodes[prompt.nodes["kind"] == "logits"]
    sums = [prompt.paths("m0@2", name, n=3_000)["product"].sum() for name in outputs["name"]]
    influence = add_influence(prompt).nodes.set_index("name")["influence"]
    assert np.isclose(sums @ outputs["probability"], influence["m0@2"])


def test_a_path_is_written_with_the_ports_of_attention(heads):
    table = heads.paths("embed", "logits", n=40)
    for row in table.itertuples():
        edges = heads.edges.iloc[row.edges]
        steps = [
            f"{end}<{port}>" if port in ("q", "k", "v") else str(end)
            for end, port in zip(edges["target"], edges["port"], strict=True)
        ]
        assert row.path == "->".join(["embed", *steps])
    assert table["path"].str.contains("<v>").any()


def test_paths_end_in_error_nodes_and_where_there_is_no_weight(model):
    graph = features(model)
    assert len(graph.paths("embed", "m1/err")) == 0
    cut = graph.keep(graph.edges["target"] != "logits")
    assert len(cut.paths("embed", "logits")) == 0


def test_unknown_names_are_refused_with_the_closest(heads, prompt):
    for ask in (heads.parents, heads.children, heads.node, lambda name: heads.paths(name, "logits")):
        with pytest.raises(ValueError, match=r"got 'a1.h22'; the closest are a1.h2"):
            ask("a1.h22")
    with pytest.raises(ValueError, match="got 'zebra'$"):
        heads.node("zebra")
    with pytest.raises(ValueError, match="the closest are m1@"):
        prompt.node("m1")
    with pytest.raises(ValueError, match=r"port must be one of mlp \(of the edges into m1\), got 'k'"):
        heads.parents("m1", port="k")
    with pytest.raises(ValueError, match="n must be at least 1"):
        heads.paths("embed", "logits", n=0)
    with pytest.raises(ValueError, match="target must come after the source"):
        heads.paths("logits", "embed")


def test_a_node_without_edges_has_none(heads):
    assert len(heads.parents("embed")) == len(heads.children("logits")) == 0
    assert len(heads.parents("embed", port="q")) == 0


def test_a_card_tells_what_is_known(model):
    graph = features(model)
    card = graph.node("m1/3")
    influence = measure_influence(graph).nodes[graph.nodes["name"].tolist().index("m1/3")]
    assert card.facts["influence"] == f"{influence:.4g}" and card.facts["community"] == "0"
    assert card.facts["label"] == "fires <b>here</b>" and card.facts["kind"] == "feature"
    pd.testing.assert_frame_equal(card.parents, graph.parents("m1/3").head(5))
    assert "&lt;b&gt;here" in card._repr_html_() and "<b>here" not in card._repr_html_()
    first = graph.parents("m1/3").iloc[0]
    assert f"reads by mlp: {first['source']} {first['share']:.1%}" in repr(card)
    assert "community" not in graph.node("embed").facts and "label" not in graph.node("embed").facts


def test_a_card_lists_five_of_each_port(heads):
    card = heads.node("a1.h2")
    assert card.parents.groupby("port", observed=True).size().to_dict() == {"q": 5, "k": 5, "v": 5}
    known = add_influence(heads)
    marked = Graph(known.nodes.assign(influence=0.125), known.edges, known.meta)
    assert marked.node("a1.h2").facts["influence"] == "0.125"  # the column of the graph counts


def test_a_card_of_a_prompt_has_its_position(prompt):
    facts = prompt.node("m1@2").facts
    assert facts["position"] == "2" and int(facts["token"]) >= 0


def test_a_subgraph_takes_single_heads(heads):
    small = heads.subgraph(modules=["a0.h1", "a1", "embed"])
    assert small.nodes["name"].tolist() == ["embed", "a0.h1", "a1.h0", "a1.h1", "a1.h2", "a1.h3"]
    with pytest.raises(ValueError, match="modules must be among those of the graph"):
        heads.subgraph(modules=["a0.h9"])
    assert np.allclose(port_shares(small)[:1], 1)


# The order of edges


def long_features(model):
    """A graph of features over a text that is long enough for some of them to be active rarely."""
    draw = torch.Generator().manual_seed(3)

    def linear(name):
        W_enc, W_dec = (
            torch.randn(*shape, generator=draw, dtype=model.dtype) for shape in ((16, 60), (60, 16))
        )
        b_enc = -torch.linspace(0, 16, 60, dtype=model.dtype)  # the last are hardly ever active
        return LinearDictionary(
            name, "output", W_enc, W_dec, b_enc, torch.zeros(16, dtype=model.dtype), Gate("relu")
        )

    dictionaries = {name: linear(name) for name in ("m0", "m1")}
    return build_graph(model, random_tokens(model, 12, 16), dictionaries, run=QUIET)


@pytest.fixture(scope="module")
def rare(model):
    return long_features(model)


def test_a_share_of_a_feature_that_is_hardly_ever_active_takes_no_first_place(rare):
    n_active = rare.nodes.set_index("name")["frequency"] * 12 * 15
    is_feature = rare.nodes.set_index("name")["kind"] == "feature"
    every = rank_edges(rare, least_count=0)
    rare_readers = is_feature[every["target"]].to_numpy() & (n_active[every["target"]] < 10).to_numpy()
    assert len(every) == len(rare) and rare_readers[:100].any()  # else nothing would be mended
    ranked = rank_edges(rare)
    target = ranked["target"]
    assert len(ranked) > 100 and (n_active[target[is_feature[target].to_numpy()]] >= 10).all()
    assert (ranked["count"] >= 10).all() and ranked["size"].is_monotonic_decreasing
    kept = every[every["count"] >= 10]
    pd.testing.assert_frame_equal(ranked, kept)


def test_figures_and_tables_show_edges_between_features_by_their_own_order(rare):
    shown = rank_shown(rare)
    assert joins_features(rare, shown).all() and 20 < len(shown) < len(rank_edges(rare))
    name = shown["target"].iloc[0]
    of_node = rank_shown(rare, node=name)
    assert not joins_features(rare, of_node).all()
    assert len(of_node) == len(rank_edges(rare, node=name))


def read_sizes(page):
    """The fourth column of the last table of a page."""
    table = page.rpartition("<table")[2]
    cells = re.findall(r"<td>(.*?)</td>", table)
    assert re.findall(r"<th>(.*?)</th>", table)[3] == "size" and len(cells) % 8 == 0
    return pd.Series(cells[3::8]).astype(float)


def test_the_page_says_by_what_it_sorts_and_what_it_leaves_out(rare, heads, tmp_path):
    page = write_report(rare, tmp_path / "features.html").read_text()
    sizes = read_sizes(page)
    assert sizes.is_monotonic_decreasing and np.allclose(sizes, rank_shown(rare)["size"][:50], rtol=1e-3)
    few = len(rare) - len(rank_edges(rare))
    others = (~joins_features(rare, rank_edges(rare))).sum()
    assert f"{few:,} edges are left out whose ends are active together at too few positions" in page
    assert f"So are {others:,} edges from or into whole modules" in page and "By size" in page
    page = write_report(heads, tmp_path / "heads.html").read_text()
    assert "left out" not in page and read_sizes(page).is_monotonic_decreasing


def test_prompts_are_ranked_without_the_first_position(prompt):
    ranked = rank_edges(prompt, by="influence")
    ends = pd.concat([ranked["source"], ranked["target"]]).astype(str)
    assert len(ranked) and not ends.str.endswith("@0").any()
    every = rank_edges(prompt, by="influence", skip_first=0)
    assert len(every) == len(prompt)
    assert np.allclose(every["size"], np.sort(measure_influence(prompt).edges)[::-1])


def test_effects_on_a_metric_are_compared_as_they_are(model):
    tokens = random_tokens(model, 3, 6)
    answers = {"answers": torch.tensor([[3], [4], [5]]), "wrong": torch.tensor([[6], [7], [8]])}
    task = Task(tokens, random_tokens(model, 3, 6, seed=7), **answers)
    graph = build_graph(model, task, "head", attribution="eap", target="metric", run=QUIET)
    assert np.array_equal(rank_edges(graph)["size"], np.sort(graph.edges["weight"].abs())[::-1])


def test_bad_rankings_are_refused(heads):
    for options, words in (
        ({"n": -1}, "n must be at least 0"),
        ({"least_count": -1}, "least_count must be at least 0"),
        ({"skip_first": -2}, "skip_first must be at least 0"),
        ({"by": "height"}, "by must be one of"),
        ({"node": "a1.h22"}, "the closest are a1.h2"),
    ):
        with pytest.raises(ValueError, match=words):
            rank_edges(heads, **options)
