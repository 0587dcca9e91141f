"""Work that is killed at random moments and goes on, in processes forked from one that has everything."""

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

import pandas as pd
import torch

import circuitgraph as cg
from circuitgraph.methods.compare import Comparing, compare_methods, list_methods
from circuitgraph.methods.gates import GateConfig, search_gates
from circuitgraph.model.loading import tiny_model
from feature_oracles import all_dictionaries
from oracles import random_tokens
from savers import fork, wait

MODEL = tiny_model("llama", dtype=torch.float32)
TEXT = random_tokens(MODEL, 16, 16)
DICTIONARIES = all_dictionaries(MODEL)
EVERY = cg.Pruning(n_edges=None)


def kept(folder, **options):
    "How work is done whose unfinished part is kept."
    return cg.Run(checkpoint=folder / "unfinished", progress=False, **options)


def build_modules(folder):
    graph = cg.build_graph(MODEL, TEXT, "head", attribution="ig", run=kept(folder, batch_size=1))
    graph.save(folder / "graph")


def build_features(folder):
    run = kept(folder, memory=20_000)  # a dozen groups of readers
    cg.build_graph(MODEL, TEXT, DICTIONARIES, pruning=EVERY, run=run).save(folder / "graph")


def train(folder):
    config = cg.TrainConfig(d_dict=24, k=3, n_steps=60, batch_size=32)
    options = {"out": folder / "dictionaries", "checkpoint_every": 7, "n_workers": 1}
    cg.train_dictionaries(MODEL, TEXT, ["a0", "m1"], config, **options, run=cg.Run(progress=False))


def compare(folder):
    names = ("EAP", "flow", "random")
    methods = {name: list_methods("layer")[name] for name in names}
    how = Comparing(n_boot=20, out=folder / "rows.csv", progress=False)
    compare_methods(MODEL, TEXT[:8], TEXT[8:], methods, [3, 9], nodes="layer", comparing=how)


def find(folder):
    graph = cg.build_graph(MODEL, TEXT, "head", attribution="gradient", run=cg.Run(progress=False))
    for seed in range(5):
        cg.find_communities(graph, seed=seed).save(folder / "graph")


def label(folder):
    graph = cg.build_graph(MODEL, TEXT, DICTIONARIES, pruning=EVERY, run=cg.Run(progress=False))
    labelled = cg.label_nodes(graph, MODEL, TEXT, DICTIONARIES, run=kept(folder))
    labelled.save(folder / "graph")


def search(folder):
    judging = cg.Judging(run=kept(folder))
    found = search_gates(
        MODEL, TEXT[:4], "layer", [3, 6], config=GateConfig(n_steps=3), value="mean", judging=judging
    )
    found.save(folder / "graph")


WORK = {work.__name__: work for work in (build_modules, build_features, train, compare, find, label, search)}


def read_results(folder):
    "What work has left, but for what differs from run to run: the time that it took."
    results = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix in (".parquet", ".safetensors") and not name.startswith("unfinished"):
            results[name] = path.read_bytes()
        if path.name == "rows.csv":
            results[name] = pd.read_csv(path).drop(columns=["seconds", "memory"]).to_csv().encode()
    return results


def kill_and_go_on(home, name, n_kills, seed):
    "Do the work once whole, and once killed at random moments before its end: how often it was killed."
    work, rng = WORK[name], random.Random(seed)
    warm, whole, killed = (home / name / part for part in ("warm", "whole", "killed"))
    for folder in (warm, whole, killed):
        folder.mkdir(parents=True)
    work(warm)  # so that the processes that are forked have all that they import and compile
    started = time.monotonic()
    assert wait(fork(work, whole)) == 0
    seconds = time.monotonic() - started
    n_killed, latest = 0, 0.9 * seconds
    for _ in range(30):
        process = fork(work, killed)
        time.sleep(rng.uniform(0, latest))
        os.kill(process, signal.SIGKILL)
        n_killed += 1
        if wait(process) == 0:  # it had come to its end: begin anew, and kill sooner
            shutil.rmtree(killed)
            killed.mkdir()
            n_killed, latest = 0, latest / 2
        if n_killed == n_kills:
            break
    assert wait(fork(work, killed)) == 0
    expected, found = read_results(whole), read_results(killed)
    assert expected and expected.keys() == found.keys(), (sorted(expected), sorted(found))
    assert [path for path in expected if expected[path] != found[path]] == []
    return n_killed


def kill_all(home, n_kills, seed):
    "All work in turn: prints for each how often it was killed, or what went wrong."
    warnings.simplefilter("ignore")
    said = {}
    for name in WORK:
        try:
            said[name] = kill_and_go_on(Path(home), name, n_kills, seed)
        except Exception:
            said[name] = traceback.format_exc()
    sys.stdout.write(json.dumps(said))
