"""Small graphs found by gates of nodes: known circuits, budgets, stopped searches, refusals."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import known
from circuitgraph.ablation.judge import evaluate, open_judge
from circuitgraph.ablation.modules import run_module_selections
from circuitgraph.ablation.selection import ModuleSelection, select
from circuitgraph.ablation.values import AblatedText, Corrupted, Mean, Resample, Zero
from circuitgraph.build.build import complete_graph
from circuitgraph.cut import cut_model
from circuitgraph.graph.graph import Graph
from circuitgraph.methods.gates import GateConfig, GateSearch, ablated_stream, order_by_influence
from circuitgraph.methods.gates import order_nodes, run_gated, search_gates
from circuitgraph.model.blocks import run_logits
from circuitgraph.model.loading import TINY_MODELS, tiny_model
from circuitgraph.options import Judging, Run
from oracles import random_tokens

QUIET = Judging(run=Run(progress=False))
SPARSE = GateConfig(surplus=8)  # known circuits use few of the edges between their nodes


@pytest.mark.parametrize("value", ["mean", "corrupted"])
@pytest.mark.parametrize("name", ["chain", "induction", "reverse", "sort", "gates", "copy_previous", "count"])
def test_as_many_edges_as_a_known_circuit_has_are_faithful(name, value):
    made = getattr(known, name)()
    n_edges = len(made.edges)
    graph = search_gates(made.model, made.task, n_edges=[n_edges], value=value, config=SPARSE, judging=QUIET)
    by_cross_entropy = Judging(metric="ce", run=Run(progress=False))
    judged = evaluate(made.model, graph.top_edges(n_edges), made.task, value=value, judging=by_cross_entropy)
    drawn = np.random.default_rng(0).permutation(len(graph)) < n_edges
    null = evaluate(made.model, graph.keep(drawn), made.task, value=value, judging=by_cross_entropy)
    assert judged.faithfulness > 0.99
    assert null.faithfulness < 0.5


def test_larger_budgets_hold_smaller_ones():
    made = known.induction()
    graph = search_gates(made.model, made.task, n_edges=[10, 40, 20], judging=QUIET)
    small, middle, large = (set(graph.top_edges(n).edge_names) for n in (10, 20, 40))
    assert small < middle < large
    assert not any(name.startswith("const") for name in large)


def test_a_stopped_search_goes_on_to_the_same_bits(tmp_path):
    made, config = known.chain(), GateConfig(n_steps=4)
    whole = search_gates(made.model, made.task, n_edges=[30, 8], config=config, judging=QUIET)
    judging = Judging(run=Run(progress=False, checkpoint=tmp_path))
    search_gates(made.model, made.task, n_edges=[8], config=config, judging=judging)
    first = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    resumed = search_gates(made.model, made.task, n_edges=[30, 8], config=config, judging=judging)
    both = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert 0 < len(first) < len(both)
    assert resumed.edges.equals(whole.edges)
    other = Judging(seed=1, run=Run(progress=False, checkpoint=tmp_path))
    search_gates(made.model, made.task, n_edges=[30, 8], config=config, judging=other)
    assert len(list(tmp_path.iterdir())) == 2 * len(both)


def test_another_corruption_is_another_search(tmp_path):
    made, config = known.chain(), GateConfig(n_steps=2, n_scored=2)
    judging = Judging(run=Run(progress=False, checkpoint=tmp_path))
    options = {"n_edges": [40], "config": config, "value": "corrupted", "judging": judging}
    search_gates(made.model, made.task, **options)
    n_kept = len(list(tmp_path.iterdir()))
    other = replace(made.task, corrupted=made.task.corrupted.roll(1, 0))
    searched = search_gates(made.model, other, **options)
    assert len(list(tmp_path.iterdir())) == 2 * n_kept
    alone = search_gates(made.model, other, **(options | {"judging": QUIET}))
    assert searched.edges.equals(alone.edges)


@pytest.mark.parametrize("value", [Mean(), Mean(n_apart=1), Zero(), Resample(), Corrupted()])
@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("grain", ["block", "layer", "head"])
def test_gates_are_masks_that_are_alike_for_all_edges_out_of_a_node(name, grain, value):
    model = tiny_model(name)
    cut, every = cut_model(model, grain), complete_graph(model, grain)
    tokens, corrupted = (random_tokens(model, 3, 7, seed=seed) for seed in (1, 2))
    fixed = value.fix(cut, AblatedText(tokens, corrupted))
    source = torch.tensor(every.edges["source"].cat.codes.to_numpy(), dtype=torch.long)
    is_const = torch.tensor((every.nodes["name"] == "const").to_list())
    gates = torch.rand(len(every.nodes), generator=torch.Generator().manual_seed(0), dtype=model.dtype)
    gates[is_const] = 1
    results = []
    for as_mask in (False, True):
        given = gates.clone().requires_grad_()
        if as_mask:
            mask = given[source]
            (stream,) = run_module_selections(cut, [ModuleSelection(mask, len(mask))], tokens, fixed)
        else:
            stream = run_gated(cut, given, tokens, ablated_stream(cut, fixed))
        (gradient,) = torch.autograd.grad(stream.square().sum(), given)
        results.append((stream.detach(), gradient[~is_const]))
    for of_gates, of_mask in zip(*results, strict=True):
        torch.testing.assert_close(of_gates, of_mask, rtol=1e-9, atol=1e-10)


def test_nodes_of_a_known_circuit_come_first():
    made = known.chain()
    every, cut = complete_graph(made.model, "head"), cut_model(made.model, "head")
    judge = open_judge(cut, made.task, "mean", replace(QUIET, metric="kl"))
    search = GateSearch([judge], every, GateConfig())
    order = order_nodes(search)
    assert set(every.nodes["name"].iloc[order[:3]]) == {"m0", "m1", "m2"}
    assert len(order) == int((~search.is_open).sum()) == len(set(order.tolist()))


@pytest.mark.parametrize("value", [Mean(), Resample()])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_a_support_changes_neither_logits_nor_gradients(name, value):
    model = tiny_model(name)
    cut, tokens = cut_model(model, "head"), random_tokens(model, 3, 9)
    whole = complete_graph(model)
    drawn = torch.rand(len(whole), generator=torch.Generator().manual_seed(0)).numpy() < 0.7
    kept = select(cut, whole.keep(drawn)).mask
    fixed = value.fix(cut, AblatedText(tokens))
    results = []
    for support in (None, kept):
        mask = kept.to(model.dtype).requires_grad_()
        (stream,) = run_module_selections(cut, [ModuleSelection(mask, 1, support)], tokens, fixed)
        logits = run_logits(model, stream)
        (gradient,) = torch.autograd.grad(logits.log_softmax(-1)[..., 0].sum(), mask)
        results.append((logits.detach(), gradient[kept]))
    for without, given in zip(*results, strict=True):
        torch.testing.assert_close(given, without, rtol=1e-10, atol=1e-12)
    assert results[0][1].abs().max() > 1e-6


@pytest.mark.parametrize("n_edges", [[0], [10_000], [5, -1]])
def test_budgets_out_of_range_are_refused(n_edges):
    made = known.chain()
    with pytest.raises(ValueError, match="n_edges must lie in"):
        search_gates(made.model, made.task, n_edges=n_edges, judging=QUIET)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_steps": 0}, "n_steps"),
        ({"surplus": 0.9}, "surplus"),
        ({"rate": 1}, "rate"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GateConfig(**options)


def test_a_search_can_start_from_the_influence_in_a_graph():
    made = known.chain()
    every = complete_graph(made.model, "head")
    is_true = np.isin(every.edge_names, made.edges)
    weights = {name: np.where(is_true, 1.0, 0.1) for name in ("weight", "abs_weight", "rms_weight")}
    known_graph = Graph(every.nodes, every.edges.assign(**weights), every.meta)
    order = order_by_influence(every, known_graph)
    names = every.nodes["name"]
    assert set(names.iloc[order[:3]]) == {"m0", "m1", "m2"}
    ranked = sorted(names[~names.isin(["embed", "pos_embed", "const", "logits"])])
    assert sorted(names.iloc[order]) == ranked
    lacking = Graph(
        every.nodes[names != "m1"].reset_index(drop=True),
        every.edges[(every.edges["source"] != "m1") & (every.edges["target"] != "m1")].assign(weight=1.0),
        every.meta,
    )
    with pytest.raises(ValueError, match="start must hold every head and MLP of the model, and lacks m1"):
        search_gates(made.model, made.task, n_edges=[4], start=lacking, judging=QUIET)
