"""Properties that hold for any graph, any choice of edges and any padding, looked for by hypothesis."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitgraph as cg
from circuitgraph.model.loading import tiny_model
from feature_oracles import all_dictionaries
from oracles import random_tokens
from test_graph import PATIENT, WEIGHTS, make_graph, shards

pytestmark = pytest.mark.filterwarnings("ignore", "error:::circuitgraph")

QUIET = cg.Run(progress=False)
FEW = settings(deadline=None, max_examples=15, derandomize=True)
MODELS = {name: tiny_model(name, dtype=torch.float64) for name in ("gpt2", "llama", "gemma2")}
GRAINS = ("block", "layer", "head")
models, grains = st.sampled_from(sorted(MODELS)), st.sampled_from(GRAINS)
seeds = st.integers(0, 2**31 - 1)


def draw_tokens(name, seed, n=3, n_pos=6):
    return random_tokens(MODELS[name], n, n_pos, seed=seed)


# Graphs


@given(shards(2))
@PATIENT
def test_merging_is_commutative_but_for_the_order_of_texts(drawn):
    (a, b), _, parts = drawn
    one, other = a.merge(b), b.merge(a)
    size = np.abs(np.concatenate(parts)).max() + 1e-300
    for column in WEIGHTS:
        assert np.abs(one.edges[column] - other.edges[column]).max() <= 1e-12 * size
    assert one.edges["count"].equals(other.edges["count"])
    assert one.meta["corpus"] == other.meta["corpus"][::-1]


@given(shards(3), st.permutations(range(3)))
@PATIENT
def test_shards_merge_in_any_order_to_the_whole(drawn, order):
    graphs, ends, parts = drawn
    merged = graphs[order[0]]
    for i in order[1:]:
        merged = merged.merge(graphs[i])
    whole = make_graph(len(merged.nodes), ends, np.concatenate(parts))
    size = np.abs(np.concatenate(parts)).max() + 1e-300
    for column in WEIGHTS:
        assert np.abs(merged.edges[column] - whole.edges[column]).max() <= 1e-12 * size


@given(seeds, st.sampled_from(["top_edges", "threshold", "keep"]), st.integers(0, 30), st.booleans())
@FEW
def test_a_cut_graph_of_features_merges_with_none(seed, cut, n, is_first):
    model = MODELS["llama"]
    dictionaries = all_dictionaries(model)
    whole = cg.Pruning(n_edges=None)
    a, b = (
        cg.build_graph(model, draw_tokens("llama", seed + i), dictionaries, pruning=whole, run=QUIET)
        for i in range(2)
    )
    kept = {
        "top_edges": lambda: a.top_edges(n),
        "threshold": lambda: a.threshold(n / 100),
        "keep": lambda: a.keep(a.edge_names[:n]),
    }[cut]()
    pair = (kept, b) if is_first else (b, kept)
    with pytest.raises(ValueError, match=rf"before they are cut, but one has the step .{cut}\("):
        pair[0].merge(pair[1])


@given(st.sampled_from(["llama", "gemma2"]), grains, seeds)
@FEW
def test_shares_sum_to_one(name, grain, seed):
    "Of what a module without biases writes, all comes from what it reads: over its ports, shares sum to one."
    rule = cg.Attribution("ig", n_steps=64, skip_first=0)
    graph = cg.build_graph(MODELS[name], draw_tokens(name, seed), grain, attribution=rule, run=QUIET)
    into = graph.edges[graph.edges["target"] != "logits"].groupby("target", observed=True)["weight"].sum()
    assert len(into) > 1 and np.abs(into - 1).max() < 1e-6


# Masks


@st.composite
def masked(draw):
    "A model, its complete graph and some of its edges, with clean and corrupted texts."
    name, grain, seed = draw(models), draw(grains), draw(seeds)
    every = cg.complete_graph(MODELS[name], grain)
    kept = np.random.default_rng(seed).random(len(every)) < draw(st.sampled_from([0.1, 0.5, 0.9]))
    clean, corrupted = draw_tokens(name, seed), draw_tokens(name, seed + 1)
    return MODELS[name], every, kept, clean, corrupted


@given(masked())
@FEW
def test_with_all_edges_kept_it_is_the_model_and_with_none_it_is_the_ablated_values(drawn):
    model, every, _, clean, corrupted = drawn
    options = {"corrupted": corrupted, "value": "corrupted"}
    for graph, tokens in ((every, clean), (every.keep([]), corrupted)):
        logits = cg.run_ablated(model, graph, clean, **options)
        assert (logits - model(tokens)).abs().max() < 1e-5  # the original takes its norms in float32


@given(masked(), st.permutations(range(3)), st.integers(1, 3))
@FEW
def test_the_order_and_size_of_batches_make_no_difference(drawn, order, batch_size):
    model, every, kept, clean, corrupted = drawn
    graph = every.keep(kept)
    logits = cg.run_ablated(model, graph, clean, corrupted=corrupted, value="corrupted")
    moved = cg.run_ablated(model, graph, clean[order], corrupted=corrupted[order], value="corrupted")
    assert (moved - logits[order]).abs().max() < 1e-9
    task, other = (
        cg.Task(clean[rows], corrupted[rows], metric="ce", answers=clean[rows, :1])
        for rows in (range(3), order)
    )
    judged = [
        cg.evaluate(
            model,
            graph,
            data,
            value="corrupted",
            judging=cg.Judging(n_boot=2, run=cg.Run(size, progress=False)),
        )
        for data, size in ((task, 3), (other, batch_size))
    ]
    columns = list(judged[0].inputs.select_dtypes("number"))
    rows = [one.inputs[columns].to_numpy() for one in judged]
    assert len(columns) > 1 and np.allclose(rows[0][order], rows[1], rtol=1e-9, atol=1e-9)


@given(masked())
@FEW
def test_more_kept_edges_are_fewer_ablated_ones(drawn):
    "Cutting edges one set after the other is cutting both sets at once."
    model, every, kept, clean, corrupted = drawn
    options = {"corrupted": corrupted, "value": "corrupted"}
    twice = every.keep(kept).keep(kept[kept])
    one, other = (cg.run_ablated(model, graph, clean, **options) for graph in (every.keep(kept), twice))
    assert torch.equal(one, other)


# Padding


@st.composite
def prompts(draw):
    "Prompts of several lengths with their answers, and two ways to pad them."
    lengths = draw(st.lists(st.integers(3, 6), min_size=2, max_size=4))
    generator = torch.Generator().manual_seed(draw(seeds))
    texts = [[torch.randint(50, (n,), generator=generator) for n in lengths] for _ in range(2)]
    answers = torch.randint(50, (len(lengths), 1), generator=generator)
    form = st.tuples(st.sampled_from(["left", "right"]), st.integers(0, 4), st.integers(0, 49))
    return texts, answers, [draw(form) for _ in range(2)]


def pad(texts, answers, form):
    "A task of prompts, padded at one side by some more of a token."
    side, extra, token = form
    width = max(map(len, texts[0])) + extra
    rows, mask = [torch.full((len(texts[0]), width), token) for _ in range(2)], []
    for i, n in enumerate(map(len, texts[0])):
        place = slice(0, n) if side == "right" else slice(width - n, width)
        for padded, given_texts in zip(rows, texts, strict=True):
            padded[i, place] = given_texts[i]
        inside = torch.zeros(width, dtype=torch.bool)
        inside[place] = True
        mask.append(inside)
    return cg.Task(*rows, "ce", answers, mask=torch.stack(mask))


@given(prompts(), st.sampled_from(["head", "layer"]))
@FEW
def test_padding_makes_no_difference(drawn, grain):
    texts, answers, forms = drawn
    model = MODELS["llama"]
    graphs, scores = [], []
    for form in forms:
        task = pad(texts, answers, form)
        graph = cg.build_graph(model, task, grain, attribution="eap", target="metric", run=QUIET)
        judging = cg.Judging(n_boot=2, run=QUIET)
        graphs.append(graph.edges["weight"].to_numpy())
        scores.append(cg.evaluate(model, graph.top_edges(5), task, value="corrupted", judging=judging).inputs)
    assert np.allclose(*graphs, rtol=1e-9, atol=1e-12) and np.abs(graphs[0]).max() > 0
    assert np.allclose(*(one.select_dtypes("number").to_numpy() for one in scores), rtol=1e-9, atol=1e-9)
    alone = [
        pad([[text[i]] for text in texts], answers[i : i + 1], ("right", 0, 0)) for i in range(len(answers))
    ]
    each = [
        cg.build_graph(model, one, grain, attribution="eap", target="metric", run=QUIET).edges["weight"]
        for one in alone
    ]
    assert np.allclose(np.mean(each, axis=0), graphs[0], rtol=1e-8, atol=1e-12)
