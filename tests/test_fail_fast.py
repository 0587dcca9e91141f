"""The shell answers a slip in one line before a model is loaded, and overwrites nothing unasked."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from circuitgraph.build.build import build_graph, complete_graph
from circuitgraph.build.prompt import Prompt
from circuitgraph.cli import app
from circuitgraph.cut import cut_model
from circuitgraph.data.prompts import load_task, read_prompt
from circuitgraph.data.task import Task
from circuitgraph.dictionary.protocol import Gate, LinearDictionary
from circuitgraph.dictionary.store import save_dictionary
from circuitgraph.graph.graph import Graph
from circuitgraph.model.blocks import run_logits
from circuitgraph.model.loading import check_device, load_model, tiny_model
from circuitgraph.names import check_source
from circuitgraph.options import Pruning, Run
from oracles import random_tokens

QUIET = Run(progress=False)
pytestmark = pytest.mark.filterwarnings("ignore", "error:::circuitgraph")


@pytest.fixture(scope="module")
def embedded():
    return load_model("smollm2-135m")


@pytest.fixture
def unloaded(monkeypatch):
    """A world where loading a model is an error."""

    def reached(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("circuitgraph.model.loading.load_model", reached)


@pytest.fixture(scope="module")
def small():
    model = tiny_model("llama")
    return build_graph(model, random_tokens(model, 2, 8), "layer", run=QUIET)


@pytest.fixture
def saved(tmp_path, small):
    """A small graph on the disk."""
    return small.save(tmp_path / "saved")


def invoke(*options):
    return CliRunner().invoke(app, [str(option) for option in options])


def check_refusal(done, *words):
    """That a command said one line that holds these words, and nothing else."""
    assert done.exit_code == 2, done.output
    assert done.stdout == "" and done.stderr.count("\n") == 1 and done.stderr.startswith("Error: ")
    for word in words:
        assert word in done.stderr, done.stderr


BAD_MODEL = {
    ("--model", "smollm2-153m"): ("'smollm2-153m'", "the closest are smollm2-135m", "Check the spelling"),
    ("--model", "./no-such-folder"): ("'./no-such-folder'", "folder that exists"),
    ("--device", "foo"): ("device must be", "'foo'"),
}
BAD_TEXT = {
    ("--n-tokens", 0): ("n_tokens", "at least 1", "0"),
    ("--seq-len", 1): ("seq_len", "at least 2", "1"),
    ("--corpus", "no-such.txt"): ("no-such.txt",),
}
BAD_BUILD = {
    ("--attribution", "igg"): ("'ig', 'gradient'", "'igg'"),
    ("--attribution", "eap-ig"): ("attribution must be one of", "'eap-ig'"),
    ("--baseline", "one"): ("'zero', 'mean'", "'one'"),
    ("--batch-size", -1): ("batch_size must be at least 1, got -1",),
    ("--keep", 0): ("keep must be at least 1",),
    ("--nodes", "dictionaries/none"): ("block, layer, head", "folder of dictionaries", "'dictionaries/none'"),
    ("--task", "sums"): ("source must be one of ioi", "'sums'"),
    ("--task", "ioi", "--n-prompts", 0): ("n_prompts must be at least 1, got 0",),
    ("--task", "ioi", "--attribution", "lrp-x"): ("'lrp-x'",),
}


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(("options", "words"), [*(BAD_MODEL | BAD_TEXT | BAD_BUILD).items()])
def test_build_refuses_before_a_model_is_loaded(tmp_path, options, words):
    check_refusal(invoke("build", "--out", tmp_path / "g", *options), *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("unloaded")
def test_a_gpu_that_is_not_there_is_refused(tmp_path):
    check_refusal(
        invoke("build", "--out", tmp_path / "g", "--device", "cuda:99"), "device must be", "'cuda:99'"
    )


@pytest.mark.usefixtures("unloaded")
def test_train_refuses_before_a_model_is_loaded(tmp_path):
    bad = {
        ("--kind", "best"): ("kind must be one of",),
        ("--batch-size", -1): ("batch_size must be at least 1, got -1",),
        ("--n-steps", 0): ("n_steps must be at least 1",),
        ("--preset", "tpu"): ("preset must be one of cpu, gpu, got 'tpu'",),
        ("--d-dict", 8, "--k", 9): ("k must lie in [1, 8]",),
    }
    for options, words in (BAD_MODEL | BAD_TEXT | bad).items():
        check_refusal(invoke("train", "--out", tmp_path / "d", *options), *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("unloaded")
def test_evaluate_refuses_before_a_model_is_loaded(tmp_path, saved):
    n_edges = len(Graph.load(saved))
    bad = {
        ("--n-edges", 200_000): (f"n must lie in [0, {n_edges}]", "200000"),
        ("--method", "best"): ("method must be one of", "'best'"),
        ("--by", "height"): ("by must be one of", "'height'"),
        ("--value", "half"): ("value must be one of", "'half'"),
        ("--value", "corrupted"): ("give a Task",),
        ("--task", "sums"): ("source must be one of ioi",),
        ("--batch-size", 0): ("batch_size must be at least 1",),
        ("--dictionaries", tmp_path / "none"): ("dictionaries must be a folder that exists",),
    }
    for options, words in (BAD_MODEL | BAD_TEXT | bad).items():
        check_refusal(invoke("evaluate", saved, *options), *words)


@pytest.mark.usefixtures("unloaded")
def test_other_commands_refuse_before_a_model_is_loaded(tmp_path, saved):
    compare = ["compare-methods", "--out", tmp_path / "m.csv"]
    bad = {
        ("--tasks", "ioi,sums"): ("source must be one of ioi", "'sums'"),
        ("--nodes", "dictionaries/none"): ("folder of dictionaries", "'dictionaries/none'"),
        ("--n-prompts", 0): ("n_prompts must be at least 1",),
    }
    for options, words in (BAD_MODEL | bad).items():
        check_refusal(invoke(*compare, *options), *words)
    ask = ["prompt", "--out", tmp_path / "g"]
    bad = {
        ("a prompt", "--nodes", "block"): ("nodes must be one of 'layer', 'head', got 'block'",),
        ("a prompt", "--attribution", "lrp"): ("goes with attribution='ig'", "'lrp'"),
        ("a prompt", "--dictionaries", "none"): ("dictionaries must be a folder that exists",),
        ("a prompt", "--keep", 0): ("keep must be at least 1",),
        ("",): ("text must hold a prompt",),
        ("a prompt", "--open"): ("open needs a page", "--page"),
        ("a prompt", "--page", "page.htm"): ("page must end in .html, got page.htm",),
        ("a prompt", "--json", saved / "meta.json"): ("json must be new", "meta.json exists", "--force"),
    }
    with_text = {("a prompt", *options): words for options, words in BAD_MODEL.items()}
    for options, words in (bad | with_text).items():
        check_refusal(invoke(*ask, *options), *words)
    missing = invoke("compare", saved, saved, "--dictionaries", tmp_path / "none")
    check_refusal(missing, "dictionaries must be a folder that exists")


def test_sources_that_may_be_models_are_let_through(tmp_path):
    for source in ("smollm2-135m", "gpt2", "EleutherAI/pythia-70m", "somebody/some-model.v1", tmp_path):
        check_source(source)
    check_device("cpu")
    with pytest.raises(ValueError, match="device must be"):
        load_model("smollm2-135m", device="foo")


# Ten slips, each answered before torch is imported, which alone takes more than a second

SLIPS = {
    ("build", "--attribution", "igg"): "'igg'",
    ("build", "--model", "smollm2-153m"): "the closest are smollm2-135m",
    ("build", "--device", "gpu"): "'gpu'",
    ("build", "--nodes", "dictionaries/none"): "dictionaries/none",
    ("build", "--task", "sums"): "'sums'",
    ("build", "--corpus", "no-such.txt"): "no-such.txt",
    ("build", "--n-tokens", 0): "n_tokens must be at least 1",
    ("evaluate", "{graph}", "--n-edges", 200_000): "n must lie in [0, ",
    ("report", "{folder}"): "is not a saved graph",
    ("communities", "{graph}", "--method", "best"): "'best'",
    ("communities", "{graph}", "--out", "{graph}"): "give --force",
    ("biuld",): "Did you mean 'build'?",
}
ALONE = """
import json, sys
from typer.testing import CliRunner
from circuitgraph.cli import app

done = [CliRunner().invoke(app, options) for options in json.load(sys.stdin)]
json.dump([(one.exit_code, one.output, "torch" in sys.modules) for one in done], sys.stdout)
"""


def test_slips_are_answered_without_torch(tmp_path, saved):
    places = {"graph": saved, "folder": tmp_path, "out": tmp_path / "new"}
    needs_out = {"build": ["--out", "{out}"]}
    commands = [[*slip, *needs_out.get(slip[0], [])] for slip in SLIPS]
    written = [[str(word).format(**places) for word in command] for command in commands]
    options = {"input": json.dumps(written), "capture_output": True, "text": True, "check": True}
    done = subprocess.run([sys.executable, "-c", ALONE], **options)
    for words, (code, output, has_torch) in zip(SLIPS.values(), json.loads(done.stdout), strict=True):
        assert code == 2 and words in output and not has_torch, output
    assert not places["out"].exists()


# Outputs


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("command", ["build", "prompt", "evaluate", "communities", "compare", "report"])
def test_nothing_is_overwritten_unasked(tmp_path, saved, command):
    out = tmp_path / "taken"
    commands = {
        "build": ["build"],
        "prompt": ["prompt", "a prompt"],
        "evaluate": ["evaluate", saved],
        "communities": ["communities", saved],
        "compare": ["compare", saved, saved],
        "report": ["report", saved],
    }
    writes_folder = command in ("build", "prompt", "communities")
    if writes_folder:
        Graph.load(saved).save(out)
    else:
        out.write_text("mine")
    files = [out / "meta.json", out / "edges.parquet"] if writes_folder else [out]
    before = [file.read_bytes() for file in files]
    done = invoke(*commands[command], "--out", out)
    check_refusal(done, f"out must be new, but {out} exists", "--force")
    assert [file.read_bytes() for file in files] == before


def test_force_replaces_what_is_there(tmp_path, monkeypatch, saved, embedded):
    page = tmp_path / "report.html"
    page.write_text("mine")
    assert invoke("report", saved, "--out", page, "--force").exit_code == 0
    assert page.read_text().startswith("<!doctype html>")
    grouped = Graph.load(saved).save(tmp_path / "grouped")
    find = ["communities", saved, "--n-null", 2, "--method", "leiden", "--out", grouped, "--force"]
    assert invoke(*find).exit_code == 0
    assert "community" in Graph.load(grouped).nodes
    monkeypatch.setattr("circuitgraph.model.loading.load_model", lambda *_, **__: embedded)
    build = ["build", "--nodes", "block", "--attribution", "gradient", "--n-tokens", 64, "--seq-len", 32]
    assert invoke(*build, "--out", saved, "--force").exit_code == 0
    assert Graph.load(saved).meta["nodes"] == "block"
    judge = ["evaluate", saved, "--n-tokens", 64, "--seq-len", 32, "--n-edges", 20]
    curve = tmp_path / "curve.csv"
    curve.write_text("mine")
    assert invoke(*judge, "--out", curve, "--force").exit_code == 0
    assert len(pd.read_csv(curve)) == 2


def test_a_graph_saves_over_another_unless_told_not_to(tmp_path):
    graph = complete_graph(tiny_model("llama"), "layer")
    graph.save(tmp_path / "g", overwrite=False)  # the folder is new
    graph.keep([]).save(tmp_path / "g")
    with pytest.raises(ValueError, match="holds a graph already: name another, or say overwrite=True"):
        graph.save(tmp_path / "g", overwrite=False)
    assert len(Graph.load(tmp_path / "g")) == 0


# What the shell and strings make


def test_the_version_and_examples_are_told():
    done = invoke("--version")
    assert done.exit_code == 0 and done.stdout.startswith("circuitgraph ")
    commands = [
        line.split()[0] for line in invoke("--help").stdout.split("Commands:")[1].splitlines() if line
    ]
    assert {"build", "prompt", "report"} <= set(commands)
    for command in commands:
        assert f"Example: circuitgraph {command} " in " ".join(invoke(command, "--help").stdout.split())


def test_a_text_is_the_graph_of_its_prompt(embedded):
    text = "The capital of France is"
    ids = read_prompt(embedded, text)
    assert ids.tolist() == [embedded.tokenizer(text).input_ids]
    of_text = build_graph(embedded, text, "layer", attribution="gradient", run=QUIET)
    cut = cut_model(embedded, {}, "layer")
    of_ids = build_graph(embedded, Prompt(ids), cut, attribution="gradient", run=QUIET)
    assert of_text == of_ids and len(of_text) > 1_000
    with pytest.raises(ValueError, match="prompt must hold text"):
        build_graph(embedded, "")
    with pytest.raises(ValueError, match="nodes must be 'layer', 'head' or dictionaries for a prompt"):
        build_graph(embedded, text, "block")


@pytest.mark.parametrize("grain", ["layer", "head"])
def test_weights_into_the_outputs_of_a_prompt_are_complete(grain):
    """Between whole modules, too: they sum to how far a logit, less the mean, is from that of no input."""
    model = tiny_model("llama")
    options = {"pruning": Pruning(None), "run": QUIET}
    graph = build_graph(model, Prompt(random_tokens(model, 1, 6)), grain, **options)
    outputs = graph.nodes[graph.nodes["kind"] == "logits"].set_index("name")
    empty = run_logits(model, torch.zeros(1, 1, model.d_model, dtype=model.dtype))[0, 0].detach().numpy()
    change = outputs["activation"] - (empty[outputs["token"]] - empty.mean())
    sums = graph.edges.groupby("target", observed=True)["weight"].sum()
    assert np.allclose(sums[outputs.index], change, atol=1e-9)


def test_the_prompt_command_saves_what_python_builds(tmp_path, monkeypatch, embedded):
    monkeypatch.setattr("circuitgraph.model.loading.load_model", lambda *_, **__: embedded)
    draw = torch.Generator().manual_seed(0)
    shapes = ((embedded.d_model, 8), (8, embedded.d_model), (8,), (embedded.d_model,))
    tensors = [torch.randn(*shape, generator=draw) / 20 for shape in shapes]
    dictionary = LinearDictionary("m4", "output", *tensors, Gate("topk", k=3))
    save_dictionary(dictionary, tmp_path / "d" / "m4")
    options = ["--dictionaries", tmp_path / "d", "--attribution", "gradient", "--n-logits", 3]
    page, file = tmp_path / "france.html", tmp_path / "of France.json"
    views = ["--page", page, "--json", file]
    done = invoke("prompt", "The capital of France is", "--out", tmp_path / "g", *options, *views)
    assert done.exit_code == 0, done.output
    assert page.read_text().startswith("<!doctype html>")
    written = json.loads(file.read_text())
    assert written["metadata"]["slug"] == "of-France" and len(written["links"]) > 10
    prompt = Prompt(read_prompt(embedded, "The capital of France is"), 3)
    built = build_graph(embedded, prompt, {"m4": dictionary}, attribution="gradient", run=QUIET)
    loaded = Graph.load(tmp_path / "g")
    pd.testing.assert_frame_equal(loaded.edges, built.edges)
    assert "' Paris'" in done.stdout and "@0" not in done.stdout.split("left out:")[1]


def test_a_task_takes_the_place_of_a_text(tmp_path, monkeypatch):
    model = tiny_model("llama")
    prompts = {"clean": random_tokens(model, 3, 6), "corrupted": random_tokens(model, 3, 6, seed=7)}
    task = Task(*prompts.values(), answers=torch.tensor([[3], [4], [5]]), wrong=torch.tensor([[6], [7], [8]]))
    monkeypatch.setattr("circuitgraph.model.loading.load_model", lambda *_, **__: model)
    monkeypatch.setattr("circuitgraph.data.prompts.load_task", lambda *_, **__: task)
    done = invoke("build", "--task", "ioi", "--nodes", "head", "--out", tmp_path / "g")
    assert done.exit_code == 0, done.output
    built = build_graph(model, task, "head", attribution="eap-ig", target="metric", run=QUIET)
    assert Graph.load(tmp_path / "g") == built
    assert "effects on the metric" in done.stdout and [path.name for path in tmp_path.iterdir()] == ["g"]


def test_a_real_task_can_be_drawn(embedded):
    assert len(load_task("ioi", embedded, 4)) == 4
    with pytest.raises(ValueError, match="source must be one of ioi"):
        load_task("sums", embedded, 4)


def test_an_answer_without_its_space_is_told_with_its_tokens(tmp_path, embedded):
    path = tmp_path / "capitals.csv"
    head = "clean,corrupted,answers,wrong\n"
    rows = "The capital of {} is,The capital of {} is,{}Paris,{}Rome\n"
    path.write_text(head + rows.format("France", "Italy", "", ""))
    with pytest.warns(UserWarning, match=r"2 answers follow a word .* 'Paris' .* tokens .* write ' Paris'"):
        load_task(path, embedded)
    path.write_text(head + rows.format("France", "Italy", " ", " "))
    assert len(load_task(path, embedded)) == 1  # warnings are errors here
