"""Small graphs found by gates of nodes: known circuits, budgets, stopped searches, refusals."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import known
from circuitgraph.ablation.judge import evaluate, open_judge
from circuitgraph.ablation.modules import run_module_selections
from circuitgraph.ablation.selection import ModuleSelection, select
from circuitgraph.ablation.values import AblatedText, Mean, Resample
from circuitgraph.build.build import complete_graph
from circuitgraph.cut import cut_model
from circuitgraph.data.task import Task
from circuitgraph.methods.gates import GateConfig, _take_one_length, list_stages, search_gates
from circuitgraph.model.blocks import run_logits
from circuitgraph.model.loading import tiny_model
from circuitgraph.options import Judging, Run
from oracles import random_tokens

QUIET = Judging(run=Run(progress=False))


@pytest.mark.parametrize("value", ["mean", "corrupted"])
@pytest.mark.parametrize("name", ["chain", "induction", "reverse", "sort", "gates", "copy_previous", "count"])
def test_as_many_edges_as_a_known_circuit_has_are_faithful(name, value):
    made = getattr(known, name)()
    n_edges = len(made.edges)
    graph = search_gates(made.model, made.task, n_edges=[n_edges], value=value, judging=QUIET)
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
    search_gates(made.model, made.task, n_edges=[30], config=config, judging=judging)
    first = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    resumed = search_gates(made.model, made.task, n_edges=[30, 8], config=config, judging=judging)
    both = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert 0 < len(first) < len(both)
    assert resumed.edges.equals(whole.edges)
    other = Judging(seed=1, run=Run(progress=False, checkpoint=tmp_path))
    search_gates(made.model, made.task, n_edges=[30, 8], config=config, judging=other)
    assert len(list(tmp_path.iterdir())) == 2 * len(both)


def test_another_corruption_or_start_is_another_search(tmp_path):
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


def test_the_first_order_comes_from_text_without_padding():
    model = tiny_model("llama")
    clean, corrupted = (random_tokens(model, 5, 9, seed=seed) for seed in (1, 2))
    task = Task(
        clean, corrupted, lengths=torch.tensor([9, 6, 6, 6, 9]), metric=lambda logits: logits[:, 0, 0]
    )
    text = _take_one_length(open_judge(cut_model(model, "head"), task, "corrupted").data)
    assert torch.equal(text, clean[1:4, :6])


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


def test_stages_shrink_by_no_more_than_they_may():
    stages = list_stages([100, 1_000], 20_000, 0.3)
    assert {100, 1_000} < set(stages)
    assert all(small >= 0.3 * large - 1 for large, small in zip([20_000, *stages], stages, strict=False))


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
        ({"shrink": 0}, "shrink"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GateConfig(**options)
