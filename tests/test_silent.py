"""Silent features as readers: what keeps them silent has edges, and a graph with all edges is the model."""

from functools import partial

import numpy as np
import pytest
import torch

import circuitgraph.build.features
import test_feature_edges
from circuitgraph.ablation.judge import evaluate, run_ablated
from circuitgraph.attribution.method import Attribution
from circuitgraph.build.build import build_graph
from circuitgraph.build.features import weigh_features
from circuitgraph.build.prompt import Prompt
from circuitgraph.cut import cut_model, read_activity
from circuitgraph.data.task import Task
from circuitgraph.dictionary.protocol import FunctionDictionary, find_structure
from circuitgraph.graph.graph import merge_graphs
from circuitgraph.model.loading import tiny_model
from circuitgraph.options import Judging, Pruning, Run
from feature_oracles import all_dictionaries, draw
from oracles import random_tokens
from test_feature_edges import compare, norm_of, place_value, run_part

pytestmark = pytest.mark.filterwarnings("ignore", "error:::circuitgraph")

QUIET, EVERY = Run(progress=False), Pruning(n_edges=None)
GATES = ("topk", "abstopk", "relu", "jumprelu", "gated", "none")
PLACES = ("output", "input", "normed", "scaled", "stream")


def build(model, tokens, dictionaries, n_silent, **options):
    rule = Attribution(n_steps=2, skip_first=0, n_silent=n_silent, **options)
    return build_graph(model, tokens, dictionaries, attribution=rule, pruning=EVERY, run=QUIET)


def even_tokens(model, dictionaries):
    """A text in which each feature fires where a token follows, or never.

    The reader `logits` has no value at the end of a sequence, so what fires there alone has no edge to it."""
    for seed in range(50):
        tokens = random_tokens(model, 4, 8, seed)
        codes = [acts != 0 for acts in cut_model(model, dictionaries).trace(tokens).acts.values()]
        if all((fires[:, :-1].flatten(0, 1).any(0) >= fires[:, -1].any(0)).all() for fires in codes):
            return tokens
    raise AssertionError("no such text")


def gap_to_model(model, graph, tokens, dictionaries, value="mean"):
    "The largest difference of logits that predict a token of the text, relative to the largest logit."
    own = model(tokens)[:, :-1]
    cut = run_ablated(model, graph, tokens, value=value, dictionaries=dictionaries)[:, :-1]
    return float((cut - own).abs().max() / own.abs().max())


SETTINGS = [(gate, "output") for gate in GATES] + [("topk", place) for place in PLACES[1:]]


@pytest.mark.parametrize(("gate", "reads"), [*SETTINGS, ("relu", "normed"), ("jumprelu", "input")], ids=str)
@torch.no_grad()
def test_with_all_readers_and_edges_a_graph_is_the_model(gate, reads):
    for name, dtype, tolerance in (("gpt2", torch.float64, 1e-12), ("llama", torch.float32, 1e-4)):
        model = tiny_model(name, dtype=dtype)
        dictionaries = all_dictionaries(model, gate=gate, reads=reads)
        tokens = even_tokens(model, dictionaries)
        graph = build(model, tokens, dictionaries, None)
        for value in ("mean", "zero"):
            assert gap_to_model(model, graph, tokens, dictionaries, value) < tolerance


@torch.no_grad()
def test_of_other_architectures_too():
    for name in ("gemma2", "gpt-neox"):  # norms after modules, soft caps; parallel layers
        model = tiny_model(name, dtype=torch.float32)
        dictionaries = all_dictionaries(model)
        tokens = even_tokens(model, dictionaries)
        assert gap_to_model(model, build(model, tokens, dictionaries, None), tokens, dictionaries) < 1e-4


@pytest.mark.parametrize("reads", PLACES)
@torch.no_grad()
def test_with_active_readers_alone_it_is_not(reads):
    model = tiny_model("gpt2", dtype=torch.float64)
    tokens, dictionaries = random_tokens(model, 3, 7), all_dictionaries(model, reads=reads)
    assert gap_to_model(model, build(model, tokens, dictionaries, 0), tokens, dictionaries) > 1e-2


def test_the_whole_graph_is_faithful():
    model = tiny_model("llama", dtype=torch.float64)
    tokens, dictionaries = random_tokens(model, 3, 7), all_dictionaries(model)
    options = {"dictionaries": dictionaries, "judging": Judging(metric="kl", run=QUIET)}
    found = evaluate(model, build(model, tokens, dictionaries, None), tokens, **options)
    assert abs(found.faithfulness - 1) < 1e-6 and found.kl < 1e-9


def values_with_silent(n_silent, model, part, read, of_active=test_feature_edges.module_values):
    "The values of active nodes, and the pre-activations of silent features that are to read."
    y, values = of_active(model, part, read)
    d = part.dictionary
    if d is None:
        return y, values
    scale, known = norm_of(model, part, read), find_structure(d)
    post = run_part(model, part, [read] * 3, read, scale, None)[1]

    def pre(xs):
        out = run_part(model, part, xs, read, scale, post)[0]
        return place_value(model, part, xs[-1], xs[:3], scale, out) @ known.W_enc + known.b_enc

    clean = pre([read] * 4)
    slope = torch.ones(d.d_dict) if d.gate.r_mag is None else d.gate.r_mag.exp()
    height = clean.abs() if d.gate.kind == "abstopk" else clean
    acts = known.gate(clean)
    for p in range(len(read)):
        silent = [j for j in range(d.d_dict) if acts[p, j] == 0]
        silent.sort(key=lambda j: -float(height[p, j]))
        for j in silent[:n_silent]:
            values[f"{part.module}/{j}"][p] = lambda xs, p=p, j=j: slope[j] * pre(xs)[p, j]
    return y, values


AUTODIFF = [
    ("llama", {}, {}, ("a0", "m0", "a1", "m1")),
    ("llama", {"gate": "abstopk"}, {"ports": "merged"}, ("m0", "a1")),
    ("gemma2", {"gate": "gated"}, {}, ("m0", "a1")),
    ("qwen2", {"reads": "stream", "gate": "relu"}, {}, ("m0", "a1")),
    ("qwen2", {"reads": "normed"}, {}, ("a1", "m1")),
    ("gpt2", {"reads": "scaled", "gate": "jumprelu"}, {"ports": "merged"}, ("a1", "m1")),
    ("gpt2", {"reads": "input"}, {}, ("a1", "m1")),
    ("gpt2", {}, {"attribution": "gradient"}, ("a1.h0", "m1")),
]


@pytest.mark.parametrize("n_silent", [2, None])
@pytest.mark.parametrize(("name", "options", "rule", "modules"), AUTODIFF, ids=str)
def test_weights_are_gradients_of_preactivations(monkeypatch, n_silent, name, options, rule, modules):
    model = tiny_model(name, dtype=torch.float64)
    dictionaries = {module: draw(model, module, **options) for module in modules}
    monkeypatch.setattr(test_feature_edges, "module_values", partial(values_with_silent, n_silent))
    compare(
        model,
        random_tokens(model, 2, 4),
        dictionaries,
        Attribution(**{"n_steps": 2, "n_silent": n_silent} | rule),
    )


def test_an_encoder_of_z():
    model = tiny_model("qwen2", dtype=torch.float64)
    dictionaries = {"m0": draw(model, "m0"), "a1": draw(model, "a1", reads="z")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_feature_edges, "module_values", partial(values_with_silent, None))
        compare(model, random_tokens(model, 2, 4), dictionaries, Attribution(n_steps=2, n_silent=None))


def test_every_feature_of_any_gate_reads_as_one_without_gate():
    "With all silent features, the gate of the last module makes no difference to what its features read."
    model = tiny_model("llama", dtype=torch.float64)
    tokens, tables = random_tokens(model, 3, 7), []
    for gate in ("none", "topk", "relu", "jumprelu"):
        graph = build(model, tokens, {"m1": draw(model, "m1", gate=gate)}, None)
        features = graph.edges["target"].isin([f"m1/{j}" for j in range(6)])
        tables.append(graph.edges[features].set_index(["source", "target", "port"])["weight"].sort_index())
    assert len(tables[0]) == 6 * 4  # of embed, a0, m0 and a1; there are no biases
    for table in tables[1:]:
        assert np.allclose(table, tables[0].reindex(table.index), rtol=1e-9) and len(table) == len(tables[0])


def test_blocks_groups_and_plain_products_change_nothing(monkeypatch):
    model = tiny_model("llama", dtype=torch.float64)
    tokens, dictionaries = random_tokens(model, 3, 6), all_dictionaries(model)
    rule, cut = Attribution(n_steps=2, n_silent=None), cut_model(model, dictionaries)
    keys = ["source", "target", "port"]

    def weigh(**options):
        edges = weigh_features(cut, tokens, rule, pruning=EVERY, run=Run(progress=False, **options))[1]
        return edges.astype(dict.fromkeys(keys, str)).sort_values(keys).reset_index(drop=True)

    whole = weigh()
    ways = [("_silent_bytes", lambda *_: 1e8), ("is_compiled", lambda _: False)]  # three features a block
    for name, way in ways:
        with monkeypatch.context() as patch:
            patch.setattr(circuitgraph.build.features, name, way)
            other = weigh()
        assert other[keys].equals(whole[keys])
        assert np.allclose(other["abs_weight"], whole["abs_weight"], rtol=1e-9)
    other = weigh(memory=8_000, batch_size=1)  # groups of some readers
    assert other[keys].equals(whole[keys]) and np.allclose(
        other["abs_weight"], whole["abs_weight"], rtol=1e-9
    )


@torch.no_grad()
def test_nodes_stay_and_edges_of_active_readers_are_part():
    model = tiny_model("llama", dtype=torch.float64)
    tokens, dictionaries = random_tokens(model, 3, 7), all_dictionaries(model)
    graphs = [build(model, tokens, dictionaries, n) for n in (0, 2, 4, 99, None)]
    measures = ["name", "frequency", "mean_activation"]
    for graph in graphs[1:]:
        assert graph.nodes[measures].equals(graphs[0].nodes[measures])
    counts = [graph.edges["count"].sum() for graph in graphs]
    assert counts[0] < counts[1] < counts[2] <= counts[3] == counts[4]
    assert graphs[3].edges.equals(graphs[4].edges)


def test_fewer_silent_features_than_asked_for_are_no_readers_twice():
    model = tiny_model("llama", dtype=torch.float64)
    parts = cut_model(model, {"m0": draw(model, "m0", gate="relu")}).parts[:-1]
    tokens = random_tokens(model, 2, 5)
    activity = read_activity(model, tokens, parts, n_silent=5)
    part = next(part for part in parts if part.module == "m0")
    output = activity.dense["m0"] + part.structure.b_dec
    index, value = activity.index["m0"], activity.value["m0"]
    output = output + torch.einsum("nk, nkd -> nd", value, part.structure.W_dec[index])
    acts = part.dictionary.encode(output)
    for position, silent in enumerate(activity.silent["m0"].tolist()):
        expected = {j for j in range(6) if acts[position, j] == 0}
        listed = [j for j in silent if j >= 0]
        assert len(set(listed)) == len(listed) == min(5, len(expected)) and set(listed) <= expected


def test_the_option_is_recorded_and_graphs_of_other_options_stay_apart(tmp_path):
    model = tiny_model("llama", dtype=torch.float64)
    first, second = random_tokens(model, 2, 6), random_tokens(model, 2, 6, seed=5)
    dictionaries = {"m1": draw(model, "m1")}
    graphs = {n: build(model, first, dictionaries, n) for n in (0, 2, None)}
    recorded = {n: graph.meta.get("n_silent") for n, graph in graphs.items()}
    assert recorded == {0: None, 2: 2, None: "all"}
    for n, graph in graphs.items():
        for m in graphs:
            if m == n:
                assert len(merge_graphs(graph, build(model, second, dictionaries, m)).meta["corpus"]) == 2
                continue
            with pytest.raises(ValueError, match="graphs to merge must agree in 'n_silent'"):
                merge_graphs(graph, build(model, second, dictionaries, m))
    folder = tmp_path / "unfinished"
    for n in graphs:
        options = {"pruning": EVERY, "run": Run(checkpoint=folder, progress=False)}
        rule = Attribution(n_steps=2, skip_first=0, n_silent=n)
        if n == 0:
            build_graph(model, first, dictionaries, attribution=rule, **options)
            continue
        with pytest.raises(ValueError, match="belongs to a run with another"):
            build_graph(model, first, dictionaries, attribution=rule, **options)


def test_where_silent_features_can_not_read_they_are_refused():
    model = tiny_model("llama", dtype=torch.float64)
    tokens, dictionaries = random_tokens(model, 2, 6), {"m1": draw(model, "m1")}
    curved = FunctionDictionary("m0", "output", model.d_model, torch.sinh, torch.asinh)
    with pytest.raises(ValueError, match="n_silent must be at least 0, or None"):
        Attribution(n_silent=-1)
    with pytest.raises(ValueError, match="n_silent must be 0 with attribution='guided-backprop', got None"):
        Attribution("guided-backprop", n_silent=None)
    with pytest.raises(ValueError, match="n_silent must be 0 with FunctionDictionary"):
        build(model, tokens, {"m0": curved}, 3)
    with pytest.raises(ValueError, match="n_silent must be 0 for a graph that has modules as nodes, got 3"):
        build(model, tokens, "head", 3)
    with pytest.raises(ValueError, match="n_silent must be 0 for a graph that keeps positions"):
        build(model, Prompt(tokens[:1]), dictionaries, 3)
    task = Task(tokens, tokens, metric=lambda logits: logits[:, -1, 0])
    rule = Attribution(n_silent=3)
    with pytest.raises(ValueError, match="n_silent must be 0 for a task's metric, got 3"):
        build_graph(model, task, dictionaries, attribution=rule, target="metric", run=QUIET)


def test_without_a_gate_nothing_is_silent():
    model = tiny_model("llama", dtype=torch.float64)
    tokens, dictionaries = random_tokens(model, 2, 6), {"m1": draw(model, "m1", gate="none")}
    whole, active = (build(model, tokens, dictionaries, n) for n in (None, 0))
    assert whole.edges.equals(active.edges)
