"""The command line: one line for bad input, nothing written; stopped runs go on to the same graph."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from typer.testing import CliRunner

import circuitgraph.build.build
from circuitgraph.ablation.judge import ablation_curve, run_ablated
from circuitgraph.ablation.values import Mean
from circuitgraph.attribution.method import Attribution
from circuitgraph.build.build import build_graph
from circuitgraph.cli import app
from circuitgraph.community.search import find_communities
from circuitgraph.data.corpus import load_corpus
from circuitgraph.data.task import Task
from circuitgraph.dictionary.protocol import Gate, LinearDictionary
from circuitgraph.dictionary.store import save_dictionary
from circuitgraph.graph.graph import Graph
from circuitgraph.graph.select import select_edges
from circuitgraph.methods.patching import patch_edges
from circuitgraph.model import loading
from circuitgraph.model.loading import load_model, tiny_model
from circuitgraph.options import Budgets, Judging, Run
from oracles import random_tokens

QUIET = Run(progress=False)
# transformers and TransformerLens warn while they boot a model; what this package causes is an error
pytestmark = pytest.mark.filterwarnings("ignore", "error:::circuitgraph")


@pytest.fixture(scope="module")
def embedded():
    return load_model("smollm2-135m")


def invoke(*options):
    """Run a command as the shell would."""
    return CliRunner().invoke(app, [str(option) for option in options])


def check_refusal(done, words):
    """That a command ended with one line on stderr that holds these words."""
    assert done.exit_code == 2 and words in done.stderr.splitlines()[-1], done.output
    assert "Traceback" not in done.stderr


def refuse(tmp_path, *options, out="g"):
    """Run a build that must fail: the one line that it says."""
    before = sorted(tmp_path.rglob("*"))
    command = ["build", "--nodes", "block", "--attribution", "gradient", "--out", tmp_path / out]
    done = invoke(*command, *options)
    assert done.exit_code == 2, done.output
    assert done.stdout == "" and done.stderr.count("\n") == 1, done.output
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.stderr and sorted(tmp_path.rglob("*")) == before
    return done.stderr


def forbid(monkeypatch, *names):
    """Make it an error to reach some stage of the work."""

    def reached(*_, **__):
        raise AssertionError("the work was begun")

    for name in names:
        monkeypatch.setattr(f"circuitgraph.{name}", reached)


def test_unknown_model(tmp_path):
    said = refuse(tmp_path, "--model", "no-such-model")
    assert "'no-such-model'" in said and "smollm2-135m" in said and "Check the spelling" in said
    assert str(tmp_path / "void") in refuse(tmp_path, "--model", tmp_path / "void")


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("nodes", "neuron", "block, layer, head"),
        ("attribution", "guess", "'ig', 'gradient'"),
        ("baseline", "one", "'zero', 'mean'"),
        ("norm", "cold", "'frozen', 'live'"),
        ("ports", "shut", "'split', 'merged'"),
        ("n-steps", "0", "at least 1"),
    ],
)
def test_unknown_option(tmp_path, monkeypatch, embedded, option, value, allowed):
    monkeypatch.setattr("circuitgraph.model.loading.load_model", lambda *_, **__: embedded)
    forbid(monkeypatch, "build.build.add_batch")
    said = refuse(tmp_path, f"--{option}", value)
    assert allowed in said and value in said


@pytest.mark.parametrize("out", ["file", "file/g", "file/far/g", "photos"])
def test_folder_that_cannot_be_written_is_found_before_the_work(tmp_path, monkeypatch, out):
    forbid(monkeypatch, "model.loading.load_model", "data.corpus.load_corpus", "build.build.build_graph")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    assert str(tmp_path / out) in refuse(tmp_path, out=out)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (b"", (), ("text.txt", "empty")),
        (b" \n\n \t", (), ("text.txt", "empty")),
        ("caf\u00e9 ".encode("latin-1") * 500, (), ("text.txt", "UTF-8", "0xe9", "offset 3", "iconv")),
        (b"one two three " * 100, ("--n-tokens", 10**6), ("n_tokens", "text.txt", "1000000", "fewer")),
        (
            b"one two three " * 10,
            ("--seq-len", 128, "--n-tokens", 128),
            ("seq_len", "text.txt", "128", "shorter sequences"),
        ),
        (b"one two three " * 10, ("--seq-len", 100_000), ("seq_len", "8192", "100000", "shorter sequences")),
        (b"one two three " * 10, ("--n-tokens", 0), ("n_tokens", "at least 1", "0")),
        (b"one two three " * 10, ("--seed", -1), ("seed", "at least 0", "-1")),
    ],
)
def test_bad_text(tmp_path, monkeypatch, embedded, content, options, words):
    monkeypatch.setattr("circuitgraph.model.loading.load_model", lambda *_, **__: embedded)
    forbid(monkeypatch, "build.build.build_graph")
    (tmp_path / "text.txt").write_bytes(content)
    said = refuse(tmp_path, "--corpus", tmp_path / "text.txt", *options)
    for word in words:
        assert word in said, said
    assert "void.txt" in refuse(tmp_path, "--corpus", tmp_path / "void.txt")


def command(out):
    start = [sys.executable, "-c", "from circuitgraph.cli import app; app()", "build", "--out", str(out)]
    options = "--nodes block --attribution gradient --n-tokens 1024 --seq-len 64 --batch-size 2"
    return start + options.split()


ENV = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def stop_after_a_checkpoint(out, how):
    """Start the run, or go on, and send a signal once it has kept something: exit code and what it said."""
    kept = out.with_name(f".{out.name}.partial") / "partial.safetensors"
    deadline = time.monotonic() + 120

    def when():
        return kept.stat().st_mtime_ns if kept.exists() else None

    def heed():  # a shell's background jobs ignore Ctrl-C, and so would this
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    before = when()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    run = subprocess.Popen(command(out), env=ENV, preexec_fn=heed, **pipes)
    try:
        while when() == before and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        assert when() != before and run.poll() is None
        run.send_signal(how)
        _, said = run.communicate(timeout=60)
    finally:
        run.kill()
    assert kept.exists() and not out.exists()
    return run.returncode, said


def test_a_killed_and_a_stopped_run_go_on_to_the_same_graph(tmp_path):
    out, whole = tmp_path / "g", tmp_path / "whole"
    uninterrupted = subprocess.Popen(
        command(whole), env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )  # beside the others, on a core of its own
    try:
        code, _ = stop_after_a_checkpoint(out, signal.SIGKILL)
        assert code == -signal.SIGKILL
        code, said = stop_after_a_checkpoint(out, signal.SIGINT)
        assert code == 130 and "Traceback" not in said
        assert (
            f"is kept in {tmp_path / '.g.partial'}: the same command goes on from there, --fresh starts anew"
            in said
        )
        done = subprocess.run(command(out), env=ENV, check=True, capture_output=True, text=True)
        assert uninterrupted.wait(timeout=120) == 0
    finally:
        uninterrupted.kill()
    for seen in (said, done.stderr):
        assert "/16 " in seen and " 0/16 " not in seen  # the bar begins where the run before it stopped
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g", "whole"]
    pd.testing.assert_frame_equal(Graph.load(out).edges, Graph.load(whole).edges, check_exact=True)
    assert Graph.load(out) == Graph.load(whole)
    assert (out / "edges.parquet").read_bytes() == (whole / "edges.parquet").read_bytes()


FULL = """
import resource, signal, sys, torch
import circuitgraph.build.build as stage
from circuitgraph.model.loading import tiny_model
from circuitgraph.options import Run
from oracles import random_tokens
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
whole, done = stage.add_batch, []
def add_batch(*args):
    done.append(1)
    if len(done) == 3: resource.setrlimit(resource.RLIMIT_FSIZE, (256, resource.RLIM_INFINITY))
    return whole(*args)
stage.add_batch = add_batch
model = tiny_model("llama", dtype=torch.float32)
run = Run(batch_size=2, checkpoint=sys.argv[1], progress=False)
try: stage.build_graph(model, random_tokens(model, 12, 16), attribution="gradient", run=run)
except OSError as error: print(error)
else: sys.exit("finished")
"""


def test_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    folder = tmp_path / "kept"
    done = subprocess.run(
        [sys.executable, "-c", FULL, folder],
        cwd=Path(__file__).parent,
        env=ENV,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (
        str(folder) in done.stdout
        and "after batch 3" in done.stdout
        and "the one of batch 2 is intact" in done.stdout
    )
    assert [p.name for p in folder.iterdir()] == ["partial.safetensors"]
    model, batches, add_batch = (
        tiny_model("llama", dtype=torch.float32),
        [],
        circuitgraph.build.build.add_batch,
    )
    tokens = random_tokens(model, 12, 16)
    whole = build_graph(model, tokens, attribution="gradient", run=Run(batch_size=2, progress=False))

    def count_batches(*args):
        batches.append(1)
        return add_batch(*args)

    monkeypatch.setattr("circuitgraph.build.build.add_batch", count_batches)
    run = Run(batch_size=2, checkpoint=folder, progress=False)
    assert build_graph(model, tokens, attribution="gradient", run=run) == whole
    assert len(batches) == 4  # of six: two were kept


def test_evaluate_is_the_curve_and_refuses_in_one_line(tmp_path, embedded):
    tokens = load_corpus("default", embedded, 64, seq_len=32, seed=1)
    graph = build_graph(embedded, tokens, "block", attribution="gradient", run=QUIET)
    graph.save(tmp_path / "g")
    judge = ["evaluate", tmp_path / "g", "--n-tokens", 64, "--seq-len", 32]
    options = ["--n-edges", 50, "--n-edges", 200, "--value", "zero", "--method", "greedy"]
    done = invoke(*judge, *options, "--out", tmp_path / "curve.csv")
    assert done.exit_code == 0, done.output
    judging = Judging(seed=1, run=QUIET)
    curve = ablation_curve(
        embedded, graph, tokens, Budgets([50, 200], "greedy"), value="zero", judging=judging
    )
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "curve.csv"), curve, check_dtype=False)
    again = ["--out", tmp_path / "curve.csv", "--force"]
    done = invoke(*judge, "--n-edges", 50, "--method", "node product", *again)
    kept = len(select_edges(graph, 50, "node product"))
    assert done.exit_code == 0 and (pd.read_csv(tmp_path / "curve.csv")["n_kept"] == kept).all()
    for options, words in {
        ("--task", "sums"): "source must be one of ioi",
        ("--value", "corrupted"): "give a Task",
        ("--n-edges", "-1"): "n_edges must be at least 0",
        ("--method", "best"): "method must be",
        ("--out", str(tmp_path / "no" / "c.csv")): "a folder that exists",
    }.items():
        check_refusal(invoke(*judge, *options), words)
    resample = ["--value", "resample", "--n-tokens", 32]  # one sequence has no other
    check_refusal(invoke(*judge, *resample), "resample")


def test_communities_are_those_of_the_function(tmp_path):
    model = tiny_model("llama")
    graph = build_graph(model, random_tokens(model, 2, 8, 0), "head", run=QUIET)
    graph.save(tmp_path / "g")
    find = ["communities", tmp_path / "g", "--n-null", 3]
    options = ["--method", "leiden", "--resolution", 1.2, "--seed", 4, "--out", tmp_path / "grouped"]
    done = invoke(*find, *options)
    assert done.exit_code == 0, done.output
    members = find_communities(graph, "leiden", resolution=1.2, seed=4).nodes["community"]
    assert Graph.load(tmp_path / "grouped").nodes["community"].tolist() == members.tolist()
    assert f"{members.max() + 1} communities" in done.stdout and "quality" in done.stdout
    for options, words in {
        ("--method", "best"): "method must be",
        ("--resolution", "0"): "resolution must be",
        ("--n-null", "1"): "n_null",
        ("--out", str(tmp_path / "no" / "g")): "a folder that exists",
    }.items():
        check_refusal(invoke(*find, *options), words)


def test_methods_are_compared_and_unknown_ones_refused(tmp_path, monkeypatch, embedded):
    monkeypatch.setattr("circuitgraph.model.loading.load_model", lambda *_, **__: embedded)
    compare = ["compare-methods", "--nodes", "block", "--n-prompts", 4, "--seq-len", 8]
    compare += ["--out", tmp_path / "methods.csv"]
    options = ["--tasks", "ioi, text", "--methods", "EAP; random", "--n-edges", 50, "--n-edges", 400]
    done = invoke(*compare, *options)
    assert done.exit_code == 0, done.output
    table = pd.read_csv(tmp_path / "methods.csv")
    assert set(table["method"]) == {"EAP", "random"} and set(table["task"]) == {"ioi", "text"}
    assert set(table["ablation"]) == {"edge", "node"} and len(table) == 16
    assert (table[["seconds", "memory"]] > 0).all(axis=None)
    assert not table["cpr"].isna().any() and table["spearman"].isna().all()
    done = invoke(*compare, *options, "--selection", "greedy; coverage(share=0.9)")
    assert done.exit_code == 0, done.output
    table = pd.read_csv(tmp_path / "methods.csv")
    assert table["selection"].value_counts().to_dict() == {"greedy": 16, "coverage(share=0.9)": 16}
    for options, words in (
        (("--methods", "EAP;best"), "methods must be among"),
        (("--value", "zero"), "value must be"),
        (("--out", str(tmp_path / "no" / "m.csv")), "a folder that exists"),
        (("--tasks", "text", "--value", "corrupted", "--methods", "EAP"), "needs a Task"),
    ):
        check_refusal(invoke(*compare, *options), words)


def test_methods_are_ranked_against_exact_patching_measured_once(tmp_path, monkeypatch):
    model, calls = tiny_model("llama"), []
    prompts = {"clean": random_tokens(model, 3, 6), "corrupted": random_tokens(model, 3, 6, seed=7)}
    answers = {"answers": torch.arange(3)[:, None] + 3, "wrong": torch.arange(3)[:, None] + 13}
    task = Task(*prompts.values(), **answers, name="own")

    def count_patches(*args, **options):
        calls.append(1)
        return patch_edges(*args, **options)

    monkeypatch.setattr("circuitgraph.model.loading.load_model", lambda *_, **__: model)
    monkeypatch.setattr("circuitgraph.data.prompts.load_task", lambda *_, **__: task)
    monkeypatch.setattr("circuitgraph.methods.compare.patch_edges", count_patches)
    compare = ["compare-methods", "--tasks", "ioi", "--nodes", "layer", "--n-edges", 5, "--n-seeds", 2]
    for methods in ("EAP;exact patching", "EAP;random"):
        folders = ["--exact", tmp_path / "exact", "--out", tmp_path / "m.csv"]
        done = invoke(*compare, *folders, "--methods", methods)
        assert done.exit_code == 0, done.output
    table = pd.read_csv(tmp_path / "m.csv")
    saved = Graph.load(next((tmp_path / "exact").iterdir()))
    rule = Attribution("eap", baseline="mean")
    eap = build_graph(model, task, "layer", target="metric", attribution=rule, run=QUIET)
    expected = spearmanr(eap.edges["weight"].abs(), saved.edges["weight"].abs()).statistic
    spearman = table.groupby("method")["spearman"].mean()
    assert len(calls) == 2 and set(table["seed"]) == {0, 1}
    assert np.isclose(spearman["EAP"], expected, atol=1e-4)
    assert abs(spearman["random"]) < spearman["EAP"] and np.isnan(spearman["exact patching"])


def test_a_graph_of_features_from_a_folder_of_dictionaries(tmp_path, monkeypatch, embedded):
    monkeypatch.setattr("circuitgraph.model.loading.load_model", lambda *_, **__: embedded)
    W = torch.randn(40, embedded.d_model, generator=torch.Generator().manual_seed(0))
    W_dec = W / W.norm(dim=1, keepdim=True)
    biases = torch.zeros(40), torch.zeros(embedded.d_model)
    dictionary = LinearDictionary("m1", "output", W.mT.contiguous(), W_dec, *biases, Gate("topk", k=4))
    folder = tmp_path / "dictionaries"
    save_dictionary(dictionary, folder / "m1", weights_hash=embedded.weights_hash)
    text = ["--n-tokens", 64, "--seq-len", 32]
    done = invoke("build", "--nodes", folder, "--keep", 3, "--out", tmp_path / "g", "--n-check", 96, *text)
    assert done.exit_code == 0, done.output
    graph = Graph.load(tmp_path / "g")
    built_on, other = (
        load_corpus("default", embedded, n, seq_len=32, seed=i) for i, n in enumerate((64, 64))
    )
    judged = run_ablated(embedded, graph, other, value=Mean(built_on), dictionaries={"m1": dictionary})
    none = run_ablated(embedded, graph.keep([]), other, value=Mean(built_on), dictionaries={"m1": dictionary})
    of_graph, of_none, of_model = (
        torch.nn.functional.cross_entropy(logits[:, 1:-1].flatten(0, 1), other[:, 2:].flatten()).item()
        for logits in (judged, none, embedded(other))
    )
    expected = (of_none - of_graph) / (of_none - of_model)
    found = re.search(r"faithfulness (\S+), KL \S+ on 2 sequences of 32 tokens, drawn anew", done.output)
    assert abs(float(found[1]) - expected) < 1e-3
    assert graph.meta["nodes"] == "feature" and set(graph.meta["dictionaries"]) == {"m1"}
    read = graph.edges["target"].value_counts()
    assert read.filter(regex=r"^m1/\d+$").max() == 3 < read["logits"]
    judge = ["evaluate", tmp_path / "g", "--n-edges", 50, "--value", "zero", *text]
    done = invoke(*judge, "--dictionaries", folder, "--out", tmp_path / "curve.csv")
    assert done.exit_code == 0 and len(pd.read_csv(tmp_path / "curve.csv")) == 2, done.output
    check_refusal(invoke(*judge), "dictionaries must be those that the graph of features was built with")


def test_two_graphs_are_compared_on_a_text(tmp_path, monkeypatch, embedded):
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: embedded)
    for seed in (0, 1):
        tokens = load_corpus("default", embedded, 128, seq_len=64, seed=seed)
        build_graph(embedded, tokens, "layer", attribution="gradient", run=QUIET).save(tmp_path / f"g{seed}")
    text = tmp_path / "text.txt"
    text.write_text("The cat that the dogs saw was on the old mat. " * 20)
    call = ["compare", tmp_path / "g0", tmp_path / "g1", "--text", text, "--n-classes", 8]
    page, seeds = tmp_path / "compared.html", 3 * ["--seed-distance", 0.9]
    done = invoke(*call, "--out", tmp_path / "matched.csv", "--page", page, *seeds)
    assert done.exit_code == 0, done.output
    assert "edges, correlation" in done.stdout and "distance" in done.stdout
    assert "isomorphic at this tolerance: 95 % of 3 pairs of other seeds" in done.stdout
    assert "side by side" in page.read_text() and str(page) in done.stdout
    check_refusal(invoke(*call, "--page", tmp_path / "compared.txt"), "page must end in .html")
    check_refusal(invoke(*call, "--seed-distance", 1.5), "seed_distance must lie in")
    matched = pd.read_csv(tmp_path / "matched.csv")
    assert (matched["a"] == matched["b"]).all() and len(matched) == 61
    check_refusal(invoke(*call[:3], "--text", tmp_path / "no.txt"), "no.txt")
    check_refusal(invoke(*call, "--n-classes", 1), "n_classes must be at least 2")
    check_refusal(invoke(*call, "--out", tmp_path / "no" / "m.csv"), "a folder that exists")
    text.write_text("too short")
    check_refusal(invoke(*call), "text must hold at least 40 words")
