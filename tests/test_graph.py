"""Graphs on random small tables: what merging, cutting and saving must keep, and what must be refused."""

import html
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import networkx as nx
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuitgraph.graph.graph import Graph, density, save_gexf, save_graphml
from circuitgraph.graph.figures import plot_layers, rank_edges, sum_modules, use_static_renderer
from circuitgraph.graph.select import prune_dangling, select_edges
from circuitgraph.graph.tables import FORMAT_VERSION, PORTS, GraphError, name_edges
from circuitgraph.graph.viewer import plot_curve, view, view_ablation, write_report
from circuitgraph.build.build import build_graph
from circuitgraph.model.loading import tiny_model
from circuitgraph.options import Run
from oracles import random_tokens

PATIENT = settings(deadline=None, max_examples=40, derandomize=True)
WEIGHTS = ("weight", "abs_weight", "rms_weight")
SAVED = ("nodes.parquet", "edges.parquet", "meta.json")


def make_graph(n, ends, samples, text="a"):
    """The graph whose weights are the means of `samples [token edge]`."""
    nodes = pd.DataFrame(
        {
            "name": [f"n{i}" for i in range(n)],
            "module": [f"m{i // 2}" for i in range(n)],
            "kind": "head",
            "layer": [i // 2 for i in range(n)],
            "index": [i % 2 for i in range(n)],
            "frequency": 1.0,
            "mean_activation": samples.sum() / len(samples),
        }
    )
    source, target, port = zip(*ends, strict=True)
    edges = pd.DataFrame(
        {
            "source": [f"n{i}" for i in source],
            "target": [f"n{i}" for i in target],
            "port": list(port),
            "weight": samples.mean(0),
            "abs_weight": np.abs(samples).mean(0),
            "rms_weight": np.sqrt(np.square(samples).mean(0)),
            "count": np.full(len(ends), len(samples)),
        }
    )
    return Graph(
        nodes,
        edges,
        {
            "model": {"name": "random"},
            "nodes": "head",
            "attribution": "ig",
            "corpus": [{"sha256": text, "n_sequences": 1, "seq_len": len(samples)}],
        },
    )


@st.composite
def shards(draw, n_shards=1):
    """Graphs with the same edges over different texts, and what they were made from."""
    n = draw(st.integers(2, 7))
    entrances = [
        draw(st.sampled_from([("q", "k", "v"), ("mlp",), ("in",), ("logits",)])) for _ in range(n)
    ]  # a node has three, or one
    possible = [(i, j, port) for j in range(n) for port in entrances[j] for i in range(j)]
    ends = sorted(
        draw(st.sets(st.sampled_from(possible), min_size=1)), key=lambda e: (e[1], PORTS.index(e[2]), e[0])
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = 10.0 ** draw(st.integers(-6, 3))
    parts = [
        scale
        * rng.standard_normal((draw(st.integers(1, 9)), len(ends))).round(draw(st.sampled_from([0, 1, 9])))
        for _ in range(n_shards)
    ]  # rounding makes ties
    return [make_graph(n, ends, part, text=f"text {k}") for k, part in enumerate(parts)], ends, parts


@given(shards(3))
@PATIENT
def test_merge_is_associative_and_the_mean_by_sums(drawn):
    (a, b, c), ends, parts = drawn
    left, right, whole = (
        a.merge(b).merge(c),
        a.merge(b.merge(c)),
        make_graph(len(a.nodes), ends, np.concatenate(parts)),
    )
    size = np.abs(np.concatenate(parts)).max() + 1e-300
    for column in WEIGHTS:
        assert np.abs(left.edges[column] - right.edges[column]).max() <= 1e-12 * size
        assert np.abs(left.edges[column] - whole.edges[column]).max() <= 1e-12 * size
    assert left.edges["count"].tolist() == right.edges["count"].tolist() == whole.edges["count"].tolist()
    assert np.allclose(
        left.nodes["mean_activation"],
        whole.nodes["mean_activation"],
        rtol=1e-12,
        atol=1e-12 * size * len(ends),
    )
    assert left.meta == right.meta and [t["sha256"] for t in left.meta["corpus"]] == [
        "text 0",
        "text 1",
        "text 2",
    ]


@given(shards(), st.data())
@PATIENT
def test_cuts_agree(drawn, data):
    (graph,), *_ = drawn
    by = data.draw(st.sampled_from(WEIGHTS))
    chain = [graph.top_edges(n, by) for n in range(len(graph) + 1)]
    assert [len(g) for g in chain] == list(range(len(graph) + 1))
    for small, large in zip(chain, chain[1:], strict=False):
        assert set(small.edge_names) < set(large.edge_names)
    n = data.draw(st.integers(1, len(graph)))
    smallest, size = chain[n].edges[by].abs().min(), graph.edges[by].abs()
    kept = graph.threshold(smallest, by)
    assert set(chain[n].edge_names) <= set(kept.edge_names) and len(kept) == (size >= smallest).sum()
    assert len(graph.threshold(np.nextafter(size.max(), np.inf), by)) == 0 and len(
        graph.threshold(0, by)
    ) == len(graph)
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(graph), max_size=len(graph))))
    names = [name for name, yes in zip(graph.edge_names, mask, strict=True) if yes]
    by_name, by_mask = graph.keep(data.draw(st.permutations(names))), graph.keep(mask)
    assert by_name.edge_names == names
    pd.testing.assert_frame_equal(by_name.edges, by_mask.edges)
    pd.testing.assert_frame_equal(
        by_mask.merge(graph.keep(~mask)).edges, graph.edges
    )  # parts of one text merge to the whole
    if names:
        with pytest.raises(ValueError, match="count twice"):
            graph.merge(by_mask)


@given(shards())
@PATIENT
def test_files_bring_back_what_was_saved(drawn):
    (graph,), *_ = drawn
    with tempfile.TemporaryDirectory() as folder:
        loaded = Graph.load(graph.save(Path(folder) / "g"))
        assert (
            loaded == graph
            and loaded != graph.keep(np.zeros(len(graph), bool))
            and [p.name for p in Path(folder).iterdir()] == ["g"]
        )
        save_graphml(graph, Path(folder) / "g.graphml")
        save_gexf(graph, Path(folder) / "g.gexf")
        for read in (
            nx.read_graphml(Path(folder) / "g.graphml", force_multigraph=True),
            nx.read_gexf(Path(folder) / "g.gexf"),
        ):
            assert (
                set(read) == set(graph.nodes["name"])
                and read.is_directed()
                and read.number_of_edges() == len(graph)
            )
            found = {(u, v, d["port"]): d["weight"] for u, v, d in read.edges(data=True)}
            wanted = {(e.source, e.target, e.port): e.weight for e in graph.edges.itertuples()}
            assert found.keys() == wanted.keys() and all(
                np.isclose(found[k], wanted[k], rtol=1e-12, atol=0) for k in wanted
            )


def example(n_edges=12):
    n = int(np.ceil((1 + np.sqrt(1 + 8 * n_edges)) / 2))
    ends = [(i, j, "in") for j in range(n) for i in range(j)][:n_edges]
    return make_graph(n, ends, np.random.default_rng(0).standard_normal((5, n_edges)))


@pytest.mark.parametrize("name", SAVED)
def test_damaged_files_are_refused_by_name(tmp_path, name):
    graph = example()
    path = graph.save(tmp_path / "g") / name
    good, rng = path.read_bytes(), np.random.default_rng(0)
    flipped = [
        bytes((*good[:i], good[i] ^ (1 << int(rng.integers(8))), *good[i + 1 :]))
        for i in {0, len(good) - 1, *rng.integers(len(good), size=40).tolist()}
    ]
    for bad in [b"", good[:1], good[: len(good) // 2], good[:-1], *flipped]:
        path.write_bytes(bad)
        with pytest.raises(GraphError, match=name):
            Graph.load(tmp_path / "g")
    path.unlink()
    with pytest.raises(GraphError, match=f"{name} is missing"):
        Graph.load(tmp_path / "g")
    path.write_bytes(good)
    assert Graph.load(tmp_path / "g") == graph


def test_files_of_another_graph_and_newer_formats_are_refused(tmp_path):
    graph = example()
    a, b = graph.save(tmp_path / "a"), example(13).save(tmp_path / "b")
    (a / "edges.parquet").write_bytes((b / "edges.parquet").read_bytes())
    with pytest.raises(GraphError, match="edges.parquet"):
        Graph.load(a)
    Graph(graph.nodes, graph.edges, graph.meta | {"format_version": FORMAT_VERSION + 1}).save(
        tmp_path / "newer"
    )
    with pytest.raises(GraphError, match=r"meta\.json has format .*upgrade"):
        Graph.load(tmp_path / "newer")


def test_tables_that_do_not_hold_together_are_refused():
    graph = example()
    nodes, edges, meta = (
        graph.nodes,
        graph.edges.assign(
            source=lambda e: e["source"].astype(str), target=lambda e: e["target"].astype(str)
        ),
        graph.meta,
    )
    swapped = edges.rename(columns={"source": "target", "target": "source"})
    for bad, message in (
        (swapped, "point forward"),
        (edges.assign(target=edges["source"]), "point forward"),
        (pd.concat([edges, edges.iloc[3:4]]), "stands twice"),
        (edges.assign(source="n99"), "source of edge 0"),
        (edges.assign(port="w"), "ports"),
        (edges.drop(columns="count"), "lack the columns"),
        *(
            (edges.assign(**{c: np.where(edges.index == 2, v, edges[c])}), f"{c} must be finite")
            for c in WEIGHTS
            for v in (np.nan, np.inf)
        ),
    ):
        with pytest.raises(GraphError, match=message):
            Graph(nodes, bad, meta)
    with pytest.raises(GraphError, match="colour"):
        Graph(nodes, edges, meta | {"colour": "red"})
    with pytest.raises(GraphError, match="unique"):
        Graph(nodes.assign(name="n0"), edges, meta)
    assert Graph(nodes, edges, meta) == graph


def test_folders_that_are_not_ours_are_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "file" / "far" / "below"):
        with pytest.raises((OSError, ValueError), match=str(folder)):
            example().save(folder)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(ValueError, match="photos"):
        example().save(tmp_path / "photos")
    assert (tmp_path / "file").read_text() == "mine" and [
        p.name for p in (tmp_path / "photos").iterdir()
    ] == ["cat.jpg"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "photos"]


@pytest.mark.parametrize("limit", [100, 20_000])  # too small for the nodes, and for the edges
def test_full_disk_keeps_the_earlier_graph(tmp_path, limit):
    graph, code = (
        example(),
        f"""
import resource, signal, sys
from test_graph import example
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try: example(5000).save(sys.argv[1])
except OSError as error: print(error)
else: sys.exit("saved")
""",
    )
    graph.save(tmp_path / "g")
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "g"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 0
        and "could not be saved" in done.stdout
        and str(tmp_path / "g") in done.stdout
        and "intact" in done.stdout
    ), done.stderr
    assert Graph.load(tmp_path / "g") == graph and [p.name for p in tmp_path.iterdir()] == ["g"]
    assert sorted(p.name for p in (tmp_path / "g").iterdir()) == sorted((*SAVED, ".graph.lock"))
    example(5000).save(tmp_path / "g")
    assert len(Graph.load(tmp_path / "g")) == 5000


# Subgraphs by budget


def random_dag(seed, n_nodes=8):
    """Some forward edges at random among a few nodes, `logits` last; weights with ties."""
    rng = np.random.default_rng(seed)
    names = ["embed", *(f"m{i}" for i in range(n_nodes - 2)), "logits"]
    nodes = pd.DataFrame(
        {
            "name": names,
            "module": names,
            "index": -1,
            "layer": [-1, *range(n_nodes - 2), n_nodes - 2],
            "kind": ["embed", *["mlp"] * (n_nodes - 2), "logits"],
            "frequency": 1.0,
            "mean_activation": 0.0,
        }
    )
    pairs = [(a, b) for b in range(1, n_nodes) for a in range(b) if rng.random() < 0.5]
    weight = rng.integers(-4, 5, len(pairs)).astype(float)
    return Graph(
        nodes,
        pd.DataFrame(
            {
                "source": [names[a] for a, _ in pairs],
                "target": [names[b] for _, b in pairs],
                "port": ["logits" if b == n_nodes - 1 else "mlp" for _, b in pairs],
                "weight": weight,
                "abs_weight": np.abs(weight),
                "rms_weight": np.abs(weight),
                "count": 1,
            }
        ),
        {"nodes": "layer"},
    )


def on_a_path(edges):
    """Those edges through which some path leads from embed to logits, by walking."""

    def reaches(a, b):
        return a == b or any(reaches(t, b) for s, t in edges if s == a)

    return {(s, t) for s, t in edges if reaches("embed", s) and reaches(t, "logits")}


def ends(graph):
    return list(zip(graph.edges["source"].astype(str), graph.edges["target"].astype(str), strict=True))


@pytest.mark.parametrize("seed", range(12))
def test_subgraphs_by_budget_are_those_of_a_plain_search(seed):
    graph = random_dag(seed)
    size = dict(zip(ends(graph), graph.edges["weight"].abs(), strict=True))
    for n in range(len(graph) + 1):
        top = sorted(size, key=lambda e: -size[e])[:n]  # stable: ties in the order of edges
        taken, lead = [], {"logits"}
        while len(taken) < n and (open_ := [e for e in size if e[1] in lead and e not in taken]):
            taken.append(max(open_, key=lambda e: size[e]))
            lead.add(taken[-1][0])
        for method, chosen in (("top", top), ("greedy", taken)):
            assert set(ends(select_edges(graph, n, method, prune=False))) == set(chosen)
            pruned = select_edges(graph, n, method)
            assert (
                set(ends(pruned)) == on_a_path(chosen)
                and len(pruned) <= n
                and ends(prune_dangling(pruned)) == ends(pruned)
            )
    pruned = select_edges(graph, 2, "greedy")
    chosen, dropped = pruned.meta["history"]
    assert chosen == "select_edges(2, Greedy(by='weight', signed=False))"
    assert dropped.startswith("prune_dangling()")
    if dropped != "prune_dangling()":
        assert dropped.startswith(f"prune_dangling(): {len(pruned)} of ")


def test_budgets_are_refused_out_of_range():
    graph = random_dag(0)
    for method in ("top", "greedy"):
        for n in (-1, len(graph) + 1):
            with pytest.raises(ValueError, match=r"n must lie in \[0, "):
                select_edges(graph, n, method)
    with pytest.raises(ValueError, match="method must be one of 'top', 'greedy', .*got 'best'"):
        select_edges(graph, 1, "best")


def test_unknown_names_weights_and_modules_are_refused():
    graph = example()
    for refused, message in (
        (lambda: graph.keep(["n0->n9"]), "'n0->n9' is not; see graph.edge_names"),
        (lambda: graph.keep([0, 1]), "boolean mask of length 12"),
        (lambda: graph.keep(np.ones(3, dtype=bool)), "boolean mask of length 12"),
        (lambda: graph.threshold(-1), "minimum must be at least 0"),
        (lambda: graph.threshold(np.nan), "minimum must be a finite number, got nan"),
        (lambda: graph.top_edges(2, "count"), "by must be one of weight, abs_weight, rms_weight"),
        (lambda: graph.subgraph(), "modules or layers must be given"),
        (lambda: graph.subgraph(modules="m9"), "modules must be among"),
        (lambda: graph.subgraph(layers=[0, 9]), "layers must be among"),
        (lambda: rank_edges(graph, node="n99"), "node must be one of the graph's"),
        (lambda: rank_edges(graph, -1), "n must be at least 0"),
        (lambda: plot_layers(graph, -1), "n_edges must be at least 0"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            refused()
    assert len(graph.keep([])) == len(graph.keep(np.zeros(12, dtype=bool))) == 0


def test_density_of_a_graph_without_edges_into_modules():
    graph = random_dag(0)
    only_logits = graph.keep((graph.edges["target"] == "logits").to_numpy())
    assert set(density(only_logits).index.get_level_values("edges")) == {"into logits"}


# Figures, curves, reports


def hand_made_curve(graph, budgets=(2, 4, 8)):
    """A table like that of `ablation_curve`, of the edges that a graph has at each budget."""
    rows = [
        {
            "ablation": mode,
            "n_edges": n,
            "n_kept": len(select_edges(graph, n)),
            "n_nodes": 5,
            "n_run": n + extra,
            "faithfulness": n / 10 + extra,
            "low": n / 10 - 0.1,
            "high": n / 10 + 0.1,
            "kl": 1 / (1 + n),
        }
        for n in budgets
        for mode, extra in (("edge", 0), ("node", 1))
    ]
    curve = pd.DataFrame(rows)
    curve.attrs = {"method": "top", "by": "weight", "data": "<text>"}
    return curve


def test_tables_that_are_no_curve_of_the_graph_are_refused():
    graph = random_dag(3)
    curve, bare = hand_made_curve(graph), hand_made_curve(graph)
    bare.attrs = {}
    for refused, message in (
        (lambda: plot_curve(curve.drop(columns=["low", "kl"])), "low, kl"),
        (lambda: plot_curve(curve[:0]), "at least one budget"),
        (lambda: plot_curve(curve, 7), "2, 4, 8, got 7"),
        (lambda: plot_curve(pd.concat([curve, curve])), "stands twice under one ablation mode"),
        (
            lambda: view_ablation(graph, bare),
            "lacks by, method: formats such as CSV lose it, parquet keeps it",
        ),
        (
            lambda: view_ablation(graph, curve.assign(n_kept=99)),
            "graph must be the one that curve was made of",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            refused()


def test_a_budget_of_zero_has_no_place_on_the_axis_and_settings_are_escaped():
    curve = hand_made_curve(random_dag(3), (0, 2, 4))
    figure = plot_curve(curve, 2)
    lines = {trace.name: list(trace.x) for trace in figure.data if trace.name}
    assert lines == {"edge ablation": [2, 4], "node ablation": [2, 4], "selected": [2, 2]}
    assert "data: &lt;text&gt;" in figure.layout.title.text
    assert len(plot_curve(curve, 0).data) == len(plot_curve(curve).data) == len(figure.data) - 1


def test_a_crowded_subgraph_is_drawn_in_part_and_says_so():
    graph = random_dag(0, 70)
    curve = hand_made_curve(graph, (len(graph),))
    kept = curve["n_kept"][0]
    figure = view_ablation(graph, curve).children[1].children[0].outputs[0]["data"]
    figure = figure["application/vnd.plotly.v1+json"]
    points = [trace for trace in figure["data"] if trace.get("marker", {}).get("opacity") == 0]
    assert sum(len(trace["text"]) for trace in points) == 1_000 < kept
    assert figure["layout"]["title"]["text"] == f"the largest 1,000 of {kept:,} edges judged"


def test_a_report_escapes_names_and_keeps_the_earlier_page(tmp_path):
    graph = random_dag(1)
    named = Graph(graph.nodes, graph.edges, graph.meta | {"model": {"name": "toy <1>"}})
    page = write_report(named, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "toy &lt;1&gt;" in page and "toy <1>" not in page
    with pytest.raises(OSError, match="can't be written"):
        write_report(graph, tmp_path / "missing" / "report.html")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(OSError, match="folder.html can't be written"):
        write_report(graph, tmp_path / "folder.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.html", "report.html"]


def test_modules_without_an_edge_have_no_row():
    table = sum_modules(random_dag(2).keep([]))
    assert table.shape == (0, 0)


def test_a_flow_diagram_is_stored_as_a_page_only(monkeypatch):
    monkeypatch.setattr(pio.renderers, "default", pio.renderers.default)
    use_static_renderer()
    render = pio.renderers["circuitgraph"].to_mimebundle
    flow = go.Figure(go.Sankey(node={"label": ["a", "b"]}, link={"source": [0], "target": [1], "value": [1]}))
    assert set(render(flow.to_dict())) == {"text/html"}
    both = render(go.Figure(go.Scatter(y=[1])).to_dict())
    assert set(both) == {"text/html", "application/vnd.plotly.v1+json"}


def test_one_order_of_the_largest_edges():
    """A selection by size, the ranking, the table of a graph and the first rows of a report agree."""
    model = tiny_model("llama")
    graph = build_graph(model, random_tokens(model), run=Run(progress=False))
    ranked = rank_edges(graph, 12)
    assert sorted(graph.top_edges(12, by="size").edge_names) == sorted(name_edges(ranked))
    assert graph.top_edges(12, by="size").meta["history"] == ["top_edges(12, by='size')"]
    page, listed = graph._repr_html_(), view(graph, 20).children[-1].value
    cells = [html.unescape(cell) for cell in re.findall("<td>(.*?)</td>", page)]
    assert cells[::3] == name_edges(ranked)[:10] and "by size" in page
    sizes = [float(cell) for cell in cells[1::3]]
    assert sizes == sorted(sizes, reverse=True)
    writers = re.findall("<tr>\\s*<td>(.*?)</td>", listed)
    assert writers == ranked["source"].tolist()[:10] and "by size" in listed
    with pytest.raises(ValueError, match="n must lie in"):
        graph.top_edges(len(graph) + 1, by="size")
