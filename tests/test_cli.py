"""The command line: one clear line for bad input with nothing written, and runs that are stopped, killed or out of disk go on to the same graph."""

import os
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

import circuitgraph.build
import circuitgraph.data
import circuitgraph.model
from circuitgraph.ablate import ablation_curve
from circuitgraph.baseline import patch_edges
from circuitgraph.build import build_graph
from circuitgraph.cli import app
from circuitgraph.community import find_communities
from circuitgraph.data import load_corpus
from circuitgraph.dictionary import Gate, LinearDictionary, save_dictionary
from circuitgraph.graph import Graph
from circuitgraph.model import load_model, tiny_model
from circuitgraph.task import Task
from oracles import random_tokens

pytestmark = pytest.mark.filterwarnings("ignore", "error:::circuitgraph")  # transformers and TransformerLens warn while they boot a model; what this package causes is an error


@pytest.fixture(scope="module")
def embedded():
    return load_model("smollm2-135m")


def refuse(tmp_path, *options, out="g"):
    """Run a build that must fail: the one line that it says."""
    before = sorted(tmp_path.rglob("*"))
    done = CliRunner().invoke(app, ["build", "--nodes", "block", "--attribution", "gradient", "--out", str(tmp_path / out), *map(str, options)])
    assert done.exit_code == 2, done.output
    assert done.stdout == "" and done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1, done.output
    assert "Traceback" not in done.stderr and sorted(tmp_path.rglob("*")) == before
    return done.stderr


def forbid(monkeypatch, *names):
    """Make it an error to reach some stage of the work."""
    def reached(*_, **__): raise AssertionError("the work was begun")
    for name in names: monkeypatch.setattr(f"circuitgraph.{name}", reached)


def test_unknown_model(tmp_path):
    said = refuse(tmp_path, "--model", "no-such-model")
    assert "'no-such-model'" in said and "smollm2-135m" in said and "Check the spelling" in said
    assert str(tmp_path / "void") in refuse(tmp_path, "--model", tmp_path / "void")


@pytest.mark.parametrize(("option", "value", "allowed"), [("nodes", "neuron", "block, layer, head"), ("attribution", "guess", "'ig', 'gradient'"), ("baseline", "one", "'zero', 'mean'"),
                                                          ("norm", "cold", "'frozen', 'live'"), ("ports", "shut", "'split', 'merged'"), ("n-steps", "0", "at least 1")])
def test_unknown_option(tmp_path, monkeypatch, embedded, option, value, allowed):
    monkeypatch.setattr("circuitgraph.model.load_model", lambda *_, **__: embedded)
    forbid(monkeypatch, "build.add_batch")
    said = refuse(tmp_path, f"--{option}", value)
    assert allowed in said and value in said


@pytest.mark.parametrize("out", ["file", "file/g", "file/far/g", "photos"])
def test_folder_that_cannot_be_written_is_found_before_the_work(tmp_path, monkeypatch, out):
    forbid(monkeypatch, "model.load_model", "data.load_corpus", "build.build_graph")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    assert str(tmp_path / out) in refuse(tmp_path, out=out)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(("content", "options", "words"), [
    (b"", (), ("text.txt", "empty")),
    (b" \n\n \t", (), ("text.txt", "empty")),
    ("caf\u00e9 ".encode("latin-1") * 500, (), ("text.txt", "UTF-8", "0xe9", "offset 3", "iconv")),
    (b"one two three " * 100, ("--n-tokens", 10**6), ("n_tokens", "text.txt", "1000000", "fewer")),
    (b"one two three " * 10, ("--seq-len", 128, "--n-tokens", 128), ("seq_len", "text.txt", "128", "shorter sequences")),
    (b"one two three " * 10, ("--seq-len", 100_000), ("seq_len", "8192", "100000", "shorter sequences")),
    (b"one two three " * 10, ("--n-tokens", 0), ("n_tokens", "at least 1", "0")),
    (b"one two three " * 10, ("--seed", -1), ("seed", "at least 0", "-1")),
])
def test_bad_text(tmp_path, monkeypatch, embedded, content, options, words):
    monkeypatch.setattr("circuitgraph.model.load_model", lambda *_, **__: embedded)
    forbid(monkeypatch, "build.build_graph")
    (tmp_path / "text.txt").write_bytes(content)
    said = refuse(tmp_path, "--corpus", tmp_path / "text.txt", *options)
    for word in words: assert word in said, said
    assert "void.txt" in refuse(tmp_path, "--corpus", tmp_path / "void.txt")


def command(out):
    return [sys.executable, "-c", "from circuitgraph.cli import app; app()", "build", "--nodes", "block", "--attribution", "gradient",
            "--n-tokens", "1024", "--seq-len", "64", "--batch-size", "2", "--out", str(out)]


ENV = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def stop_after_a_checkpoint(out, how):
    """Start the run, or go on with it, and send it a signal once it has kept something: its exit code and what it said."""
    kept, deadline = out.with_name(f".{out.name}.partial") / "partial.safetensors", time.monotonic() + 120
    when = lambda: kept.stat().st_mtime_ns if kept.exists() else None  # noqa: E731
    before = when()
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  (a shell's background jobs ignore Ctrl-C, and so would this)
    run = subprocess.Popen(command(out), env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    try:
        while when() == before and run.poll() is None and time.monotonic() < deadline: time.sleep(0.005)
        assert when() != before and run.poll() is None
        run.send_signal(how)
        _, said = run.communicate(timeout=60)
    finally: run.kill()
    assert kept.exists() and not out.exists()
    return run.returncode, said


def test_a_killed_and_a_stopped_run_go_on_to_the_same_graph(tmp_path):
    out, whole = tmp_path / "g", tmp_path / "whole"
    uninterrupted = subprocess.Popen(command(whole), env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # beside the others, on a core of its own
    try:
        code, _ = stop_after_a_checkpoint(out, signal.SIGKILL)
        assert code == -signal.SIGKILL
        code, said = stop_after_a_checkpoint(out, signal.SIGINT)
        assert code == 130 and "Traceback" not in said
        assert f"is kept in {tmp_path / '.g.partial'}: the same command goes on from there, --fresh starts anew" in said
        done = subprocess.run(command(out), env=ENV, check=True, capture_output=True, text=True)
        assert uninterrupted.wait(timeout=120) == 0
    finally: uninterrupted.kill()
    for seen in (said, done.stderr): assert "/16 " in seen and " 0/16 " not in seen  # the bar begins where the run before it stopped
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g", "whole"]
    pd.testing.assert_frame_equal(Graph.load(out).edges, Graph.load(whole).edges, check_exact=True)
    assert Graph.load(out) == Graph.load(whole)
    assert (out / "edges.parquet").read_bytes() == (whole / "edges.parquet").read_bytes()


FULL = """
import resource, signal, sys, torch
import circuitgraph.build as stage
from circuitgraph.model import tiny_model
from oracles import random_tokens
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
whole, done = stage.add_batch, []
def add_batch(*args):
    done.append(1)
    if len(done) == 3: resource.setrlimit(resource.RLIMIT_FSIZE, (256, resource.RLIM_INFINITY))
    return whole(*args)
stage.add_batch = add_batch
model = tiny_model("llama", dtype=torch.float32)
try: stage.build_graph(model, random_tokens(model, 12, 16), attribution="gradient", batch_size=2, checkpoint=sys.argv[1], progress=False)
except OSError as error: print(error)
else: sys.exit("finished")
"""


def test_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    folder = tmp_path / "kept"
    done = subprocess.run([sys.executable, "-c", FULL, folder], cwd=Path(__file__).parent, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(folder) in done.stdout and "after batch 3" in done.stdout and "the one of batch 2 is intact" in done.stdout
    assert [p.name for p in folder.iterdir()] == ["partial.safetensors"]
    model, batches, add_batch = tiny_model("llama", dtype=torch.float32), [], circuitgraph.build.add_batch
    tokens = random_tokens(model, 12, 16)
    whole = build_graph(model, tokens, attribution="gradient", batch_size=2, progress=False)
    monkeypatch.setattr("circuitgraph.build.add_batch", lambda *args: batches.append(1) or add_batch(*args))
    assert build_graph(model, tokens, attribution="gradient", batch_size=2, checkpoint=folder, progress=False) == whole
    assert len(batches) == 4  # of six: two were kept


def test_evaluate_is_the_curve_and_refuses_in_one_line(tmp_path, embedded):
    tokens = load_corpus("default", embedded, 64, seq_len=32, seed=1)
    graph = build_graph(embedded, tokens, "block", attribution="gradient", progress=False)
    graph.save(tmp_path / "g")
    run = lambda *options: CliRunner().invoke(app, ["evaluate", str(tmp_path / "g"), "--n-tokens", "64", "--seq-len", "32", *options])  # noqa: E731
    done = run("--n-edges", "50", "--n-edges", "200", "--value", "zero", "--method", "greedy", "--out", str(tmp_path / "curve.csv"))
    assert done.exit_code == 0, done.output
    curve = ablation_curve(embedded, graph, tokens, [50, 200], value="zero", method="greedy", seed=1, progress=False)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "curve.csv"), curve, check_dtype=False)
    for options, words in {("--task", "sums"): "source must be one of ioi", ("--value", "corrupted"): "needs a Task", ("--n-edges", "-1"): "n must lie in", ("--method", "best"): "method must be", ("--out", str(tmp_path / "no" / "c.csv")): "a folder that exists"}.items():
        wrong = run(*options)
        assert wrong.exit_code == 2 and words in wrong.stderr.splitlines()[-1] and "Traceback" not in wrong.stderr, wrong.output


def test_communities_are_those_of_the_function(tmp_path):
    graph = build_graph(tiny_model("llama"), random_tokens(tiny_model("llama"), 2, 8, 0), "head", progress=False)
    graph.save(tmp_path / "g")
    run = lambda *options: CliRunner().invoke(app, ["communities", str(tmp_path / "g"), "--n-null", "3", *options])  # noqa: E731
    done = run("--method", "leiden", "--resolution", "1.2", "--seed", "4", "--out", str(tmp_path / "cut"))
    assert done.exit_code == 0, done.output
    cut = find_communities(graph, "leiden", resolution=1.2, seed=4)
    assert Graph.load(tmp_path / "cut").nodes["community"].tolist() == cut.nodes["community"].tolist()
    assert f"{cut.nodes['community'].max() + 1} communities" in done.stdout and "quality" in done.stdout
    for options, words in {("--method", "best"): "method must be", ("--resolution", "0"): "resolution must be", ("--n-null", "1"): "n_null", ("--out", str(tmp_path / "no" / "g")): "a folder that exists"}.items():
        wrong = run(*options)
        assert wrong.exit_code == 2 and words in wrong.stderr.splitlines()[-1] and "Traceback" not in wrong.stderr, wrong.output


def test_methods_are_compared_and_unknown_ones_refused(tmp_path, monkeypatch, embedded):
    monkeypatch.setattr("circuitgraph.model.load_model", lambda *_, **__: embedded)
    run = lambda *options: CliRunner().invoke(app, ["compare-methods", "--nodes", "block", "--n-prompts", "4", "--seq-len", "8", "--out", str(tmp_path / "methods.csv"), *options])  # noqa: E731
    done = run("--tasks", "ioi, text", "--methods", "EAP; random", "--n-edges", "50", "--n-edges", "400")
    assert done.exit_code == 0, done.output
    table = pd.read_csv(tmp_path / "methods.csv")
    assert set(table["method"]) == {"EAP", "random"} and set(table["task"]) == {"ioi", "text"} and set(table["ablation"]) == {"edge", "node"} and len(table) == 16
    assert (table[["seconds", "memory"]] > 0).all(axis=None) and not table["cpr"].isna().any() and table["spearman"].isna().all()
    for options, words in ((("--methods", "EAP;best"), "methods must be among"), (("--value", "zero"), "value must be"), (("--out", str(tmp_path / "no" / "m.csv")), "a folder that exists"), (("--tasks", "text", "--value", "corrupted", "--methods", "EAP"), "needs a Task")):
        wrong = run(*options)
        assert wrong.exit_code == 2 and words in wrong.stderr.splitlines()[-1] and "Traceback" not in wrong.stderr, wrong.output


def test_methods_are_ranked_against_exact_patching_measured_once(tmp_path, monkeypatch):
    model, calls = tiny_model("llama"), []
    task = Task(random_tokens(model, 3, 6), random_tokens(model, 3, 6, seed=7), answers=torch.arange(3)[:, None] + 3, wrong=torch.arange(3)[:, None] + 13, name="own")
    monkeypatch.setattr("circuitgraph.model.load_model", lambda *_, **__: model)
    monkeypatch.setattr("circuitgraph.task.load_task", lambda *_, **__: task)
    monkeypatch.setattr("circuitgraph.baseline.patch_edges", lambda *args, **options: calls.append(1) or patch_edges(*args, **options))
    for methods in ("EAP;exact patching", "EAP;random"):
        done = CliRunner().invoke(app, ["compare-methods", "--tasks", "own", "--nodes", "layer", "--methods", methods, "--n-edges", "5", "--n-seeds", "2", "--exact", str(tmp_path / "exact"), "--out", str(tmp_path / "m.csv")])
        assert done.exit_code == 0, done.output
    table = pd.read_csv(tmp_path / "m.csv")
    by_method = table.groupby("method")["spearman"].mean()
    saved = Graph.load(next((tmp_path / "exact").iterdir()))
    eap = build_graph(model, task, "layer", target="metric", attribution="eap", baseline="mean", progress=False)
    assert len(calls) == 2 and set(table["seed"]) == {0, 1} and np.isclose(by_method["EAP"], spearmanr(eap.edges["weight"].abs(), saved.edges["weight"].abs()).statistic, atol=1e-4) and abs(by_method["random"]) < by_method["EAP"] and np.isnan(by_method["exact patching"])


def test_a_graph_of_features_from_a_folder_of_dictionaries(tmp_path, monkeypatch, embedded):
    monkeypatch.setattr("circuitgraph.model.load_model", lambda *_, **__: embedded)
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(40, embedded.d_model, generator=generator)
    made = LinearDictionary("m1", "output", W.mT.contiguous(), W / W.norm(dim=1, keepdim=True), torch.zeros(40), torch.zeros(embedded.d_model), Gate("topk", k=4))
    save_dictionary(made, tmp_path / "dictionaries" / "m1", weights_hash=embedded.weights_hash)
    options = ["--n-tokens", "64", "--seq-len", "32"]
    done = CliRunner().invoke(app, ["build", "--nodes", str(tmp_path / "dictionaries"), "--keep", "20", "--out", str(tmp_path / "g"), *options])
    assert done.exit_code == 0, done.output
    graph = Graph.load(tmp_path / "g")
    assert graph.meta["nodes"] == "feature" and set(graph.meta["dictionaries"]) == {"m1"} and graph.edges["target"].value_counts().max() == 20
    judge = ["evaluate", str(tmp_path / "g"), "--n-edges", "50", "--value", "zero", *options]
    done = CliRunner().invoke(app, [*judge, "--dictionaries", str(tmp_path / "dictionaries"), "--out", str(tmp_path / "curve.csv")])
    assert done.exit_code == 0 and len(pd.read_csv(tmp_path / "curve.csv")) == 2, done.output
    done = CliRunner().invoke(app, judge)
    assert done.exit_code == 2 and "dictionaries must be those that the graph of features was built with" in done.stderr
