"""No result depends on the padding of a task's prompts: its side, its amount, its token or its presence."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

import circuitgraph as cg
from circuitgraph.community.behaviour import Matching, match_behaviours, task_behaviours
from circuitgraph.community.search import find_communities
from circuitgraph.data.task import Task
from circuitgraph.methods.compare import list_methods
from circuitgraph.model.loading import tiny_model
from feature_oracles import all_dictionaries

pytestmark = pytest.mark.filterwarnings("ignore", "error:::circuitgraph")

LENGTHS = [6, 4, 6, 5, 4, 5]
QUIET = cg.Run(progress=False)
JUDGING = cg.Judging(n_boot=5, run=QUIET)


def prompts():
    draw = torch.Generator().manual_seed(3)
    clean, corrupted = ([torch.randint(50, (n,), generator=draw) for n in LENGTHS] for _ in range(2))
    answers = torch.randint(50, (len(LENGTHS), 2), generator=draw)
    return clean, corrupted, answers[:, :1], answers[:, 1:]


def padded(side="right", extra=0, token=0, metric="logit_diff"):
    clean, corrupted, answers, wrong = prompts()
    width = max(LENGTHS) + extra
    rows = {"clean": clean, "corrupted": corrupted}
    tokens = {name: torch.full((len(LENGTHS), width), token) for name in rows}
    mask = torch.zeros(len(LENGTHS), width, dtype=torch.bool)
    for i, n in enumerate(LENGTHS):
        place = slice(0, n) if side == "right" else slice(width - n, width)
        mask[i, place] = True
        for name, texts in rows.items():
            tokens[name][i, place] = texts[i]
    return Task(tokens["clean"], tokens["corrupted"], metric, answers, wrong, mask=mask)


FORMS = [{"extra": 7}, {"token": 41, "extra": 2}, {"side": "left"}, {"side": "left", "extra": 5, "token": 9}]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def one_by_one(task):
    "The same prompts as tasks of one prompt each, which have no padding."
    for i, n in enumerate(LENGTHS):
        parts = {name: getattr(task, name)[i : i + 1] for name in ("answers", "wrong")}
        yield Task(task.clean[i : i + 1, :n], task.corrupted[i : i + 1, :n], task.metric, **parts)


def weights(graph):
    return graph.edges.set_index(["source", "target", "port"])[["weight", "abs_weight", "rms_weight"]]


def same(a, b):
    "Two graphs agree in nodes and edges."
    pd.testing.assert_frame_equal(a.nodes, b.nodes, rtol=1e-9, check_exact=False)
    pd.testing.assert_frame_equal(weights(a), weights(b), rtol=1e-9, check_exact=False)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_task_has_one_form(form):
    "What all functions below are given is the same to the bit, so the padding can't matter to any of them."
    task, again = padded(), padded(**form)
    for field in dataclasses.fields(Task):
        ours, theirs = getattr(task, field.name), getattr(again, field.name)
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


METHODS = [  # those that average over prompts or positions; AtP takes the weaker of two averages
    "EAP",
    "EAP-IG",
    "flow",
    "flow, no checkpoints",
    "IG of values",
    "gradient of values",
    "GradCAM",
]


@pytest.mark.parametrize("name", METHODS)
def test_scores_are_those_of_prompts_by_themselves(model, name):
    "The mean over prompts (of a metric) or positions (of values) is that of graphs of single prompts."
    task = padded()
    whole = list_methods("head", "corrupted")[name](model, task, "head", progress=False)
    alone = [
        list_methods("head", "corrupted")[name](model, one, "head", progress=False)
        for one in one_by_one(task)
    ]
    of_values = "values" in name or "flow" in name
    size = np.array(LENGTHS, float) - ("flow" in name) if of_values else np.ones(len(LENGTHS))
    by_prompt = np.stack([graph.edges["weight"] for graph in alone])
    to_logits = (whole.edges["target"] == "logits").to_numpy() & ("values" in name)
    for rows, n in ((~to_logits, size), (to_logits, size - 1)):
        expected = n / n.sum() @ by_prompt
        assert np.allclose(whole.edges["weight"][rows], expected[rows], rtol=1e-7, atol=1e-10)


def test_nodes_of_a_metric_graph_are_measured_on_tokens(model):
    task = padded()
    for nodes in ("head", all_dictionaries(model)):
        graphs = [
            cg.build_graph(model, one, nodes, attribution="eap", target="metric", run=QUIET)
            if nodes == "head"
            else cg.build_graph(model, one, nodes, target="metric", run=QUIET)
            for one in (task, *one_by_one(task))
        ]
        whole, *alone = [graph.nodes.set_index("name")[["frequency", "mean_activation"]] for graph in graphs]
        share = np.ones(len(LENGTHS)) if nodes == "head" else np.array(LENGTHS, float)
        share /= share.sum()
        expected = sum(s * table.drop(index="logits") for s, table in zip(share, alone, strict=True))
        got = whole.drop(index="logits")
        if nodes != "head":  # the first position of each prompt is left out
            share = np.array(LENGTHS, float) - 1
            share /= share.sum()
            expected = sum(s * table.drop(index="logits") for s, table in zip(share, alone, strict=True))
        pd.testing.assert_frame_equal(got, expected, rtol=1e-9, check_exact=False)


@pytest.mark.parametrize("value", ["zero", "corrupted", "mean"])
def test_judging_is_that_of_prompts_by_themselves(model, value):
    task = padded()
    graph = cg.complete_graph(model, "head")
    graph = graph.keep(np.random.default_rng(0).random(len(graph)) < 0.6)
    judged = cg.evaluate(model, graph, task, value=value, judging=JUDGING)
    reference = torch.cat([one.clean for one in one_by_one(task) if one.clean.shape[1] == 6])
    if value == "mean":
        value = cg.Mean(reference)
        judged = cg.evaluate(model, graph, task, value=value, judging=JUDGING)
    alone = [cg.evaluate(model, graph, one, value=value, judging=JUDGING).inputs for one in one_by_one(task)]
    pd.testing.assert_frame_equal(judged.inputs, pd.concat(alone, ignore_index=True), rtol=1e-6)


def test_behaviours_do_not_count_padding(model):
    task = padded()
    text, masks = task_behaviours({"first": task, "other": padded(metric="ce")})
    assert text.lengths.tolist() == [n + 1 for n in LENGTHS] * 2
    graph = cg.build_graph(model, text.tokens[:, :4], "head", run=QUIET)
    graph = find_communities(graph, seed=0)
    matching = Matching(n_controls=2, n_permutations=9)
    table = match_behaviours(model, graph, text, masks, value="zero", matching=matching, run=QUIET)
    wide = dataclasses.replace(
        text,
        tokens=torch.nn.functional.pad(text.tokens, (0, 3), value=7),
        document=torch.nn.functional.pad(text.document, (0, 3)),
    )
    wide_masks = {name: torch.nn.functional.pad(mask, (0, 3)) for name, mask in masks.items()}
    again = match_behaviours(model, graph, wide, wide_masks, value="zero", matching=matching, run=QUIET)
    pd.testing.assert_frame_equal(table, again, rtol=1e-5)
    with pytest.raises(ValueError, match="unequal lengths and are padded"):
        cg.build_graph(model, text, "head", run=QUIET)
