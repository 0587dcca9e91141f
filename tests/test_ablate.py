"""Edge ablation between modules: a reader-by-reader reference, recomputed scores, known models."""

# ruff: noqa: ARG005  (the requests of a table all take the same arguments)
import functools
import itertools
import math
import random

import numpy as np
import pandas as pd
import pytest
import torch

from circuitgraph.ablation.judge import area_between, bootstrap, faithfulness
from circuitgraph.ablation.selection import draw_among_nodes, select
from circuitgraph.ablation.values import permute_rows
from circuitgraph.build.build import complete_graph
from circuitgraph.cut import cut_model, open_cut
from circuitgraph.data.corpus import Corpus, load_corpus
from circuitgraph.graph.graph import Graph
from circuitgraph.graph.select import select_edges
from circuitgraph.model.blocks import run_logits
from circuitgraph.model.loading import TINY_MODELS, load_model, tiny_model
from circuitgraph.model.modules import trace_modules
from circuitgraph.names import GRAINS, VALUES
from circuitgraph.data.task import Task
from known import KNOWN
from oracles import ablate_by_hand, mean_by_hand, random_tokens, written_tokens, writes_by_hand
from short import ablation_curve, build_graph, compare_curves, evaluate, minimality, run_ablated

pytestmark = pytest.mark.filterwarnings(
    "ignore", "error:::circuitgraph"
)  # transformers and TransformerLens warn while they boot a model; what this package causes is an error

EXACT, WHOLE = (
    1e-11,
    1e-5,
)  # two derivations in float64; the model's own code, whose norms are float32 in some architectures
CASES = list(itertools.product(TINY_MODELS, GRAINS))
SLOW_CASES = [
    (name, grain) for name, grain in CASES if grain == "head" or name in ("gpt2", "gpt-neox", "gemma2")
]
# biases, parallel blocks, norms after modules; all cases are held against the same reference where they
# are whole, empty, or have their patterns frozen
tiny, known = functools.cache(tiny_model), functools.cache(lambda name: KNOWN[name]())
every_edge = functools.cache(
    lambda name, grain, ports="split": complete_graph(tiny(name), grain, ports=ports)
)


def draw_tokens(model, n_seq=2, seed=1):
    return random_tokens(model, n_seq, 7, seed)


def settings(model, grain, tokens):
    """Every way to fill cut edges: options of the package, and the ablated values by the reference."""
    other, text, n_pos = (
        random_tokens(model, *tokens.shape, seed=2),
        random_tokens(model, 3, tokens.shape[1] + 2, seed=3),
        tokens.shape[1],
    )
    yield {"value": "zero"}, None
    yield {"value": "corrupted", "corrupted": other}, writes_by_hand(model, grain, other)
    yield {"value": "resample", "seed": 4}, writes_by_hand(model, grain, permute_rows(tokens, 4))
    yield {"value": "mean"}, mean_by_hand(model, grain, tokens)
    yield {"value": "mean", "reference": text}, mean_by_hand(model, grain, text)
    yield {"value": "mean", "per_position": True}, mean_by_hand(model, grain, tokens, n_pos)
    yield {"value": "mean", "per_position": True, "reference": text}, mean_by_hand(model, grain, text, n_pos)


def gap(a, b):
    return (a - b).abs().max().item()


def but(graph, edges):
    return graph.keep(~np.isin(graph.edge_names, list(edges)))


@torch.no_grad()
@pytest.mark.parametrize("name, grain", CASES)
def test_all_edges_kept_is_the_model_and_none_the_ablated_values(name, grain):
    model, every = tiny(name), every_edge(name, grain)
    tokens = draw_tokens(model, 3)
    for ours, ablated in settings(model, grain, tokens):
        assert gap(run_ablated(model, every, tokens, **ours), model(tokens)) < WHOLE
        none = run_ablated(model, every.keep([]), tokens, **ours)
        assert gap(none, ablate_by_hand(model, grain, [], tokens, ablated)) < EXACT
        if ours["value"] == "corrupted":
            assert gap(none, model(ours["corrupted"])) < WHOLE
        assert gap(none, model(tokens)) > 0.01


@pytest.mark.parametrize("name, grain", SLOW_CASES)
def test_cutting_one_edge_is_brute_force(name, grain):
    model, every, rng = tiny(name), every_edge(name, grain), np.random.default_rng(0)
    tokens = draw_tokens(model)
    whole = run_ablated(model, every, tokens)
    for _, edges in every.edges.groupby("port", observed=True):
        drawn = [every.edge_names[i] for i in rng.choice(edges.index, min(2, len(edges)), replace=False)]
        effects = []
        for (ours, ablated), edge in itertools.product(settings(model, grain, tokens), drawn):
            cut = run_ablated(model, but(every, [edge]), tokens, **ours)
            assert (
                gap(cut, ablate_by_hand(model, grain, set(every.edge_names) - {edge}, tokens, ablated))
                < EXACT
            ), (edge, ours)
            effects.append(gap(cut, whole))
        assert max(effects) > 1e-3


@pytest.mark.parametrize("name, grain", SLOW_CASES)
def test_random_masks_are_brute_force_one_by_one_and_together(name, grain):
    model, every = tiny(name), every_edge(name, grain)
    tokens, draw = draw_tokens(model, 3), torch.Generator().manual_seed(0)
    masks = (torch.rand(4, len(every), generator=draw) < 0.5).to(model.dtype)
    masks[3] = torch.rand(len(every), generator=draw)  # and one between zero and one
    for ours, ablated in settings(model, grain, tokens):
        together = run_ablated(model, every, tokens, masks=masks, **ours)
        assert together.shape == (4, 3, 7, model.d_vocab)
        for mask, logits in zip(masks, together, strict=True):
            assert (
                gap(
                    logits,
                    ablate_by_hand(
                        model, grain, dict(zip(every.edge_names, mask.tolist(), strict=True)), tokens, ablated
                    ),
                )
                < EXACT
            ), ours
            assert gap(logits, run_ablated(model, every, tokens, masks=mask, **ours)) < EXACT
            assert gap(logits, run_ablated(model, every, tokens, masks=mask, batch_size=1, **ours)) < EXACT
        assert gap(together[0], run_ablated(model, every.keep(masks[0].numpy() == 1), tokens, **ours)) < EXACT


@pytest.mark.parametrize("name, grain", [c for c in CASES if c[1] != "block"])
def test_a_merged_port_is_its_three_ports(name, grain):
    model, every = tiny(name), every_edge(name, grain, "merged")
    tokens, masks = (
        draw_tokens(model),
        (torch.rand(2, len(every), generator=torch.Generator().manual_seed(1)) < 0.5).double(),
    )
    assert (
        set(every.edges["port"]) <= {"in", "mlp", "logits"}
        and gap(run_ablated(model, every, tokens), model(tokens)) < WHOLE
    )
    for (ours, ablated), mask in itertools.product(settings(model, grain, tokens), masks):
        small = every.keep(mask.numpy() == 1)
        kept = {
            e + end
            for e, port in zip(small.edge_names, small.edges["port"], strict=True)
            for end in (("<q>", "<k>", "<v>") if port == "in" else ("",))
        }
        expected = ablate_by_hand(model, grain, kept, tokens, ablated)
        assert (
            gap(run_ablated(model, small, tokens, **ours), expected) < EXACT
            and gap(run_ablated(model, every, tokens, masks=mask, **ours), expected) < EXACT
        )


@pytest.mark.parametrize("name, grain", CASES)
def test_frozen_patterns_are_the_models_own(name, grain):
    model, tokens = tiny(name), draw_tokens(tiny(name))
    graph = build_graph(model, tokens, grain, pattern="frozen", progress=False)
    assert (
        not set(graph.edges["port"]) & {"q", "k"}
        and gap(run_ablated(model, graph, tokens), model(tokens)) < WHOLE
    )
    small = graph.keep(np.random.default_rng(0).random(len(graph)) < 0.5)
    for ours, ablated in settings(model, grain, tokens):
        assert (
            gap(
                run_ablated(model, small, tokens, **ours),
                ablate_by_hand(model, grain, small.edge_names, tokens, ablated, pattern="frozen"),
            )
            < EXACT
        )
    if grain != "block":
        assert (
            gap(
                run_ablated(model, every_edge(name, grain).keep(graph.edge_names), tokens, value="zero"),
                model(tokens),
            )
            > 1e-3
        )  # with queries and keys cut, and live


@pytest.mark.parametrize("name, grain", SLOW_CASES)
def test_gradients_of_masks_are_finite_differences(name, grain):
    """Central differences in float64, step 1e-5; at these seeds no ReLU switches within a step."""
    model, every, draw = tiny(name), every_edge(name, grain), torch.Generator().manual_seed(0)
    tokens, step = random_tokens(model, 2, 6), 1e-5
    left = torch.randn(2, 6, model.d_vocab, generator=draw, dtype=model.dtype)
    masks = torch.rand(2, len(every), generator=draw, dtype=model.dtype)
    for ours, ablated in list(settings(model, grain, tokens))[:4]:
        wanted = masks.clone().requires_grad_()
        logits = run_ablated(model, every, tokens, masks=wanted, **ours)
        (logits[0] * left).sum().add(
            (logits[1] * left).square().sum()
        ).backward()  # each mask has a loss of its own
        single = masks[0].clone().requires_grad_()
        (run_ablated(model, every, tokens, masks=single, batch_size=1, **ours) * left).sum().backward()
        assert (
            torch.allclose(single.grad, wanted.grad[0], rtol=1e-9, atol=1e-10)
            and wanted.grad.isfinite().all()
        )
        for edge in torch.randperm(len(every), generator=draw)[:6].tolist():
            ends = []
            for sign in (1, -1):
                moved = masks[0].clone()
                moved[edge] += sign * step
                ends.append(
                    (
                        ablate_by_hand(
                            model,
                            grain,
                            dict(zip(every.edge_names, moved.tolist(), strict=True)),
                            tokens,
                            ablated,
                        )
                        * left
                    ).sum()
                )
            slope = (ends[0] - ends[1]) / (2 * step)
            assert abs(slope - wanted.grad[0, edge]) < 1e-6 * max(1, abs(slope)), (
                every.edge_names[edge],
                ours,
            )


@pytest.mark.parametrize("grain", GRAINS)
def test_biases_are_cut_with_values_of_zero_alone(grain):
    """They are the same in every run, so that a mean or another prompt has them too."""
    model, every, seen = tiny("gpt2"), every_edge("gpt2", grain), 0
    tokens = draw_tokens(model, 3)
    without = every.keep((every.edges["source"] != "const").to_numpy())
    assert 0 < len(without) < len(every)
    for ours, ablated in settings(model, grain, tokens):
        a, b = (run_ablated(model, g, tokens, **ours) for g in (every, without))
        assert (gap(a, b) > 1e-3) == (ablated is None) and (ablated is None or torch.equal(a, b))
        seen += ablated is None
    assert seen == 1


def test_gradients_flow_only_where_they_are_asked_for():
    model, every = tiny("llama"), every_edge("llama", "head")
    tokens, mask = (
        draw_tokens(model),
        torch.ones(len(every_edge("llama", "head")), dtype=torch.float64, requires_grad=True),
    )
    assert (
        not run_ablated(model, every, tokens).requires_grad
        and run_ablated(model, every, tokens, masks=mask).requires_grad
    )
    with torch.no_grad():
        assert not run_ablated(model, every, tokens, masks=mask).requires_grad
    assert all(p.grad is None for p in model.bridge.original_model.parameters())


@pytest.mark.parametrize("name, grain", SLOW_CASES)
def test_node_ablation_keeps_every_edge_out_of_the_nodes_touched(name, grain):
    model, every, rng = tiny(name), every_edge(name, grain), np.random.default_rng(1)
    tokens = draw_tokens(model)
    for n in (1, 2, 5):
        small = every.keep(
            np.isin(np.arange(len(every)), rng.choice(len(every), min(n, len(every)), replace=False))
        )
        touched = {*small.edges["source"], *small.edges["target"]}
        nodes = every.keep(every.edges["source"].isin(touched).to_numpy())
        cut = open_cut(model, every)
        assert torch.equal(select(cut, small, "node").mask, select(cut, nodes).mask)
        for ours, ablated in settings(model, grain, tokens):
            logits = run_ablated(model, small, tokens, ablation="node", **ours)
            assert (
                gap(logits, run_ablated(model, nodes, tokens, **ours)) < EXACT
                and gap(logits, ablate_by_hand(model, grain, nodes.edge_names, tokens, ablated)) < EXACT
            )


# The embedded model, on real text.


@pytest.fixture(scope="module")
def smollm_double():
    model = load_model("smollm2-135m", dtype=torch.float64)
    return model, load_corpus("default", model, n_tokens=64, seq_len=32)


@pytest.fixture(scope="module")
def smollm(smollm_double):
    """The model, text, its own logits, and how far rounding may move them."""
    model, (double, tokens) = load_model("smollm2-135m"), smollm_double
    with torch.no_grad():
        own, exact = model(tokens), double(tokens)
    return (
        model,
        tokens,
        own,
        max(1e-4, 2 * gap(own.double(), exact)),
    )  # some processors' order of summation alone moves the model's own logits by more than 1e-4


@torch.no_grad()
@pytest.mark.parametrize(
    "value, grain", [("zero", "block"), ("mean", "layer"), ("corrupted", "head"), ("resample", "head")]
)
def test_all_edges_kept_is_the_embedded_model_on_real_text(smollm, value, grain):
    model, tokens, own, rounding = smollm
    every, other = complete_graph(model, grain), {"corrupted": tokens.flip(0)} if value == "corrupted" else {}
    assert gap(run_ablated(model, every, tokens, value=value, **other), own) < rounding
    none = run_ablated(model, every.keep([]), tokens, value=value, **other)
    if value in ("corrupted", "resample"):
        assert gap(none, own.flip(0)) < rounding  # of two sequences, the other
    if value == "mean":
        assert gap(none[:, 1:], none[:, :-1]) < 1e-4 and gap(none[:1], none[1:]) < 1e-4  # the same everywhere
    if value == "zero":
        assert none.abs().max() < 1e-4  # no biases


@torch.no_grad()
@pytest.mark.parametrize(
    "value, grain", [("zero", "head"), ("mean", "block"), ("corrupted", "layer"), ("resample", "head")]
)
def test_in_double_precision_nothing_is_left_of_the_rounding(smollm_double, value, grain):
    model, tokens = smollm_double
    own = run_logits(model, trace_modules(model, tokens, "layer").reads["logits"])
    assert (
        gap(
            run_ablated(
                model,
                complete_graph(model, grain),
                tokens,
                tokens.flip(0) if value == "corrupted" else None,
                value,
            ),
            own,
        )
        < 1e-10
    )


# Refusals: each by its words, and nothing is left changed.


def foreign(graph):
    return Graph(
        graph.nodes,
        graph.edges,
        graph.meta | {"model": {**graph.meta["model"], "weights_hash": "0" * 64, "name": "stranger"}},
    )


def rewired(graph, **ends):
    """The graph's first edge with other ends or another port, on nodes in any order."""
    edge = (
        graph.edges.iloc[:1]
        .assign(
            source=lambda e: e["source"].astype(str),
            target=lambda e: e["target"].astype(str),
            port=lambda e: e["port"].astype(str),
        )
        .assign(**ends)
    )
    first = graph.nodes["name"].isin(edge["source"])
    return Graph(pd.concat([graph.nodes[first], graph.nodes[~first]]), edge, graph.meta)


def some_task(model, lengths=None, **options):
    """Prompts whose answers are likeliest for the model, and a token that is not; unlike numbers of both."""
    tokens, draw = random_tokens(model, 6, 8, seed=5), torch.Generator().manual_seed(3)
    last = [8] * 6 if lengths is None else lengths
    order = torch.stack([rows[n - 1] for rows, n in zip(model(tokens), last, strict=True)]).argsort(
        dim=-1, descending=True
    )
    answers, wrong = order[:, [0, 30]].clone(), order[:, [3, 20, 10]].clone()
    answers[torch.randperm(6, generator=draw)[:3], 1] = wrong[torch.randperm(6, generator=draw)[:2], 2] = -1
    options = {"answers": answers, "wrong": wrong} | options
    return Task(
        tokens,
        random_tokens(model, 6, 8, seed=6),
        lengths=None if lengths is None else torch.tensor(lengths),
        **options,
    )


REFUSED = [
    (
        lambda m, g, t: run_ablated(m, g, t, t[:, :-1], "corrupted"),
        r"corrupted must have the shape of the clean tokens, \(2, 10\), got \(2, 9\)",
    ),
    (
        lambda m, g, t: run_ablated(m, g, t, t[:1], "corrupted"),
        r"corrupted must have the shape of the clean tokens, \(2, 10\), got \(1, 10\)",
    ),
    (lambda m, g, t: run_ablated(m, g, t, t + 1000, "corrupted"), "corrupted"),
    (
        lambda m, g, t: run_ablated(m, g, t, value="corrupted"),
        "corrupted tokens go with value='corrupted' .* missing",
    ),
    (lambda m, g, t: run_ablated(m, g, t, t), "corrupted tokens go with value='corrupted' .* given"),
    (
        lambda m, g, t: run_ablated(m, g, t, value="noise"),
        "value must be one of 'mean', 'zero', 'resample', 'corrupted', or an AblatedValue, got 'noise'",
    ),
    (
        lambda m, g, t: run_ablated(m, g, t, value="zero", reference=t),
        "reference goes with value='mean', got value='zero'",
    ),
    (
        lambda m, g, t: run_ablated(m, g, t, reference=t[:, :5], per_position=True),
        "reference must have at least 10 positions",
    ),
    (lambda m, g, t: run_ablated(m, g, t[:1], value="resample"), "needs at least 2 sequences"),
    (lambda m, g, t: run_ablated(m, g, t, ablation="path"), "ablation must be 'edge' or 'node', got 'path'"),
    (lambda m, g, t: evaluate(m, g, t, batch_size=0), "batch_size must be at least 1, got 0"),
    (lambda m, g, t: run_ablated(m, g, t - 50), "tokens"),
    (lambda m, g, t: run_ablated(m, foreign(g), t), "graph must be one of llama .* got a graph of stranger"),
    (lambda m, g, t: run_ablated(m, every_edge("gpt2", "head"), t), "got a graph of gpt2"),
    (
        lambda m, g, t: run_ablated(m, Graph(g.nodes, g.edges, g.meta | {"nodes": "neuron"}), t),
        r"grain \(meta\['nodes'\]\) must be one of block, layer, head, got 'neuron'",
    ),
    (
        lambda m, g, t: run_ablated(m, Graph(g.nodes, g.edges, g.meta | {"nodes": "layer"}), t),
        "nodes of the graph must be nodes of llama, but 'a0.h0' is not",
    ),
    (
        lambda m, g, t: run_ablated(m, rewired(g, source="m1", target="a0.h0"), t),
        "edges must point forward in llama, but m1->a0.h0<q> does not",
    ),
    (
        lambda m, g, t: run_ablated(m, rewired(g, source="a1.h0", target="a1.h1"), t),
        "edges must point forward .* a1.h0->a1.h1<q>",
    ),
    (
        lambda m, g, t: run_ablated(m, rewired(g, source="logits", target="m1", port="mlp"), t),
        "edges must point forward .* logits->m1",
    ),
    (
        lambda m, g, t: run_ablated(m, rewired(g, source="m0", target="embed", port="in"), t),
        "edges must point forward .* m0->embed",
    ),
    (
        lambda m, g, t: run_ablated(m, rewired(g, target="m0", port="q"), t),
        "port of embed->m0<q> must be one of mlp",
    ),
    (lambda m, g, t: run_ablated(m, rewired(g, port="in"), t), "port of embed->a0.h0 must be one of q, k, v"),
    (
        lambda m, g, t: evaluate(m, g, t, metric="bleu", progress=False),
        "metric must be one of 'ce', 'kl', 'accuracy' for text, or a function of the logits, got 'bleu'",
    ),
    (
        lambda m, g, t: evaluate(m, g, t, metric="logit_diff", progress=False),
        "metric must be one of .* for text, .* got 'logit_diff'",
    ),
    (
        lambda m, g, t: evaluate(m, g, some_task(m), metric="bleu", progress=False),
        "metric must be one of .* for this task, .* got 'bleu'",
    ),
    (
        lambda m, g, t: evaluate(m, g, t, value="corrupted", progress=False),
        "value='corrupted' needs corrupted tokens: give a Task",
    ),
    (
        lambda m, g, t: evaluate(m, g, t, "path", progress=False),
        "ablation must be 'edge' or 'node', got 'path'",
    ),
    (lambda m, g, t: evaluate(m, g, t[:1], value="resample", progress=False), "needs at least 2 sequences"),
    (
        lambda m, g, t: evaluate(m, g, t, skip_first=9, progress=False),
        r"at least skip_first \+ 2 = 11 tokens, got 10",
    ),
    (lambda m, g, t: evaluate(m, foreign(g), t, progress=False), "got a graph of stranger"),
    (
        lambda m, g, t: evaluate(m, g, some_task(m, metric=lambda logits: logits.sum()), progress=False),
        "metric must return one number for each of the 6 inputs",
    ),
    (
        lambda m, g, t: ablation_curve(m, g, t, [1], ablation=[], progress=False),
        "ablation must be 'edge', 'node' or both",
    ),
    (
        lambda m, g, t: ablation_curve(m, g, t, [1], ablation="path", progress=False),
        "ablation must be 'edge', 'node' or both in a list, got 'path'",
    ),
    (lambda m, g, t: ablation_curve(m, g, t, [], progress=False), "n_edges must hold at least one budget"),
    (
        lambda m, g, t: ablation_curve(m, g, t, [-1], progress=False),
        "n_edges must hold numbers of at least 0, got -1",
    ),
    (lambda m, g, t: ablation_curve(m, g, t, [len(g) + 1], progress=False), r"n must lie in \[0, \d+\]"),
    (
        lambda m, g, t: ablation_curve(m, g, t, [1], method="random", progress=False),
        "method must be one of 'top', 'greedy', .* got 'random'",
    ),
    (
        lambda m, g, t: ablation_curve(m, g, t, [1], by="size", progress=False),
        "by must be one of weight, abs_weight, rms_weight, got 'size'",
    ),
    (lambda m, g, t: compare_curves(m, {}, t, progress=False), "graphs must hold at least one graph"),
    (
        lambda m, g, t: compare_curves(m, {"a": g, "b": every_edge("llama", "layer")}, t, progress=False),
        "graphs must have one grain .* 'b' has another than 'a'",
    ),
    (
        lambda m, g, t: minimality(m, g, t, 0, progress=False),
        "n_edges must be at least 1, or None for all, got 0",
    ),
    (lambda m, g, t: minimality(m, foreign(g), t, progress=False), "got a graph of stranger"),
]


def state_of(model, graph):
    """What must not change: outputs, hooks, weights, switches, random states, the graph."""
    hooks = sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
        for m in model.bridge.original_model.modules()
    )
    weights = [
        (p.sum().item(), p.requires_grad, p.grad is None) for p in model.bridge.original_model.parameters()
    ]
    generators = (torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate())  # noqa: NPY002  (the global one is what must stay)
    return (
        model(random_tokens(model)).tolist(),
        hooks,
        weights,
        model.bridge.training,
        torch.is_grad_enabled(),
        generators,
        graph.edge_names,
        graph.edges["weight"].tolist(),
        graph.meta,
    )


@pytest.mark.parametrize("run, words", REFUSED, ids=[words[:50] for _, words in REFUSED])
def test_bad_requests_are_refused_by_their_words_and_change_nothing(run, words):
    model, graph = tiny("llama"), every_edge("llama", "head")
    before = state_of(model, graph)
    with pytest.raises(ValueError, match=words):
        run(model, graph, random_tokens(model))
    assert state_of(model, graph) == before


def test_edges_that_parallel_blocks_lack_are_refused():
    """In GPT-NeoX the MLP does not read its own layer's attention."""
    model, every, tokens = tiny("gpt-neox"), every_edge("gpt-neox", "head"), random_tokens(tiny("gpt-neox"))
    for source in ("a1.h0", "a1.h1"):
        with pytest.raises(ValueError, match=f"{source}->m1 does not: m1 never reads what {source} writes"):
            run_ablated(model, rewired(every, source=source, target="m1", port="mlp"), tokens)
    with pytest.raises(ValueError, match="const->m0 does not"):
        run_ablated(model, rewired(every, source="const", target="m0", port="mlp"), tokens)
    assert (
        run_ablated(model, rewired(every, source="a0.h0", target="m1", port="mlp"), tokens).isfinite().all()
    )


def test_blocks_have_one_port():
    graph = every_edge("llama", "block")
    with pytest.raises(ValueError, match="port of embed->b0<q> must be one of in"):
        run_ablated(tiny("llama"), rewired(graph, port="q"), random_tokens(tiny("llama")))


# Scores, recomputed from the logits of `run_ablated`.


def scores_by_hand(logits, own, tokens, skip_first=1):
    """Cross-entropy, divergence from the model and accuracy of each sequence, token by token."""
    rows = []
    for z, z_own, ids in zip(logits, own, tokens, strict=True):
        at = range(skip_first, len(ids) - 1)
        p, p_own = z.softmax(-1), z_own.softmax(-1)
        ce = sum(-math.log(p[i, ids[i + 1]]) for i in at) / len(at)
        kl = sum((p_own[i] * (p_own[i] / p[i]).log()).sum().item() for i in at) / len(at)
        rows.append((ce, kl, sum(int(p[i].argmax() == ids[i + 1]) for i in at) / len(at)))
    return (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("ablation", ["edge", "node"])
def test_scores_of_text_are_those_of_the_logits(name, ablation):
    model, every = tiny(name), every_edge(name, "head")
    tokens, graph = (
        written_tokens(model, 4, 7),
        every.keep(
            torch.rand(len(every), generator=torch.Generator().manual_seed(2)).numpy()
            < (0.5 if ablation == "edge" else 0.02)
        ),
    )
    found = evaluate(model, graph, tokens, ablation, progress=False, batch_size=3)
    own, kept = model(tokens), run_ablated(model, graph, tokens, ablation=ablation)
    ce, kl, accuracy = scores_by_hand(kept, own, tokens)
    (ce_own, *_), (ce_none, *_) = (
        scores_by_hand(own, own, tokens),
        scores_by_hand(run_ablated(model, every.keep([]), tokens), own, tokens),
    )
    assert (
        found.ce == pytest.approx(ce.mean().item())
        and found.kl == pytest.approx(kl.mean().item(), abs=1e-6)
        and found.accuracy == pytest.approx(accuracy.mean().item())
    )
    assert found.faithfulness == pytest.approx(
        ((ce - ce_none).mean() / (ce_own - ce_none).mean()).item(), rel=1e-4, abs=1e-4
    ) and np.allclose(found.inputs["graph"], -ce)
    other = (
        but(every, graph.edge_names)
        if ablation == "edge"
        else every.keep(
            ~every.edges["source"].isin({*graph.edges["source"], *graph.edges["target"]}).to_numpy()
        )
    )
    (ce_rest, *_) = scores_by_hand(run_ablated(model, other, tokens), own, tokens)
    assert found.completeness == pytest.approx(
        ((ce_rest - ce_none).mean() / (ce_own - ce_none).mean()).item(), rel=1e-4, abs=1e-4
    )


@torch.no_grad()
@pytest.mark.parametrize("metric", ["logit_diff", "prob_diff", "accuracy", "ce", "kl", "own"])
@pytest.mark.parametrize("lengths", [None, [8, 5, 8, 6, 6, 5]])
def test_scores_of_a_task_are_those_of_the_logits(metric, lengths):
    model, every = tiny("llama"), every_edge("llama", "head")
    last = torch.tensor(lengths or [8] * 6) - 1
    at = lambda logits: logits[torch.arange(6), last]  # noqa: E731
    task = some_task(
        model, lengths, **({"metric": lambda logits: at(logits)[:, 3]} if metric == "own" else {})
    )
    graph = every.keep(torch.rand(len(every), generator=torch.Generator().manual_seed(2)).numpy() < 0.7)
    z, own = at(run_ablated(model, graph, task.clean, task.corrupted, "corrupted")), at(model(task.clean))
    p = z.softmax(-1)
    expected = []
    for i in range(6):
        right, wrong = ([int(t) for t in tokens[i] if t >= 0] for tokens in (task.answers, task.wrong))
        expected.append(
            {
                "logit_diff": z[i, right].mean() - z[i, wrong].mean(),
                "prob_diff": p[i, right].sum() - p[i, wrong].sum(),
                "accuracy": float(z[i, right].max() > z[i, wrong].max()),
                "ce": p[i, right].sum().log(),
                "kl": -(own[i].softmax(-1) * (own[i].log_softmax(-1) - p[i].log())).sum(),
                "own": z[i, 3],
            }[metric]
        )
    found = evaluate(
        model,
        graph,
        task,
        value="corrupted",
        metric=None if metric == "own" else metric,
        progress=False,
        batch_size=4,
    )
    assert np.allclose(found.inputs["graph"], torch.tensor(expected), atol=1e-6) and found.metric == metric
    assert np.allclose(
        found.inputs["none"],
        evaluate(
            model,
            every.keep([]),
            task,
            value="corrupted",
            metric=None if metric == "own" else metric,
            progress=False,
        ).inputs["graph"],
    )


@torch.no_grad()
@pytest.mark.parametrize("value", ["mean", "resample"])
def test_padding_of_prompts_counts_for_nothing(value):
    """Neither in means, nor in who takes whose values, nor in scores: other tokens there change nothing."""
    model, every, lengths = tiny("llama"), every_edge("llama", "head"), [8, 5, 8, 6, 6, 5]
    task, graph = (
        some_task(model, lengths),
        every.keep(torch.rand(len(every), generator=torch.Generator().manual_seed(2)).numpy() < 0.7),
    )
    padded = torch.where(torch.arange(8) < torch.tensor(lengths)[:, None], task.clean, 7)
    found, other = (
        evaluate(
            model,
            graph,
            Task(clean, task.corrupted, "logit_diff", task.answers, task.wrong, task.lengths),
            value=value,
            progress=False,
            batch_size=2,
        ).inputs
        for clean in (task.clean, padded)
    )
    assert not torch.equal(padded, task.clean) and np.allclose(found, other, rtol=0, atol=1e-9)
    ablated = (
        mean_by_hand(model, "head", task.clean, lengths=lengths)
        if value == "mean"
        else writes_by_hand(model, "head", permute_rows(task.clean, 0, task.lengths))
    )
    for column, kept in (
        ("graph", graph.edge_names),
        ("complement", but(every, graph.edge_names).edge_names),
        ("none", []),
    ):
        z = ablate_by_hand(model, "head", kept, task.clean, ablated)[torch.arange(6), task.last]
        expected = [
            (
                z[i, task.answers[i][task.answers[i] >= 0]].mean()
                - z[i, task.wrong[i][task.wrong[i] >= 0]].mean()
            ).item()
            for i in range(6)
        ]
        assert np.allclose(found[column], expected, rtol=0, atol=1e-9)


def test_options_of_scores_reach_the_runs():
    """Means over another text and by position, frozen patterns, corpora, and intervals."""
    model, tokens = tiny("llama"), written_tokens(tiny("llama"), 6, 10)
    corpus = Corpus(
        tokens,
        torch.zeros_like(tokens),
        pd.DataFrame({"register": ["random"], "document": ["random"], "n_tokens": [60]}),
    )
    text, state = random_tokens(model, 3, 12, seed=3), torch.get_rng_state()
    frozen = build_graph(model, tokens, pattern="frozen", progress=False)
    frozen = frozen.keep(np.random.default_rng(0).random(len(frozen)) < 0.5)
    for graph in (every_edge("llama", "head").keep(frozen.edge_names), frozen):
        for options in (
            {},
            {"reference": text},
            {"per_position": True},
            {"per_position": True, "reference": text},
            {"value": "resample", "seed": 3},
            {"skip_first": 4},
        ):
            found = evaluate(model, graph, corpus, progress=False, n_boot=50, **options)
            skip = options.pop("skip_first", 1)
            ce, *_ = scores_by_hand(run_ablated(model, graph, tokens, **options), model(tokens), tokens, skip)
            assert np.allclose(found.inputs["graph"], -ce) and found.ce == pytest.approx(ce.mean().item())
            for name, (low, high) in found.intervals.items():
                assert low <= getattr(found, name) <= high and (low < high or name == "accuracy")
    alone = evaluate(model, frozen, tokens[:1], value="zero", progress=False)
    assert np.isnan(list(alone.intervals.values())).all() and np.isfinite(alone.faithfulness)
    repeated = [
        evaluate(model, frozen, corpus, progress=False, n_boot=50, seed=s).intervals["kl"] for s in (0, 0, 1)
    ]
    assert repeated[0] == repeated[1] != repeated[2] and torch.equal(state, torch.get_rng_state())


def test_areas_are_those_worked_out_by_hand():
    assert (
        area_between([0, 0.5, 1], torch.tensor([0.0, 0.5, 1.0])) == 0.5
        and area_between([0, 0.5, 1], torch.tensor([0.0, 1.0, 1.0])) == 0.75
    )
    assert area_between(
        [0.001, 0.5, 1], torch.tensor([[1.0, 1.0, 1.0], [0.0, 2.0, 1.0]])
    ).tolist() == pytest.approx([0.999, 0.499 + 0.75])
    assert faithfulness(
        torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([4.0, 4.0]), torch.tensor([0.0, 0.0])
    ).tolist() == [0.5, 0.0]


def test_the_bootstrap_resamples_inputs_by_its_seed():
    values, state = torch.arange(20.0, dtype=torch.float64), torch.get_rng_state()
    mean = lambda v: v.mean(-1)  # noqa: E731
    low, high = bootstrap(mean, values, n_boot=4000)
    students = 2.093 * 5.916 / 20**0.5  # quantile of Student's distribution, standard deviation
    assert (float(low), float(high)) == pytest.approx((9.5 - students, 9.5 + students), abs=0.2)
    assert bootstrap(mean, values, seed=1) == bootstrap(mean, values, seed=1) != bootstrap(
        mean, values, seed=2
    ) and torch.equal(state, torch.get_rng_state())
    low, high = bootstrap(lambda v, w: v.mean(-1) - w.mean(-1), values, values + 1)
    assert (float(low), float(high)) == pytest.approx((-1, -1), abs=1e-12)  # the same inputs of both
    assert all(end.isnan() for end in bootstrap(mean, values[:1]))


def weighed(graph, seed=0):
    return Graph(
        graph.nodes,
        graph.edges.assign(weight=np.random.default_rng(seed).normal(size=len(graph))),
        graph.meta,
    )


@pytest.mark.parametrize("method", ["top", "greedy", "coverage(share=0.8)"])
def test_a_curve_is_its_graphs_judged_one_by_one(method):
    model, graph = tiny("llama"), weighed(every_edge("llama", "head"))
    tokens, budgets, state = written_tokens(model, 5, 7), [5, 20, 60, len(graph)], torch.get_rng_state()
    areas, curves = compare_curves(
        model,
        {"a": graph, "b": weighed(graph, 1)},
        tokens,
        budgets,
        value="resample",
        method=method,
        progress=False,
        batch_size=2,
    )
    for row in curves.itertuples():
        small = select_edges(graph if row.graph == "a" else weighed(graph, 1), row.n_edges, method)
        alone = evaluate(model, small, tokens, row.ablation, "resample", progress=False)
        assert (row.n_kept, row.n_nodes) == (len(small), alone.n_nodes) and (
            row.low,
            row.high,
        ) == pytest.approx(alone.intervals["faithfulness"], nan_ok=True)
        assert (row.faithfulness, row.kl, row.ce, row.accuracy) == pytest.approx(
            (alone.faithfulness, alone.kl, alone.ce, alone.accuracy), abs=1e-9
        )
        touched = {*small.edges["source"], *small.edges["target"]}
        assert row.n_run == (
            len(small)
            if row.ablation == "edge"
            else (graph.edges["source"].isin(touched) & graph.edges["target"].isin(touched)).sum()
        )
    for row in areas.itertuples():
        f = curves.query("graph == @row.graph and ablation == @row.ablation")["faithfulness"].to_numpy()
        share = np.array(budgets) / len(graph)
        assert (
            row.cpr == pytest.approx(np.trapezoid(f, share))
            and row.cmd == pytest.approx(np.trapezoid(np.abs(1 - f), share))
            and row.cpr_low <= row.cpr <= row.cpr_high
        )
    pd.testing.assert_frame_equal(
        ablation_curve(model, graph, tokens, budgets, value="resample", method=method, progress=False),
        curves[curves["graph"] == "a"].drop(columns="graph"),
    )
    assert torch.equal(state, torch.get_rng_state()) and curves.attrs == {
        "value": "resample",
        "method": method,
        "by": "weight",
        "metric": "ce",
        "data": "text",
        "n_inputs": 5,
        "exact": True,
    }


def test_minimality_is_the_difference_of_two_evaluations():
    model, graph = tiny("llama"), weighed(every_edge("llama", "layer"))
    small, tokens = select_edges(graph, 12), written_tokens(model, 4, 7)
    table = minimality(model, small, tokens, None, progress=False)
    whole = evaluate(model, small, tokens, progress=False).faithfulness
    assert set(table["edge"]) == set(small.edge_names) and table["loss"].is_monotonic_decreasing
    for row in table.itertuples():
        assert row.loss == pytest.approx(
            whole - evaluate(model, but(small, [row.edge]), tokens, progress=False).faithfulness, abs=1e-9
        )
    drawn = minimality(model, small, tokens, 5, seed=3, progress=False)
    assert (
        len(drawn) == 5
        and drawn["edge"].tolist()
        == minimality(model, small, tokens, 5, seed=3, progress=False)["edge"].tolist()
        != minimality(model, small, tokens, 5, seed=4, progress=False)["edge"].tolist()
    )


def test_resampled_rows_have_other_rows_of_their_length():
    tokens, lengths = torch.arange(40).view(8, 5), torch.tensor([5, 3, 5, 3, 3, 5, 4, 4])
    rows = permute_rows(tokens, 0, lengths)[:, 0] // 5
    assert (
        sorted(rows.tolist()) == list(range(8))
        and (rows != torch.arange(8)).all()
        and torch.equal(lengths[rows], lengths)
    )
    assert not torch.equal(permute_rows(tokens, 0), permute_rows(tokens, 1))
    with pytest.raises(ValueError, match="1 of 4 tokens"):
        permute_rows(tokens[:7], 0, lengths[:7])


# Models whose graph is known.


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("value", VALUES)
def test_the_true_graph_alone_is_faithful_and_every_edge_of_it_is_needed(name, value):
    k = known(name)
    alone = evaluate(k.model, k.graph, k.task, value=value, progress=False)
    assert (
        alone.faithfulness == pytest.approx(1, abs=1e-4)
        and alone.accuracy == 1
        and len(k.graph) < len(k.every) / 3
    )
    same = [
        e for e in k.edges if value in ("corrupted", "resample") and e.startswith("pos_embed")
    ]  # another prompt has the same positions, so that the edge carries the same when it is cut
    if (name, value) == ("induction", "corrupted"):
        same += ["embed->a1.h0<v>"]  # and the corrupted prompt the same word where it first stands
    if name == "count" and value in ("corrupted", "resample"):
        same += ["embed->a0.h1<v>"]  # every prompt begins with the same token
    for graph in (k.every, k.graph):
        losses = minimality(k.model, graph, k.task, None, value=value, progress=False).set_index("edge")[
            "loss"
        ]
        needed = losses.index.isin(k.edges) & ~losses.index.isin(same)
        assert losses[needed].min() > 0.1 and needed.sum() == len(k.edges) - len(same)
        assert (losses[~needed].abs() < 1e-3).all(), losses[~needed]


@pytest.mark.parametrize("attribution", ["ig", "gradient"])
@pytest.mark.parametrize("name", ["copy", "induction"])
def test_greedy_selection_finds_the_true_edges_of_heads(name, attribution):
    """Not those of the chain: an MLP there reads noise as well, which weighs as much as the answer."""
    k = known(name)
    for baseline in ("zero", "mean"):
        graph = build_graph(k.model, k.task.clean, attribution=attribution, baseline=baseline, progress=False)
        assert set(select_edges(graph, len(k.edges), "greedy").edge_names) == set(k.edges)


def test_edge_skill_is_over_random_edges_between_the_same_nodes():
    known = KNOWN["copy"]()
    every, true = known.every, known.graph
    found = evaluate(known.model, true, known.task, value="corrupted", progress=False)
    selection = draw_among_nodes(cut_model(known.model, "head"), true, seed=0)
    drawn = every.keep(selection.mask.numpy())
    ends = {*true.edges["source"], *true.edges["target"]}
    assert len(drawn) == len(true) and {*drawn.edges["source"], *drawn.edges["target"]} <= ends
    random = evaluate(known.model, drawn, known.task, value="corrupted", progress=False).faithfulness
    assert found.skill == pytest.approx(found.faithfulness - max(random, 0)) and found.skill > 0.9
    low, high = found.intervals["skill"]
    assert low <= found.skill <= high and "edge skill" in repr(found)
    assert evaluate(known.model, every, known.task, value="corrupted", progress=False).skill == 0
    worse = evaluate(known.model, every.keep([]), known.task, value="corrupted", progress=False)
    assert worse.skill == 0
    nodes = evaluate(known.model, true, known.task, ablation="node", value="corrupted", progress=False)
    assert np.isnan(nodes.skill) and "skill" not in repr(nodes)
