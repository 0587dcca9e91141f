"""The explorer in a real browser, without a network: what stands on the screen against the graph's tables."""

import json
import re
import shutil
from dataclasses import replace
from xml.etree import ElementTree

import networkx as nx
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from playwright.sync_api import sync_playwright
from typer.testing import CliRunner

from circuitgraph.build.build import build_graph
from circuitgraph.build.prompt import Prompt
from circuitgraph.cli import app
from circuitgraph.dictionary.look import read_features
from circuitgraph.dictionary.places import visit_modules
from circuitgraph.graph.cards import list_promoted, measure_costs
from circuitgraph.graph.explorer import MOST_EDGES, choose_edges, explore
from circuitgraph.graph.figures import least_shown
from circuitgraph.graph.graph import Graph
from circuitgraph.graph.influence import add_influence
from circuitgraph.model.blocks import run_logits
from circuitgraph.model.loading import tiny_model
from circuitgraph.options import Pruning, Run
from feature_oracles import all_dictionaries
from oracles import random_tokens

QUIET = Run(progress=False)
SIZES = [(1400, 900), (800, 600)]


class Words:
    """A tokenizer that gives each token a word of its own."""

    def decode(self, ids):
        return " ".join(f"word{token}" for token in ids)


@pytest.fixture(scope="module")
def model():
    return replace(tiny_model("llama"), tokenizer=Words())


@pytest.fixture(scope="module")
def dictionaries(model):
    return all_dictionaries(model, d_dict=11, k=4)


@pytest.fixture(scope="module")
def heads(model):
    return build_graph(model, random_tokens(model), run=QUIET)


@pytest.fixture(scope="module")
def features(model, dictionaries):
    graph = build_graph(model, random_tokens(model), dictionaries, pruning=Pruning(None), run=QUIET)
    nodes = graph.nodes.assign(short_name="", label="")
    nodes.loc[nodes["kind"] == "feature", "short_name"] = "called " + nodes["name"]
    return Graph(nodes, graph.edges, graph.meta)


@pytest.fixture(scope="module")
def prompt(model, dictionaries):
    tokens = random_tokens(model, 1, 6)
    return build_graph(model, Prompt(tokens, n_logits=3), dictionaries, pruning=Pruning(None), run=QUIET)


@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert path, "this test needs Chromium: run `make browser`"
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """A function that opens a graph's page at a size; afterwards it must have said and asked nothing."""
    context = browser.new_context(accept_downloads=True)
    context.set_offline(True)
    said, asked = [], []

    def watch(page):
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))

    context.on("page", watch)

    def open_page(graph, size=SIZES[0], **options):
        path = tmp_path / "page.html"
        explore(graph, path, **options)
        page = context.new_page()
        page.set_viewport_size({"width": size[0], "height": size[1]})
        page.goto(path.as_uri())
        return page

    yield open_page
    context.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


# What the tables say, by pandas and networkx


def edge_table(graph):
    """Edges with their names, shares and influence, the largest influence first."""
    edges = add_influence(graph).edges.astype({"source": str, "target": str, "port": str})
    size = edges["weight"].abs()
    share = size / size.groupby([edges["target"], edges["port"]]).transform("sum")
    edges = edges.assign(name=graph.edge_names, share=share)
    return edges.sort_values("influence", ascending=False, kind="stable")


def most_influential(graph, n, module=""):
    """Names of features."""
    nodes = add_influence(graph).nodes
    among = (nodes["kind"] == "feature") & nodes["name"].str.startswith(module)
    return nodes[among].nlargest(n, "influence")["name"].tolist()


def best_product(edges, start, end):
    """The largest product of shares from one node to another, and its nodes: Dijkstra on -log share."""
    net = nx.DiGraph()
    largest = edges[edges["share"] > 0].groupby(["source", "target"])["share"].max()
    for (source, target), share in largest.items():
        net.add_edge(source, target, cost=-np.log(share))
    cost, nodes = nx.single_source_dijkstra(net, start, end, weight="cost")
    return np.exp(-cost), nodes


# What stands on the screen


def drawn(page, what="g.edge"):
    return page.locator(f"#drawing {what}").evaluate_all("marks => marks.map(mark => mark.dataset.name)")


def places(page):
    found = page.locator("#drawing path.node").evaluate_all(
        "marks => marks.map(mark => [mark.dataset.name, mark.getAttribute('transform')])"
    )
    return dict(found)


def search(page, text):
    page.keyboard.press("/")
    page.keyboard.type(text)
    return page.locator("#found li[role=option] b").all_inner_texts()


def rows_of(page, direction, port):
    """Names, weights and shares of a list of a card."""
    rows = page.locator(f"table.edges[data-direction={direction}][data-port={port}] tr").all()
    return [
        (row.locator("button").inner_text(), *row.locator("td.number").all_inner_texts()) for row in rows[1:]
    ]


def read_share(text):
    """A share as a number; "<0.1 %" is zero."""
    return 0.0 if text.startswith("<") else float(text.removesuffix(" %")) / 100


def assert_nothing_sticks_out(page, size):
    widths = page.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth]")
    assert max(widths) <= size[0]
    right = page.evaluate(
        "Math.max(...[...document.querySelectorAll('header *, form *, aside *')]"
        ".filter(e => e.getClientRects().length).map(e => e.getBoundingClientRect().right))"
    )
    assert right <= size[0] + 0.5


# A graph of modules


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_head_is_found_its_parent_clicked_and_a_path_drawn(heads, open_page, size):
    page, edges = open_page(heads, size), edge_table(heads)
    assert page.title() == "The head graph of llama"
    assert sorted(drawn(page)) == sorted(edges["name"][:100])
    assert_nothing_sticks_out(page, size)
    assert search(page, "a1.h2")[0] == "a1.h2"
    page.keyboard.press("Enter")
    card = page.locator("#card")
    assert card.locator("h2").inner_text() == "a1.h2"
    node = add_influence(heads).nodes.set_index("name").loc["a1.h2"]
    shown = dict(zip(card.locator("dt").all_inner_texts(), card.locator("dd").all_inner_texts(), strict=True))
    assert float(shown["influence"]) == pytest.approx(node["influence"], rel=5e-3)
    assert float(shown["mean activation, where active"]) == pytest.approx(node["mean_activation"], rel=5e-3)
    into = edges[(edges["target"] == "a1.h2") & (edges["port"] == "k")].sort_values("share", ascending=False)
    rows = rows_of(page, "parents", "k")
    assert [row[0] for row in rows] == into["source"].tolist()[:6]
    assert [read_share(row[2]) for row in rows] == pytest.approx(into["share"].tolist()[:6], abs=6e-4)
    assert [float(row[1]) for row in rows] == pytest.approx(into["weight"].tolist()[:6], rel=5e-3)
    parent = into["source"].iloc[0]
    page.locator("table.edges[data-direction=parents][data-port=k] button").first.click()
    assert card.locator("h2").inner_text() == parent
    out = edges[(edges["source"] == parent) & (edges["port"] == "k")]  # the largest influence first
    assert [row[0] for row in rows_of(page, "children", "k")] == out["target"].tolist()[:6]
    assert_nothing_sticks_out(page, size)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_strongest_path_leads_through_a_head(heads, open_page, size):
    page, edges = open_page(heads, size), edge_table(heads)
    search(page, "a1.h2")
    page.keyboard.press("Enter")
    page.locator("#card").get_by_role("button", name="through").click()
    page.fill("#path-from", "embed")
    page.fill("#path-to", "logits")
    page.get_by_role("button", name="Find").click()
    before, start = best_product(edges, "embed", "a1.h2")
    after, rest = best_product(edges, "a1.h2", "logits")
    assert drawn(page, "path.node") == [*start, *rest[1:]]
    product = float(
        re.search(r"product of shares ([\d.e-]+)", page.locator("#reading").inner_text())[1].rstrip(".")
    )
    assert product == pytest.approx(before * after, rel=1e-2)
    page.fill("#path-through", "")
    page.get_by_role("button", name="Find").click()
    assert drawn(page, "path.node") == best_product(edges, "embed", "logits")[1]
    assert_nothing_sticks_out(page, size)


def test_neighbours_grow_and_are_taken_away(heads, open_page):
    page, edges = open_page(heads), edge_table(heads)
    search(page, "a1.h2")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Neighbours", exact=True).click()

    def around(name, n=3):
        into = edges[edges["target"] == name].sort_values("share", ascending=False, kind="stable")
        out = edges[edges["source"] == name]
        return {*into.groupby("port").head(n)["name"], *out.groupby("port").head(n)["name"]}

    first = around("a1.h2")
    assert set(drawn(page)) == first
    heights = {name: float(place.split(",")[1][:-1]) for name, place in places(page).items()}
    for name in first:
        below, above = name.split("<")[0].split("->")
        assert heights[below] > heights[above]
    page.locator("#drawing path.node[data-name=m0]").click()
    assert set(drawn(page)) == first | around("m0")
    page.locator("#drawing path.node[data-name=m0]").click()
    assert set(drawn(page)) == first
    page.fill("#per-port", "1")
    assert set(drawn(page)) == around("a1.h2", 1)
    assert page.locator("#features-around").is_hidden()  # the graph has none
    edge = page.locator("#drawing g.edge[data-port=k]").first
    row = edges.set_index("name").loc[edge.get_attribute("data-name")]
    edge.dispatch_event("pointerenter")
    said = page.locator("#hover").inner_text()
    assert f"{row['source']} → {row['target']}: port k" in said
    share = re.search(r"share (.* %)", said)[1]
    assert read_share(share) == pytest.approx(row["share"], abs=6e-4)
    assert edge.locator("path.line").get_attribute("stroke-dasharray")
    colours = {mark.get_attribute("stroke") for mark in page.locator("#drawing path.line").all()}
    assert len(colours) == edges[edges["name"].isin(drawn(page))]["weight"].ge(0).nunique()


def test_filters_move_no_node_and_agree_with_the_table(heads, open_page):
    page, edges = open_page(heads, n_edges=30), edge_table(heads)
    assert sorted(drawn(page)) == sorted(edges["name"][:30])
    before = places(page)
    page.fill("#n-edges-number", "55")
    assert sorted(drawn(page)) == sorted(edges["name"][:55])
    page.locator("#ports input[value=q]").uncheck()
    page.locator("#kinds input[value=embed]").uncheck()
    passing = edges[(edges["port"] != "q") & (edges["source"] != "embed")]
    assert sorted(drawn(page)) == sorted(passing["name"][:55])
    page.fill("#layer-to", "0")
    layer = heads.nodes.set_index("name")["layer"]
    passing = passing[(passing["source"].map(layer) < 1) & (passing["target"].map(layer) < 1)]
    assert sorted(drawn(page)) == sorted(passing["name"][:55])
    least = passing["influence"].iloc[3]
    page.fill("#least-influence", str(float(f"{0.999 * least:.6g}")))
    assert sorted(drawn(page)) == sorted(passing["name"][passing["influence"] >= 0.999 * least])
    after = places(page)
    assert {name: place for name, place in after.items() if name in before} == {
        name: place for name, place in before.items() if name in after
    }
    page.fill("#least-count", "1000000")
    assert drawn(page) == [] and page.locator("#empty").is_visible()
    page.get_by_role("button", name="Reset").click()
    assert sorted(drawn(page)) == sorted(edges["name"][:30]) and places(page) == before


def test_keys_search_and_close(heads, open_page):
    page = open_page(heads)
    assert search(page, "no such node") == [] and "no node" in page.locator("#found").inner_text()
    page.keyboard.press("Escape")
    assert page.locator("#found").is_hidden() and page.evaluate("document.activeElement === document.body")
    assert search(page, "a1.h")[:2] != []
    page.keyboard.press("ArrowDown")
    second = page.locator("#found li[aria-selected=true] b").inner_text()
    page.keyboard.press("Enter")
    assert page.locator("#card h2").inner_text() == second
    page.keyboard.press("Escape")
    assert page.locator("#card h2").count() == 0


# A graph of features


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_features_only_and_what_they_raise(features, model, dictionaries, open_page, size):
    name = most_influential(features, 1, "m1")[0]
    contexts = [["the first context of it", "another, longer context"]]
    cards = pd.DataFrame({"contexts": contexts}, index=[name])
    page = open_page(features, size, model=model, dictionaries=dictionaries, cards=cards)
    edges, kind = edge_table(features), features.nodes.set_index("name")["kind"]
    page.locator("#features-only").check()
    between = edges[(edges["source"].map(kind) == "feature") & (edges["target"].map(kind) == "feature")]
    assert len(between) > 0 and sorted(drawn(page)) == sorted(between["name"][:100])
    assert search(page, f"called {name}")[0] == name
    page.keyboard.press("Enter")
    card = page.locator("#card")
    assert card.locator("p.short").inner_text() == f"called {name}"
    assert card.locator("ul.texts li").all_inner_texts() == cards["contexts"].iloc[0]
    direction = dictionaries["m1"].W_dec[int(name.split("/")[1])] * model.ln_final.weight
    order = [f"word{token}" for token in (model.W_U @ direction).argsort(descending=True).tolist()]
    raised, lowered = (one.locator("li").all_inner_texts() for one in card.locator("ul.tokens").all())
    assert raised == order[:8] and lowered == order[::-1][:8]
    page.get_by_role("button", name="Neighbours", exact=True).click()
    page.locator("#features-around").check()
    into = between[between["target"] == name].sort_values("share", ascending=False, kind="stable")
    out = between[between["source"] == name]
    around = {*into.groupby("port").head(3)["name"], *out.groupby("port").head(3)["name"]}
    assert around and set(drawn(page)) == around
    assert_nothing_sticks_out(page, size)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_card_shows_contexts_a_histogram_and_a_cost(features, model, dictionaries, open_page, size):
    text = random_tokens(model, 3, 12, seed=5)
    page = open_page(features, size, model=model, dictionaries=dictionaries, corpus=text)
    name = most_influential(features, 1, "m1")[0]
    search(page, name)
    page.keyboard.press("Enter")
    card = page.locator("#card")
    acts = read_features(model, dictionaries["m1"], text, run=QUIET)[:, [int(name.split("/")[1])]].toarray()
    best = int(acts.argmax())
    sequence, place = divmod(best, text.shape[1])
    shown = card.locator("ul.contexts li").first
    assert shown.locator("mark").inner_text() == f"word{text[sequence, place]}"
    before = "".join(f"word{token}" for token in text[sequence, max(place - 10, 0) : place].tolist())
    assert shown.inner_text().startswith(before)
    assert float(shown.locator(".subtitle").inner_text()) == pytest.approx(acts.max(), rel=5e-3)
    assert f"{(acts != 0).sum()} positions" in card.locator("h3").first.inner_text()
    assert card.locator("svg.histogram rect").count() == 16
    cost = measure_costs(model, features, [name], text, dictionaries, QUIET)[name]
    facts = dict(zip(card.locator("dt").all_inner_texts(), card.locator("dd").all_inner_texts(), strict=True))
    told = facts["cost of cutting it"].removesuffix(" nats")
    assert float(told) == pytest.approx(cost, rel=5e-3)
    assert_nothing_sticks_out(page, size)


@torch.no_grad()
def test_cutting_a_feature_leaves_its_mean(model, dictionaries):
    """Cutting is exact: what remains is the model with the feature's activation at its mean."""
    text, dictionary = random_tokens(model, 2, 9, seed=6), dictionaries["m1"]
    graph = build_graph(model, text, {"m1": dictionary}, pruning=Pruning(None), run=QUIET)
    cost = measure_costs(model, graph, ["m1/4"], text, {"m1": dictionary})["m1/4"]

    def change(kind, layer, places):
        if (kind, layer) != ("m", 1):
            return None
        acts = dictionary.encode(places[dictionary.reads])
        mean = acts[:, 1:, 4].mean()
        return places["output"] + (mean - acts[..., 4:5]) * dictionary.W_dec[4]

    losses = []
    for logits in (model(text), run_logits(model, visit_modules(model, text, change))):
        losses.append(F.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten()))
    assert cost == pytest.approx(float(losses[1] - losses[0]), rel=1e-6) and cost != 0


def test_features_are_shown_first(features, open_page):
    """Of a graph of features the first edges join two of them, active together often enough."""
    page, edges = open_page(features), edge_table(features)
    kind = features.nodes.set_index("name")["kind"]
    between = edges[edges["source"].map(kind).eq("feature") & edges["target"].map(kind).eq("feature")]
    enough = between["count"] >= least_shown(features)
    assert sorted(drawn(page)) == sorted(between["name"][enough][:100])
    assert "that join two features" in page.locator("#reading").inner_text()
    page.locator("#features-only").uncheck()
    assert sorted(drawn(page)) == sorted(edges["name"][edges["count"] >= least_shown(features)][:100])


def test_the_first_position_of_a_prompt_is_hidden_until_it_is_asked_for(prompt, model, open_page):
    page, edges = open_page(prompt, model=model), edge_table(prompt)
    at = prompt.nodes.set_index("name")["position"]
    is_sink = edges["source"].map(at).eq(0) | edges["target"].map(at).eq(0)
    assert sorted(drawn(page)) == sorted(edges["name"][~is_sink][:100])
    assert "The first position, the attention sink, is hidden" in page.locator("#reading").inner_text()
    page.locator("#with-first").check()
    assert sorted(drawn(page)) == sorted(edges["name"][:100])
    search(page, "embed@0")
    page.keyboard.press("Enter")
    assert "first position" in page.locator("#card").inner_text()


def test_a_chosen_node_brings_its_strongest_edges(heads, open_page):
    page, edges = open_page(heads, n_edges=5), edge_table(heads)
    touched = {*edges["source"][:5], *edges["target"][:5]}
    name = next(one for one in heads.nodes["name"][::-1] if one not in touched and one.startswith("a"))
    search(page, name)
    page.keyboard.press("Enter")
    into = edges[edges["target"] == name].sort_values("share", ascending=False, kind="stable")
    out = edges[edges["source"] == name]
    assert set(drawn(page)) == {*edges["name"][:5], *into.groupby("port").head(2)["name"], *out["name"][:4]}
    assert page.locator("#reading").inner_text().startswith("5 edges of largest influence")


def test_a_text_needs_its_model(heads):
    with pytest.raises(ValueError, match="corpus goes with the model of the graph"):
        explore(heads, corpus=torch.zeros(1, 4, dtype=torch.long))


def test_promoted_tokens_do_not_depend_on_the_bias(model, dictionaries):
    shifted = {"m1": replace(dictionaries["m1"], b_dec=dictionaries["m1"].b_dec + 5)}
    assert list_promoted(model, shifted, ["m1/3"]) == list_promoted(model, dictionaries, ["m1/3"])


def test_communities_are_colours(features, open_page):
    nodes = features.nodes.assign(community=np.arange(len(features.nodes)) % 3)
    page = open_page(Graph(nodes, features.edges, features.meta))
    community = nodes.set_index("name")["community"]
    fills = page.locator("#drawing path.node").evaluate_all(
        "m => m.map(m => [m.dataset.name, m.getAttribute('fill')])"
    )
    colours = {(community[name], fill) for name, fill in fills}
    assert len(colours) == len({colour for _, colour in colours}) == 3
    assert "community 2" in page.locator("#legend").inner_text()
    page.select_option("#colour", "kind")
    assert "community" not in page.locator("#legend").inner_text()


# A graph of a prompt


def pin(page, name):
    search(page, name)
    page.keyboard.press("Enter")
    page.locator("#card").get_by_role("button", name="Pin", exact=True).click()


def group_three(page, names):
    """Pin four nodes and put three of them into a group."""
    for name in names:
        pin(page, name)
    assert pinned(page) == names
    for name in names[:3]:
        page.get_by_label(f"Tick {name} for a group").check()
    page.fill("#group-name", "the three")
    page.get_by_role("button", name="Group ticked").click()
    assert pinned(page) == ["the three", names[3]]


def pinned(page):
    return page.locator("#pins ul.pinned button.node").all_inner_texts()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pins_and_groups_are_saved_and_found_again(prompt, model, open_page, tmp_path, size):
    page, top = open_page(prompt, size, model=model), most_influential(prompt, 4)
    group_three(page, top)
    page.get_by_role("button", name="the three").click()
    page.fill("#card textarea", "they belong together")
    page.locator("#card textarea").blur()
    assert_nothing_sticks_out(page, size)
    with page.expect_download() as saving:
        page.get_by_role("button", name="Save").click()
    assert saving.value.suggested_filename == "llama-prompt-pins.json"
    saving.value.save_as(tmp_path / "view.json")
    saved = json.loads((tmp_path / "view.json").read_text(encoding="utf-8"))
    assert saved["groups"] == [{"name": "the three", "members": top[:3], "note": "they belong together"}]
    page.reload()
    assert pinned(page) == ["the three", top[3]]  # the browser kept them
    page.evaluate("localStorage.clear()")
    page.reload()
    assert pinned(page) == []
    with page.expect_file_chooser() as choosing:
        page.get_by_role("button", name="Load").click()
    choosing.value.set_files(tmp_path / "view.json")
    page.wait_for_function("document.querySelectorAll('#pins ul.pinned li').length === 2")
    assert pinned(page) == ["the three", top[3]]
    page.get_by_role("button", name="the three").click()
    assert page.input_value("#card textarea") == "they belong together"


def test_the_edge_of_a_group_stands_for_those_of_its_members(prompt, model, open_page):
    page, edges = open_page(prompt, model=model), edge_table(prompt)
    kind = prompt.nodes.set_index("name")["kind"]
    between = edges[edges["source"].map(kind).eq("feature") & edges["target"].map(kind).eq("feature")]
    reader = between["target"].value_counts().index[0]
    parents = between[between["target"] == reader].drop_duplicates("source")["source"].tolist()[:3]
    group_three(page, [*parents, reader])
    page.get_by_role("tab", name="Pinned").click()
    assert sorted(drawn(page, "path.node")) == sorted(["the three", reader])
    assert len(drawn(page)) == 1
    page.locator("#drawing g.edge").dispatch_event("pointerenter")
    lines = page.locator("#hover div").all_inner_texts()
    into = between[(between["target"] == reader) & between["source"].isin(parents)]
    ends = {f"{row.source} → {reader}: port {row.port}" for row in into.itertuples()}
    assert {line.split(",")[0] for line in lines} == ends if len(ends) <= 6 else len(lines) == 7


def test_tokens_stand_along_x_and_are_searched(prompt, model, open_page):
    page = open_page(prompt, model=model)
    at = prompt.nodes.set_index("name")["position"]
    inputs = prompt.nodes[prompt.nodes["kind"] == "embed"]
    words = [f"word{token}" for token in inputs["token"]]
    assert set(page.locator("#drawing text.column").all_text_contents()) == set(words)
    xs = {
        name: float(re.search(r"\(([-\d.]+)", place)[1])
        for name, place in places(page).items()
        if at[name] >= 0
    }
    by_position = pd.Series(xs).groupby(at.reindex(list(xs))).agg(["min", "max"])
    assert (by_position["min"].to_numpy()[1:] > by_position["max"].to_numpy()[:-1]).all()
    found = search(page, words[0])
    token = inputs["token"].iloc[0]
    assert found and set(found) <= set(
        prompt.nodes.loc[prompt.nodes["token"].isin([token, *range(token * 10, token * 10 + 10)]), "name"]
    )


def test_a_file_that_is_no_view_is_refused_in_words(prompt, model, open_page, tmp_path):
    page = open_page(prompt, model=model)
    for content, said in (("{", "can't be loaded"), ('{"format": "x"}', "not a view that this page saved")):
        (tmp_path / "bad.json").write_text(content)
        page.set_input_files("#view-file", tmp_path / "bad.json")
        page.wait_for_function(f"document.getElementById('said').textContent.includes({json.dumps(said)})")
    other = {"format": "circuitgraph-view", "graph": "0", "pinned": ["nobody", "embed@0"]}
    (tmp_path / "bad.json").write_text(json.dumps(other))
    page.set_input_files("#view-file", tmp_path / "bad.json")
    page.wait_for_function("document.getElementById('said').textContent.includes('another graph')")
    assert "1 of its names" in page.locator("#said").inner_text() and pinned(page) == ["embed@0"]


def test_exports_hold_what_is_shown(heads, open_page, tmp_path):
    page = open_page(heads, n_edges=20)
    with page.expect_download() as saving:
        page.get_by_role("button", name="SVG").click()
    assert saving.value.suggested_filename == "llama-head-overview.svg"
    saving.value.save_as(tmp_path / "drawing.svg")
    root = ElementTree.parse(tmp_path / "drawing.svg").getroot()
    svg = "{http://www.w3.org/2000/svg}"
    lines = [path for path in root.iter(f"{svg}path") if path.get("class") == "line"]
    names = {mark.get("data-name") for mark in root.iter() if mark.get("class") == "edge"}
    assert len(lines) == 20 and names == set(drawn(page)) and all(line.get("stroke") for line in lines)
    texts = {text.text for text in root.iter() if text.text}
    assert "port q" in texts and "logits" in texts  # the legend, and a label
    with page.expect_download() as saving:
        page.get_by_role("button", name="PNG").click()
    assert saving.value.suggested_filename == "llama-head-overview.png"
    saving.value.save_as(tmp_path / "drawing.png")
    data = (tmp_path / "drawing.png").read_bytes()
    width, height = (int.from_bytes(data[start : start + 4], "big") for start in (16, 20))
    box = page.locator("#drawing").bounding_box()
    assert data[:4] == b"\x89PNG" and width == 2 * round(box["width"]) and height > 2 * box["height"]


# Hostile and unfit input

HOSTILE = [
    "<img src=x onerror=window.hit=1>",
    "</script><script>window.hit=1</script>",
    "'\"><svg onload=window.hit=1>",
    "<!--<script>",
    "__proto__",
    "${window.hit=1}",
    "\u2028 \x00",
]


@pytest.fixture(scope="module")
def hostile(heads):
    names = heads.nodes["name"].tolist()
    new = dict(zip(names[1:], HOSTILE, strict=False))  # `embed` comes first
    nodes = heads.nodes.assign(name=[new.get(name, name) for name in names])
    nodes["label"] = [f"label of {name} <b>" for name in nodes["name"]]
    nodes["<i>column"] = nodes["label"]
    edges = heads.edges.astype({"source": str, "target": str}).replace({"source": new, "target": new})
    meta = heads.meta
    meta["model"]["name"] = "<b>model</b>"
    return Graph(nodes, edges, meta)


def test_hostile_names_are_texts(hostile, open_page):
    cards = {name: {f"title {name}": [name, "half a pair: \ud800"]} for name in HOSTILE}
    page = open_page(hostile, cards=cards)
    elements = "document.querySelectorAll('script, img, :not(li) > b, i, svg').length"
    before = page.evaluate(elements)
    for name in HOSTILE[:6]:
        page.keyboard.press("/")
        page.fill("#search", name)
        page.keyboard.press("Enter")
        assert page.evaluate("document.querySelector('#card h2').textContent") == name
        assert name in page.locator("#card ul li").all_inner_texts()
        assert f"label of {name} <b>" in page.locator("#card dd").all_inner_texts()
        page.locator("#card").get_by_role("button", name="Pin", exact=True).click()
    page.get_by_role("tab", name="Pinned").click()
    assert set(drawn(page, "path.node")) == set(HOSTILE[:6])
    page.locator("#drawing path.node").first.hover()
    assert page.evaluate("window.hit") is None and page.evaluate(elements) == before
    page.reload()
    assert len(pinned(page)) == 6 and page.evaluate("window.hit") is None


def test_a_frame_in_a_notebook_is_the_same_page(hostile, browser):
    explorer = explore(hostile, n_edges=10)
    page = browser.new_page()
    page.set_content(f"<html><body>{explorer._repr_html_()}</body></html>")
    frame = page.frames[1]
    frame.wait_for_selector("#drawing g.edge")
    assert frame.locator("#drawing g.edge").count() == 10
    assert frame.evaluate("document.getElementById('data').textContent") in explorer.html
    page.close()


def test_unfit_input_is_refused(heads, tmp_path):
    with pytest.raises(ValueError, match="graph must have an edge"):
        explore(heads.top_edges(0))
    with pytest.raises(ValueError, match=r"path must end in \.html, got .*page\.txt"):
        explore(heads, tmp_path / "page.txt")
    with pytest.raises(OSError, match="can't be written"):
        explore(heads, tmp_path / "missing" / "page.html")
    with pytest.raises(ValueError, match="n_edges must be at least 1, got 0"):
        explore(heads, n_edges=0)
    with pytest.raises(ValueError, match="each card must be of a node.*got 'nobody'"):
        explore(heads, cards={"nobody": {"a": "b"}})
    with pytest.raises(ValueError, match="cards must be a DataFrame or a mapping that holds a mapping"):
        explore(heads, cards={"embed": "a text"})
    with pytest.raises(ValueError, match="model must be the one of the graph, llama"):
        explore(heads, model=tiny_model("gpt2"))
    assert list(tmp_path.iterdir()) == []


def test_a_graph_without_output_goes_by_shares(heads, open_page):
    inner = heads.subgraph(modules=[name for name in heads.nodes["module"].unique() if name != "logits"])
    page = open_page(inner)
    assert page.locator("#reading").inner_text().startswith(f"{len(inner)} edges of largest share")
    assert "influence" not in page.locator("#legend").inner_text()


def test_the_command_writes_the_page_and_opens_it(prompt, heads, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("typer.launch", opened.append)
    prompt.save(tmp_path / "graph")
    page = tmp_path / "page.html"
    command = ["view", str(tmp_path / "graph"), "--out", str(page), "--n-edges", "7"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0 and done.stdout.startswith(f"wrote {page}") and opened == []
    assert page.read_text(encoding="utf-8") == explore(prompt, n_edges=7).html
    refused = CliRunner().invoke(app, [*command, "--open"])
    assert refused.exit_code == 2 and "--force" in refused.stderr and opened == []
    CliRunner().invoke(app, [*command, "--open", "--force"])
    assert opened == [str(page)]
    for wrong, said in (
        ([*command, "--force", "--dictionaries", "folder"], "dictionaries need their model"),
        (["view", str(tmp_path / "missing"), "--out", str(tmp_path / "new.html")], "is not a saved graph"),
        (["view", str(tmp_path / "graph"), "--out", str(tmp_path / "page.txt")], "path must end in .html"),
    ):
        refused = CliRunner().invoke(app, wrong)
        assert refused.exit_code == 2 and said in refused.stderr and "Traceback" not in refused.stderr
    heads.top_edges(0).save(tmp_path / "empty")
    refused = CliRunner().invoke(app, ["view", str(tmp_path / "empty"), "--force", "--out", str(page)])
    assert refused.exit_code == 2 and "graph must have an edge" in refused.stderr


# Large graphs


def test_a_million_edges_fit_and_the_page_says_what_is_missing(tmp_path):
    n_nodes, n_edges, draw = 10_000, 1_000_000, np.random.default_rng(0)
    names = ["embed", *(f"m{i // 1000}/{i}" for i in range(1, n_nodes - 1)), "logits"]
    kinds = ["embed", *["feature"] * (n_nodes - 2), "logits"]
    layer = [-1, *(i // 1000 for i in range(1, n_nodes - 1)), -1]
    nodes = pd.DataFrame({"name": names, "kind": kinds, "layer": layer, "index": range(n_nodes)})
    nodes["module"] = nodes["name"].str.split("/").str[0]
    nodes = nodes.assign(
        frequency=0.1, mean_activation=draw.random(n_nodes), label="a label of some length " * 3
    )
    ends = np.sort(draw.integers(0, n_nodes, (n_edges + 60_000, 2)), axis=1)
    code = np.unique((ends[:, 0] * n_nodes + ends[:, 1])[ends[:, 0] < ends[:, 1]])[:n_edges]
    pairs = np.stack([code // n_nodes, code % n_nodes], 1)
    weight = draw.normal(size=len(pairs))
    edges = pd.DataFrame({"source": np.array(names)[pairs[:, 0]], "target": np.array(names)[pairs[:, 1]]})
    edges = edges.assign(port="mlp", weight=weight, abs_weight=abs(weight), rms_weight=abs(weight), count=1)
    cards = {name: {"contexts": ["some words of a context " * 5] * 5} for name in names}
    graph = Graph(nodes, edges, {})
    explore(graph, tmp_path / "large.html", cards=cards)
    assert (tmp_path / "large.html").stat().st_size < 10e6
    text = (tmp_path / "large.html").read_text(encoding="utf-8")
    page = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])
    held = page["edges"]
    assert len(held["source"]) == MOST_EDGES
    assert f"holds {MOST_EDGES:,} of the graph's {len(graph):,} edges" in page["left_out"][0]
    assert f"{len(graph) - MOST_EDGES:,} weaker edges" in page["left_out"][2]
    assert f"Texts are there for {len(page['cards']):,} of {n_nodes:,} nodes" in page["left_out"][3]
    table = edge_table(graph)
    strongest = table.loc[table.groupby("target")["share"].idxmax(), "name"]
    kept = {f"{names[s]}->{names[t]}" for s, t in zip(held["source"], held["target"], strict=True)}
    assert set(strongest) <= kept and set(table["name"][: MOST_EDGES // 2]) <= kept
    part = table["influence"][table["name"].isin(kept)].sum() / table["influence"].sum()
    assert f"{part:.1%} of all influence" in page["left_out"][0]


def test_half_of_the_budget_goes_to_parents():
    strength = np.array([5.0, 4.0, 3.0, 0.1, 0.2])
    rank = np.array([0, 1, 2, 0, 1])
    assert choose_edges(strength, rank, 4).tolist() == [0, 1, 4, 3]
    assert choose_edges(strength, rank, 5).tolist() == [0, 1, 2, 4, 3]


def test_a_damaged_save_leaves_the_earlier_page(heads, tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    explore(heads, path)
    before = path.read_text(encoding="utf-8")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(OSError, match="can't be written"):
        explore(heads, path, n_edges=5)
    assert path.read_text(encoding="utf-8") == before
    assert [one.name for one in tmp_path.iterdir()] == ["page.html"]
