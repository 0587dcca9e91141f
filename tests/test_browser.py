"""What a person sees: the report and the widget in a real browser, without a network."""

import html
import os
import re
import shutil
import socket
import subprocess
import sys
import time

import nbformat
import pytest
import torch
import walk
from playwright.sync_api import sync_playwright

from circuitgraph.ablation.judge import ablation_curve
from circuitgraph.attribution.method import Attribution
from circuitgraph.build.build import build_graph
from circuitgraph.community.behaviour import Matching, match_behaviours
from circuitgraph.community.links import leave_out
from circuitgraph.community.search import find_communities
from circuitgraph.dictionary.protocol import Gate, LinearDictionary
from circuitgraph.graph.explorer import explore
from circuitgraph.graph.select import select_edges
from circuitgraph.graph.viewer import write_report
from circuitgraph.model.loading import load_model, tiny_model
from circuitgraph.options import Budgets, Judging, Pruning, Run
from known_features import two_circuits
from oracles import random_tokens

QUIET = Run(progress=False)
IMPORTS = "import pandas as pd\n\nimport circuitgraph as cg"
SHOWN = "() => document.querySelector('.js-plotly-plot').layout.title.text"
VISIBLE = "() => document.querySelector('.js-plotly-plot')._fullData.filter(t => t.visible === true).length"


@pytest.fixture(scope="module")
def graph():
    model = tiny_model("llama")
    return build_graph(model, random_tokens(model), run=QUIET)


@pytest.fixture
def page():
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert path, "this test needs Chromium: run `make browser`"
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        page.said, page.asked = [], []
        page.on(
            "console", lambda message: page.said.append(message.text) if message.type == "error" else None
        )
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url))
        yield page
        browser.close()


def test_report_opens_without_a_network_and_its_slider_moves(graph, page, tmp_path):
    path = write_report(graph, tmp_path / "report.html", n_edges=20)
    assert path.stat().st_size < 8e6
    page.context.set_offline(True)
    page.goto(path.as_uri())
    page.wait_for_selector(".slider-grip-rect")
    assert page.title() == "The head graph of llama" and page.locator(".js-plotly-plot").count() == 4
    before, lines = page.evaluate(SHOWN), page.evaluate(VISIBLE)
    assert before.startswith(f"20 of {len(graph)} edges")
    page.locator(".slider-grip-rect").first.scroll_into_view_if_needed()
    grip = page.locator(".slider-grip-rect").first.bounding_box()
    right = page.locator(".slider-rail-touch-rect").first.bounding_box()
    page.mouse.move(grip["x"] + grip["width"] / 2, grip["y"] + grip["height"] / 2)
    page.mouse.down()
    page.mouse.move(right["x"] + right["width"] - 1, grip["y"] + grip["height"] / 2, steps=5)
    page.mouse.up()
    page.wait_for_function(f"({SHOWN})() !== {before!r}")
    assert (
        page.evaluate(SHOWN).startswith(f"{len(graph)} of {len(graph)} edges")
        and page.evaluate(VISIBLE) > lines
    )
    assert (
        page.said == []
        and [url for url in page.asked if not url.startswith(("file:", "data:", "blob:"))] == []
    )


@pytest.fixture
def lab(tmp_path):
    """A JupyterLab in a folder; a function that opens a notebook of some cells in it and runs them all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        f"--port={port}",
        "--IdentityProvider.token=",
        "--ServerApp.port_retries=0",
        f"--ServerApp.root_dir={tmp_path}",
    ]
    env = os.environ | {
        "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"),
        "PYTHONWARNINGS": "ignore",
    }

    def open_notebook(page, *cells, shown=".jp-OutputArea .js-plotly-plot .main-svg"):
        kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
        nbformat.write(
            nbformat.v4.new_notebook(
                cells=[nbformat.v4.new_code_cell(cell) for cell in cells], metadata=kernel
            ),
            tmp_path / "look.ipynb",
        )
        page.goto(f"http://127.0.0.1:{port}/lab/tree/look.ipynb?reset")
        page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
        page.get_by_text("| Idle").wait_for(
            timeout=60_000
        )  # cells that are run before the kernel is there are lost
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        page.wait_for_selector(shown, timeout=120_000)

    with (
        (tmp_path / "lab.log").open("w") as log,
        subprocess.Popen(command, env=env, stdout=log, stderr=log) as server,
    ):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, (tmp_path / "lab.log").read_text()
            time.sleep(0.2)
        yield open_notebook
        server.terminate()


def keep_screenshot(page, name):
    if where := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{where}/{name}.png")


def test_widget_draws_anew_when_its_slider_moves(graph, page, lab, tmp_path):
    graph.save(tmp_path / "graph")
    lab(page, "import circuitgraph as cg", "cg.view(cg.Graph.load('graph'), 20)")
    before = page.evaluate(SHOWN)
    assert before.startswith(f"20 of {len(graph)} edges")
    page.locator(".noUi-handle").first.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(
        "() => document.querySelector('.js-plotly-plot')?.layout?.title.text.startsWith('50 of ')",
        timeout=60_000,
    )
    assert page.locator("table.edges tr").count() == 11
    keep_screenshot(page, "widget")


# The explorer, on the three kinds of graphs


def random_dictionary(model, module, draw):
    shapes = ((model.d_model, 24), (24, model.d_model), (24,), (model.d_model,))
    tensors = [torch.randn(*shape, generator=draw) / 20 for shape in shapes]
    return LinearDictionary(module, "output", *tensors, Gate("topk", k=6))


def keep_low(graph, n_layers=6):
    """The first layers, input and output: a page of them opens at once."""
    nodes = graph.nodes
    return graph.subgraph(modules=nodes.loc[nodes["layer"] < n_layers, "module"].unique())


@pytest.fixture(scope="module")
def walks():
    """Small graphs of SmolLM2, and what is asked about each."""
    model, draw = load_model("smollm2-135m"), torch.Generator().manual_seed(0)
    text = torch.randint(model.d_vocab, (2, 32), generator=draw)
    dictionaries = {name: random_dictionary(model, name, draw) for name in ("m3", "m4")}
    heads = keep_low(build_graph(model, text, attribution="gradient", run=QUIET))
    features = keep_low(build_graph(model, text, dictionaries, attribution="gradient", run=QUIET))
    prompt = keep_low(build_graph(model, "The capital of France is", dictionaries, run=QUIET))
    top = features.edges[
        features.edges["source"].str.startswith("m3/") & features.edges["target"].str.startswith("m4/")
    ]
    pins = [*dict.fromkeys([*top["source"], *top["target"]])]
    is_placed = prompt.nodes["name"].str.match(r"m[34]/\d+@[1-4]$")
    placed = prompt.nodes.loc[is_placed, "name"].tolist()
    output = prompt.nodes.loc[prompt.nodes["kind"] == "logits", "name"].iloc[0]
    return {
        "heads": (heads, walk.Walk("a3.h2", "embed", "logits", ["m0", "m1", "a2.h1", "a3.h2"])),
        "features": (features, walk.Walk("a5", "embed", "logits", pins[:4])),
        "prompt": (prompt, walk.Walk("a5@4", "embed@4", output, placed[:4])),
    }


@pytest.mark.parametrize("size", walk.SIZES, ids=str)
@pytest.mark.parametrize("name", ["heads", "features", "prompt"])
def test_a_page_answers_all_questions_offline(page, walks, tmp_path, name, size):
    graph, steps = walks[name]
    path = tmp_path / "page.html"
    explore(graph, path)
    page.context.set_offline(True)
    page.set_viewport_size({"width": size[0], "height": size[1]})
    page.goto(path.as_uri())
    keep_screenshot(page, f"{name}-{size[0]}")
    walk.take(page, page, graph, steps, tmp_path)
    page.reload()
    assert walk.pinned(page) == ["the three", steps.pinned[3]]
    assert page.said == []
    assert [url for url in page.asked if not url.startswith(("file:", "data:", "blob:"))] == []


def frames_of(page):
    """The pages in a notebook, in order."""
    page.wait_for_function("() => document.querySelectorAll('iframe[srcdoc]').length === 3", timeout=60_000)
    frames = [frame.content_frame() for frame in page.query_selector_all("iframe[srcdoc]")]
    for frame in frames:
        frame.wait_for_selector("#drawing path.node")
    return frames


def test_jupyterlab_answers_all_questions(page, walks, lab, tmp_path):
    for name, (graph, _) in walks.items():
        graph.save(tmp_path / name)
    cells = [f"cg.explore(cg.Graph.load({name!r}))" for name in walks]
    outside = re.compile(r"https?://(?!127\.0\.0\.1[:/])")
    lab(page, IMPORTS, *cells, shown="iframe[srcdoc]")
    for size in walk.SIZES:
        page.set_viewport_size({"width": size[0], "height": size[1]})
        for frame, (name, (graph, steps)) in zip(frames_of(page), walks.items(), strict=True):
            frame.frame_element().scroll_into_view_if_needed()
            keep_screenshot(page, f"lab-{name}-{size[0]}")
            frame.evaluate("readNotes({format: FORMAT}); notesChanged()")
            walk.take(frame, page, graph, steps, tmp_path)
    lab(page, IMPORTS, *cells, shown="iframe[srcdoc]")
    for frame, (_, steps) in zip(frames_of(page), walks.values(), strict=True):
        assert walk.pinned(frame) == ["the three", steps.pinned[3]]
    assert [text for text in page.said if "srcdoc" in text] == []
    assert [url for url in page.asked if outside.match(url)] == []


READING = "() => document.querySelector('.ablation-reading').textContent"
DRAWN = """() => document.querySelectorAll('.js-plotly-plot')[0]._fullData
    .filter(t => t.marker?.opacity === 0)
    .flatMap(t => t.text.map(label => label.split('<br>')[0]))"""
MARKED = """() => document.querySelectorAll('.js-plotly-plot')[1]?._fullData
    ?.filter(t => t.name === 'selected')
    .map(t => [Array.from(t.x), Array.from(t.y)])[0]"""


def test_reading_mark_and_graph_follow_the_slider_of_a_curve(graph, page, lab, tmp_path):
    model, tokens = tiny_model("llama"), random_tokens(tiny_model("llama"), 8, 20)
    budgets = Budgets([5, 10, 20, 40, 80, len(graph)], "greedy", "abs_weight")
    curve = ablation_curve(model, graph, tokens, budgets, judging=Judging(metric="kl", run=QUIET))
    graph.save(tmp_path / "graph")
    curve.to_parquet(tmp_path / "curve.parquet")
    lab(
        page,
        f"{IMPORTS}\nfrom circuitgraph.graph.viewer import view_ablation",
        "view_ablation(cg.Graph.load('graph'), pd.read_parquet('curve.parquet'), 20)",
    )
    page.locator(".noUi-handle").first.focus()
    for n in (20, 40, 80):
        page.wait_for_function(
            f"() => ({MARKED})()?.[0][0] === {n} && ({READING})().startsWith('budget {n}:')", timeout=60_000
        )
        edge, node = (
            curve[(curve["ablation"] == mode) & (curve["n_edges"] == n)].iloc[0] for mode in ("edge", "node")
        )
        assert page.evaluate(MARKED) == [[n, n], [edge["faithfulness"], node["faithfulness"]]]
        chosen = select_edges(graph, n, "greedy", by="abs_weight")
        assert (
            sorted(map(html.unescape, page.evaluate(DRAWN))) == sorted(chosen.edge_names)
            and len(chosen) == edge["n_kept"]
        )
        numbers = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", page.evaluate(READING))]
        expected = [
            n,
            len(chosen),
            edge["n_nodes"],
            *(
                row[column]
                for row in (edge, node)
                for column in ("n_run", "faithfulness", "low", "high", "kl")
            ),
        ]
        assert numbers == pytest.approx(expected, abs=6e-4)
        if n == 40:
            keep_screenshot(page, "ablation")
        if n < 80:
            page.keyboard.press("ArrowRight")
    boxes = [plot.bounding_box() for plot in page.locator(".js-plotly-plot").all()]
    assert (
        len(boxes) == 2
        and boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
        and abs(boxes[0]["y"] - boxes[1]["y"]) < 5
    )  # side by side


SEEN = "() => document.querySelector('.community')?.innerText ?? ''"


def test_inspector_shows_the_community_that_is_chosen(page, lab, tmp_path):
    known = two_circuits()
    rule, pruning = Attribution("ig", skip_first=0), Pruning(None)
    options = {"attribution": rule, "pruning": pruning, "run": QUIET}
    graph = build_graph(known.model, known.tokens, known.dictionaries, **options)
    graph = graph.threshold(1e-9, "abs_weight")
    found = find_communities(leave_out(graph, ["embed", "logits", "error"]), "layered", resolution=0.15)
    options = {"value": "zero", "dictionaries": known.dictionaries, "run": QUIET}
    options["matching"] = Matching(n_controls=3, n_permutations=3)
    table = match_behaviours(known.model, found, known.tokens, known.behaviours, **options)
    table.to_parquet(tmp_path / "table.parquet")
    found.save(tmp_path / "graph")
    lab(
        page,
        f"{IMPORTS}\nfrom circuitgraph.community.figures import view_communities",
        "view_communities(cg.Graph.load('graph'), table=pd.read_parquet('table.parquet'), n=40)",
    )
    sizes = found.nodes["community"].value_counts()
    page.wait_for_function(f"() => ({SEEN})().includes('{sizes[0]} nodes')", timeout=60_000)
    assert (
        "m2/5" in page.evaluate(SEEN)
        and "m2/6" not in page.evaluate(SEEN)
        and "copying" in page.evaluate(SEEN)
    )
    page.locator(".widget-dropdown select").first.select_option(index=1)
    page.wait_for_function(f"() => ({SEEN})().includes('{sizes[1]} nodes')", timeout=60_000)
    assert "m2/6" in page.evaluate(SEEN) and "m2/5" not in page.evaluate(SEEN)
    keep_screenshot(page, "community")
    edges = page.locator("table.within tr").count()
    page.locator(".noUi-handle").nth(1).focus()  # the threshold
    for _ in range(6):
        page.keyboard.press("ArrowRight")
    page.wait_for_function(
        f"() => document.querySelectorAll('table.within tr').length < {edges}", timeout=60_000
    )
    page.locator(".noUi-handle").nth(0).focus()  # the resolution
    page.keyboard.press("End")
    page.wait_for_function(
        "() => document.querySelectorAll('.widget-dropdown option').length > 2"
        f" && ({SEEN})().includes('not measured')",
        timeout=60_000,
    )
