"""The other ways to draw a graph: each against the definition of what it computes, on models small enough
to do it by hand."""

from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from circuitgraph.ablation.features import run_selections
from circuitgraph.ablation.selection import ModuleSelection
from circuitgraph.ablation.values import AblatedText, read_value
from circuitgraph.cut import cut_model
from circuitgraph.methods import compare
from circuitgraph.methods.compare import Comparing, list_methods
from circuitgraph.methods.flow import Proximity, trace_flow, trace_routes
from circuitgraph.methods.masks import MaskConfig, integrate_masks, learn_masks, prune_greedily
from circuitgraph.methods.patching import patch_edges, patch_nodes, patch_ports, random_graph, logit_lens
from circuitgraph.methods.patching import score_graph
from circuitgraph.build.build import complete_graph
from circuitgraph.graph.select import Coverage, Top
from circuitgraph.build.modules import list_edges
from circuitgraph.dictionary.places import visit_modules
from circuitgraph.attribution.metric import final_gradients, score_task, write_gradients
from circuitgraph.model.blocks import apply_norm, attention_mask, project_heads, rotary_tables, rotate
from circuitgraph.model.blocks import freeze_block, project_qkv, run_logits
from circuitgraph.model.loading import TINY_MODELS, tiny_model
from circuitgraph.model.modules import embed_tokens, list_readers, trace_modules
from circuitgraph.data.task import Task
from known import KNOWN
from known_features import KNOWN_FEATURES
from circuitgraph.options import Judging, Run
from oracles import random_tokens, with_act
from short import build_graph, run_ablated

QUIET = Run(progress=False)


def judging(metric=None, seed=0, batch_size=None):
    return Judging(metric=metric, seed=seed, run=Run(batch_size, progress=False))


def compare_methods(*args, nodes="head", value="mean", **options):
    """With few resamples and no progress bar."""
    comparing = Comparing(**({"n_boot": 20, "progress": False} | options))
    return compare.compare_methods(*args, nodes=nodes, value=value, comparing=comparing)


def make_task(model, n=3, n_pos=6):
    return Task(
        random_tokens(model, n, n_pos),
        random_tokens(model, n, n_pos, seed=7),
        answers=torch.arange(n)[:, None] + 3,
        wrong=torch.arange(n)[:, None] + 13,
    )


def embed(model, tokens):
    return torch.stack(list(embed_tokens(model, tokens).values())).sum(0)


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("grain", ["block", "layer", "head"])
@pytest.mark.parametrize("value", ["corrupted", "mean", "zero"])
def test_eap_is_the_derivative_of_each_edges_mask(name, grain, value):
    model = tiny_model(name, dtype=torch.float64)
    task, every = make_task(model), complete_graph(model, grain)
    graph = build_graph(
        model, task, grain, attribution="eap", target="metric", baseline=value, batch_size=2, progress=False
    )
    masks = torch.ones(len(every), dtype=torch.float64, requires_grad=True)
    logits = run_ablated(
        model, every, task.clean, task.corrupted if value == "corrupted" else None, value, masks=masks
    )
    score = (logits[:, -1].gather(1, task.answers) - logits[:, -1].gather(1, task.wrong)).mean()
    wanted = torch.autograd.grad(score, masks)[0]
    assert graph.edge_names == every.edge_names and graph.meta["attribution"] == "eap"
    assert np.allclose(graph.edges["weight"], wanted, rtol=1e-9, atol=1e-12) and wanted.abs().max() > 1e-3
    assert (
        np.isclose(graph.nodes["mean_activation"].iloc[-1], float(score.detach()))
        and (graph.edges["abs_weight"] >= graph.edges["weight"].abs() - 1e-12).all()
    )


def test_on_a_linear_model_eap_is_exact_patching():
    known = KNOWN["chain"]()
    model = with_act(known.model, lambda x: x)
    exact, graph = (
        patch_edges(model, known.task, judging=judging()),
        build_graph(model, known.task, "head", target="metric", attribution="eap", progress=False),
    )
    with torch.no_grad():
        whole = float(
            score_task(model, known.task, trace_modules(model, known.task.clean).reads["logits"]).mean()
        ) - float(
            score_task(model, known.task, trace_modules(model, known.task.corrupted).reads["logits"]).mean()
        )
    assert abs(whole) > 1 and np.allclose(graph.edges["weight"] / whole, exact.edges["weight"], atol=1e-10)
    assert set(exact.keep(exact.edges["weight"].abs().to_numpy() > 0.5).edge_names) == set(known.edges)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "gemma2"])
def test_eap_ig_of_the_embeddings_is_patching_them(name):
    model = tiny_model(name, dtype=torch.float64)
    task = make_task(model)
    whole = sum(
        s * float(score_task(model, task, trace_modules(model, tokens).reads["logits"]).mean())
        for s, tokens in ((1, task.clean), (-1, task.corrupted))
    )
    errors = []
    for n in (16, 256):
        edges = build_graph(
            model, task, "head", target="metric", attribution="eap-ig", n_steps=n, progress=False
        ).edges
        errors.append(abs(edges["weight"][edges["source"].isin(["embed", "pos_embed"])].sum() / whole - 1))
    assert errors[1] < 1e-3 and errors[1] < errors[0] / 10


def test_eap_ig_becomes_exact_patching_of_each_edge():
    """On a smooth chain that bends in its last MLP alone: along the path everything before it moves on a
    straight line, so that one edge's share is the whole difference."""
    known = KNOWN["chain"]()
    acts = (lambda x: x, lambda x: x, torch.tanh)
    model = replace(
        known.model,
        layers=tuple(
            replace(layer, mlp=replace(layer.mlp, act=act))
            for layer, act in zip(known.model.layers, acts, strict=True)
        ),
    )
    for block, act in zip(model.bridge.blocks, acts, strict=True):
        block.mlp.original_component.act = act  # judging compares with the original, which bends alike
    exact = patch_edges(model, known.task, judging=judging()).edges["weight"].to_numpy()
    ends = [
        float(score_task(model, known.task, trace_modules(model, tokens).reads["logits"].detach()).mean())
        for tokens in (known.task.clean, known.task.corrupted)
    ]
    errors = [
        np.abs(
            build_graph(
                model, known.task, target="metric", attribution=name, n_steps=n, progress=False
            ).edges["weight"]
            / (ends[0] - ends[1])
            - exact
        ).max()
        for name, n in (("eap", 1), ("eap-ig", 2), ("eap-ig", 4), ("eap-ig", 16))
    ]
    assert (
        np.isclose(exact.max(), 1) and errors[0] > 0.05 and errors[3] < 1e-8 and (np.diff(errors) < 0).all()
    )


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "gemma2", "qwen2"])
@pytest.mark.parametrize("drop", [-1, 0, 1])
def test_a_dropped_layer_passes_nothing_back(name, drop):
    """Against finite differences of a run in which that layer writes what it wrote on the clean prompts."""
    model = tiny_model(name, dtype=torch.float64)
    task = make_task(model)
    start, shift = (
        embed(model, task.clean),
        torch.randn(3, 6, model.d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    )
    held = {}

    def run(x, keep):
        def visit(kind, layer, places):
            if kind == "b" or layer != drop:
                return None
            if keep:
                held[kind] = places["output"]
            return held[kind]

        return visit_modules(model, task.clean, visit, start=(0, x))

    with torch.no_grad():
        final = run(start, True)
    found = float(
        (
            write_gradients(model, task.clean, final_gradients(model, task, final), drop=drop)["embed"]
            * shift
        ).sum()
    )
    with torch.no_grad():
        high, low = (
            float(score_task(model, task, run(start + e * shift, False)).mean()) for e in (1e-5, -1e-5)
        )
    assert abs(found - (high - low) / 2e-5) < 1e-7 * max(1, abs(found)) and abs(found) > 1e-3


def three_layers(name):
    """A tiny model with its first layer once more at the end."""
    model = tiny_model(name, dtype=torch.float64)
    return replace(model, layers=[*model.layers, model.layers[0]])


def effects_while_held(model, task, held):
    """Mean size of each module's first-order effect while one layer writes what it wrote on clean prompts."""
    clean, other = (trace_modules(model, tokens, "layer") for tokens in (task.clean, task.corrupted))
    zeros = {}

    def visit(kind, layer, places):
        if kind == "b":
            return None
        zeros[f"{kind}{layer}"] = zero = torch.zeros_like(places["output"], requires_grad=True)
        moved = places["output"] + zero
        return moved.detach() if layer == held else moved

    final = visit_modules(model, task.clean, visit, start=(0, embed(model, task.clean)))
    grad = final_gradients(model, task, final.detach()) * len(task)
    slopes = torch.autograd.grad(final, list(zeros.values()), grad, materialize_grads=True)
    rows = {reader.module: reader.row for reader in list_readers(model, "layer")[0]}
    change = clean.writes - other.writes
    effects = {m: (change[:, :, rows[m]] * g).sum((1, 2)) for m, g in zip(zeros, slopes, strict=True)}
    effects["logits"] = ((clean.reads["logits"] - other.reads["logits"]) * grad).sum((1, 2))
    return {module: float(effect.detach().abs().mean()) for module, effect in effects.items()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox"])
def test_graddrop_is_the_published_mean(name):
    """A layer that is held keeps its own nodes too: L - 1 terms for them, L for what `logits` reads."""
    model = three_layers(name)
    task = make_task(model)
    sizes = pd.DataFrame([effects_while_held(model, task, layer) for layer in range(3)])
    wanted = sizes.sum() / [2 if module != "logits" else 3 for module in sizes]
    assert all(sizes[m][int(m[1])] == 0 for m in sizes if m != "logits") and (sizes["m2"][:2] > 1e-3).all()
    graph = patch_nodes(model, task, "layer", exact_softmax=False, run=QUIET)
    found = dict(zip(graph.edge_names, graph.edges["weight"], strict=True))
    for i in range(3):
        assert np.isclose(found[f"embed->m{i}"], wanted[f"m{i}"], rtol=1e-9)
        assert np.isclose(found[f"a{i}->logits"], min(wanted[f"a{i}"], wanted["logits"]), rtol=1e-9)
    assert np.isclose(found["embed->logits"], wanted["logits"], rtol=1e-9)


@pytest.mark.parametrize("nodes", ["layer", "head"])
@pytest.mark.parametrize("exact", [True, False])
def test_graddrop_leaves_direct_effects_as_they_are(nodes, exact):
    """No layer follows the last one, so that blocking the others changes nothing for its nodes and ports."""
    model = three_layers("llama")
    task = make_task(model)
    plain, dropped = (
        patch_nodes(model, task, nodes, exact_softmax=exact, grad_drop=drop, run=QUIET).edges
        for drop in (False, True)
    )
    last = plain["source"].isin(["embed"]) & plain["target"].astype(str).str.startswith(
        ("a2", "m2", "logits")
    )
    assert last.sum() >= 5 and (plain["weight"][last] > 0).all()
    assert np.allclose(plain["weight"][last], dropped["weight"][last], rtol=1e-9)
    assert not np.allclose(plain["weight"], dropped["weight"], rtol=0.05)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "qwen2"])
def test_patched_queries_and_keys_by_hand(name):
    """Each head's pattern anew for the other run's queries at all positions, and for its key at each
    position by itself."""
    model, layer = tiny_model(name, dtype=torch.float64), 1
    x, x0 = (trace_modules(model, random_tokens(model, 2, 6, seed=s)).reads[f"a{layer}"] for s in (3, 4))
    attn, tables = model.layers[layer].attn, rotary_tables(model, 6, layer)
    grad = torch.randn(2, 6, model.d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = torch.einsum("bpd, dhe -> bhpe", grad, attn.W_O)

    def heads(x, W, b):
        return project_heads(apply_norm(model.layers[layer].ln1, x), W, b, model.n_heads)

    q, k, q0, k0 = (
        rotate(heads(at, W, b), *tables, attn.rotary)
        for at in (x, x0)
        for W, b in ((attn.W_Q, attn.b_Q), (attn.W_K, attn.b_K))
    )
    v = heads(x, attn.W_V, attn.b_V)
    mask = attention_mask(attn, 6, x.device)

    def z(q, k):
        return (q @ k.mT * attn.scale).masked_fill(mask, -torch.inf).softmax(-1) @ v

    by_query = ((z(q, k) - z(q0, k)) * u).sum((2, 3))
    by_key = 0
    for t in range(6):
        moved = k.clone()
        moved[:, :, t] = k0[:, :, t]
        by_key = by_key + ((z(q, k) - z(q, moved)) * u).sum((2, 3))
    by_value = (z(q, k) * u).sum((2, 3)) - (
        (q @ k.mT * attn.scale).masked_fill(mask, -torch.inf).softmax(-1) @ heads(x0, attn.W_V, attn.b_V) * u
    ).sum((2, 3))
    assert torch.allclose(
        patch_ports(model, layer, x, x0, grad), torch.stack([by_query, by_key, by_value], 2), atol=1e-12
    )
    first, step = patch_ports(model, layer, x, x0, grad, False), 1e-5  # the derivative of the same
    near = (z(q, k) - z(q + step * (q0 - q), k)) / step, (z(q, k) - z(q, k + step * (k0 - k))) / step
    assert all(
        torch.allclose(first[:, :, i], (d * u).sum((2, 3)), rtol=1e-3, atol=1e-3) for i, d in enumerate(near)
    ) and torch.allclose(first[:, :, 2], by_value)


@torch.no_grad()
def test_exact_softmaxes_repair_a_saturated_head():
    """Induction: the second head's pattern is one-hot, so that its query has no gradient, and yet another
    query finds another token."""
    known = KNOWN["induction"]()

    def score(graph, edge):
        return float(graph.keep([edge]).edges["weight"].iloc[0])

    edge = "embed->a1.h0<q>"
    whole = score(patch_edges(known.model, known.task, judging=judging()), edge)
    first, repaired = (
        score(patch_nodes(known.model, known.task, exact_softmax=exact, grad_drop=False, run=QUIET), edge)
        for exact in (False, True)
    )
    difference = sum(
        s
        * float(
            score_task(known.model, known.task, trace_modules(known.model, tokens).reads["logits"]).mean()
        )
        for s, tokens in ((1, known.task.clean), (-1, known.task.corrupted))
    )
    assert whole > 0.9 and first < 1e-6 * difference and abs(repaired / difference - whole) < 0.05


@pytest.mark.parametrize("name", KNOWN)
def test_greedy_pruning_finds_the_known_circuit(name):
    known = KNOWN[name]()
    graph = prune_greedily(known.model, known.task, threshold=0.05, value="mean", judging=judging())
    assert set(graph.edge_names) == set(known.edges) and (graph.edges["weight"] >= 0.05).all()
    assert len(prune_greedily(known.model, known.task, threshold=1e9, value="mean", judging=judging())) == 0


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("grain", ["block", "layer", "head"])
@pytest.mark.parametrize("checkpoints", [True, False])
def test_shares_of_flow_sum_to_one(name, grain, checkpoints):
    model = tiny_model(name, dtype=torch.float64)
    for kind in ("l1", "inner"):
        edges = trace_flow(
            model,
            random_tokens(model, 3, 6),
            grain,
            proximity=Proximity(kind),
            checkpoints=checkpoints,
            run=Run(2, progress=False),
        ).edges
        assert (
            np.allclose(edges.groupby(["target", "port"], observed=True)["weight"].sum(), 1)
            and (edges["weight"] >= 0).all()
        )


@torch.no_grad()
def test_flow_by_hand():
    model = tiny_model("llama", dtype=torch.float64)
    tokens = random_tokens(model, 1, 4)
    trace, names = trace_modules(model, tokens, "layer"), list_readers(model, "layer")[1]

    def near(part, whole):
        return max(float(whole.abs().sum() - (whole - part).abs().sum()), 1e-6)

    whole, apart = {}, {}
    for p in range(1, 4):
        y = dict(zip(names, trace.writes[0, p], strict=True))
        stream, shares = y["embed"], {"embed": 1.0}
        for name in names[1:]:
            after = stream + y[name]
            both = near(stream, after) + near(y[name], after)
            shares = {w: s * near(stream, after) / both for w, s in shares.items()} | {
                name: near(y[name], after) / both
            }
            stream = after
        for w, s in shares.items():
            whole[w] = whole.get(w, 0) + s / 3
        total = sum(near(y[w], stream) for w in names)
        for w in names:
            apart[w] = apart.get(w, 0) + near(y[w], stream) / total / 3
    for wanted, checkpoints in ((whole, True), (apart, False)):
        edges = trace_flow(model, tokens, "layer", checkpoints=checkpoints, run=QUIET).edges
        into = edges[edges["target"] == "logits"].set_index("source")["weight"]
        assert all(np.isclose(into[w], s) for w, s in wanted.items())


def hand_shares(parts, whole):
    "The share of each part in a sum, by the L1 proximity."
    near = {}
    for name, part in parts.items():
        near[name] = max(float(whole.abs().sum() - (whole - part).abs().sum()), 1e-6)
    return {name: size / sum(near.values()) for name, size in near.items()}


def hand_streams(model, trace, nodes, p):
    "Shares of the writers in what each reader reads at a position, passed on from module to module."
    readers, writers = list_readers(model, nodes)
    written = dict(zip(writers, trace.writes[0, p], strict=True))
    first = writers[: readers[0].n_before]
    stream = sum(written[w] for w in first)
    shares, found = hand_shares({w: written[w] for w in first}, stream), {}
    for reader in readers:
        found[reader.module] = dict(shares)
        if reader.kind == "logits":
            break
        after = stream + sum(written[name] for name in reader.names)
        passed = hand_shares({"before": stream} | {name: written[name] for name in reader.names}, after)
        shares = {w: s * passed["before"] for w, s in shares.items()}
        shares |= {name: passed[name] for name in reader.names}
        stream = after
    return found


def hand_sources(model, trace, layer, nodes):
    "The share of each source position in what each head writes, or the whole layer; a loop over terms."
    attn, x = model.layers[layer].attn, trace.reads[f"a{layer}"]
    pattern = freeze_block(model, layer, x)["pattern"][0]
    v = project_qkv(model, layer, apply_norm(model.layers[layer].ln1, x), x.shape[1])[2][0]
    found = {}
    for group in [[h] for h in range(model.n_heads)] if nodes == "head" else [range(model.n_heads)]:
        name = f"a{layer}.h{group[0]}" if nodes == "head" else f"a{layer}"
        for query in range(x.shape[1]):
            terms = {
                source: sum(pattern[h, query, source] * (attn.W_O[:, h] @ v[h, source]) for h in group)
                for source in range(query + 1)
            }
            found[name, query] = hand_shares(terms, sum(terms.values()))
    return found


@torch.no_grad()
@pytest.mark.parametrize("nodes", ["layer", "head"])
@pytest.mark.parametrize("values_only", [False, True])
def test_routes_are_all_paths_back_from_the_predictions(nodes, values_only):
    "Each path is followed by itself, position by position, and its share added to the edges it takes."
    model, n_pos = tiny_model("llama", dtype=torch.float64), 3
    tokens = random_tokens(model, 1, n_pos)
    trace = trace_modules(model, tokens, nodes)
    streams = [hand_streams(model, trace, nodes, p) for p in range(n_pos)]
    sources = {}
    for layer in range(model.n_layers):
        sources |= hand_sources(model, trace, layer, nodes)
    weights, of_port = Counter(), {"v": 1} if values_only else {"q": 0.25, "k": 0.25, "v": 0.5}

    def follow(reader, p, influence):
        module = reader.split(".")[0]
        parts = of_port if module[0] == "a" else {"": 1}
        for port, part in parts.items():
            places = sources[reader, p] if port in ("k", "v") else {p: 1}
            for place, moved in places.items():
                for writer, share in streams[place][module].items():
                    passed = influence * part * moved * share
                    edge = f"{writer}->{reader}<{port}>" if port else f"{writer}->{reader}"
                    weights[edge] += passed
                    if writer[0] in "am":
                        follow(writer, place, passed)

    def check(data):
        graph = trace_routes(model, data, nodes, values_only=values_only, run=QUIET)
        found = dict(zip(graph.edge_names, graph.edges["weight"], strict=True))
        assert set(weights) <= set(found)
        assert all(np.isclose(found[edge], weights[edge], atol=1e-12) for edge in found)

    follow("logits", n_pos - 1, 1.0)
    check(Task(tokens, tokens, metric=lambda logits: logits[:, -1, 0]))
    weights.clear()
    for p in (1, 2):
        follow("logits", p, 0.5)
    check(tokens)


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("nodes", ["layer", "head"])
def test_routes_lose_no_influence(name, nodes):
    model = tiny_model(name, dtype=torch.float64)
    for checkpoints in (True, False):
        options = {"checkpoints": checkpoints, "run": Run(2, progress=False)}
        edges = trace_routes(model, random_tokens(model, 3, 6), nodes, **options).edges
        is_input = edges["source"].isin(["embed", "pos_embed", "const"])
        for some in (edges["target"] == "logits", is_input):
            assert np.isclose(edges["weight"][some].sum(), 1)


def test_routes_of_padded_prompts_are_those_of_the_prompts_alone():
    model = tiny_model("gpt2", dtype=torch.float64)
    clean, lengths = random_tokens(model, 2, 6), torch.tensor([4, 6])
    task = Task(clean, clean, metric=lambda logits: logits[:, -1, 0], lengths=lengths)
    alone = []
    for i, length in enumerate(lengths):
        prompt = clean[i : i + 1, :length]
        one = Task(prompt, prompt, metric=lambda logits: logits[:, -1, 0])
        alone.append(trace_routes(model, one, run=QUIET).edges["weight"])
    together = trace_routes(model, task, run=QUIET).edges["weight"]
    assert np.allclose(together, sum(alone) / 2)


@pytest.mark.parametrize("name", ["induction", "chain", "brackets", "gates"])
def test_masks_are_learned_and_drawn_by_their_seed(name):
    known = KNOWN[name]()
    graph = learn_masks(known.model, known.task, value="mean", judging=judging())
    assert set(graph.edges.assign(name=graph.edge_names).nlargest(len(known.edges), "weight")["name"]) == set(
        known.edges
    )
    few = [
        learn_masks(
            known.model,
            known.task,
            value="mean",
            config=MaskConfig(n_steps=5),
            judging=judging(seed=s, batch_size=7),
        ).edges["weight"]
        for s in (0, 0, 1)
    ]
    assert few[0].equals(few[1]) and not few[0].equals(few[2])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox"])
@pytest.mark.parametrize("value", ["corrupted", "mean"])
def test_gradients_along_masks_sum_to_what_the_whole_graph_is_worth(name, value):
    model = tiny_model(name, dtype=torch.float64)
    task, every = make_task(model), complete_graph(model, "head")
    found = integrate_masks(model, task, value=value, n_steps=24, judging=judging(batch_size=2)).edges[
        "weight"
    ]
    with torch.no_grad():
        own, none = (
            float(score_task(model, task, score_stream(model, every, task, value, mask)).mean())
            for mask in (1.0, 0.0)
        )
    assert abs(own - none) > 1e-2 and np.isclose(found.sum(), own - none, rtol=1e-3)
    point = torch.full((len(every),), 0.5, dtype=torch.float64, requires_grad=True)
    wanted = torch.autograd.grad(
        score_task(model, task, score_stream(model, every, task, value, point)).mean(), point
    )[0]
    assert np.allclose(
        integrate_masks(model, task, value=value, n_steps=1, judging=judging()).edges["weight"],
        wanted,
        rtol=1e-9,
        atol=1e-12,
    )


def score_stream(model, every, task, value, masks):
    "What `logits` reads in the graph of some masks."
    masks = masks if torch.is_tensor(masks) else torch.full((len(every),), masks, dtype=torch.float64)
    cut = cut_model(model, "head")
    values = read_value(value).fix(cut, AblatedText(task.clean, task.corrupted, run=QUIET))
    return next(iter(run_selections(cut, [ModuleSelection(masks, len(masks))], task.clean, values)))


def test_drawn_masks_follow_their_seed():
    model = tiny_model("llama", dtype=torch.float64)
    one, same, other = (
        integrate_masks(model, make_task(model), path="drawn", n_steps=3, judging=judging(seed=s)).edges[
            "weight"
        ]
        for s in (0, 0, 1)
    )
    assert one.equals(same) and not one.equals(other)


@torch.no_grad()
def test_reading_off():
    known = KNOWN["chain"]()
    table = logit_lens(known.model, known.task, run=Run(5))
    assert (
        table["layer"].tolist() == [-1, 0, 1, 2]
        and np.isclose(table["share"].iloc[-1], 1)
        and (table["share"].iloc[:-1].abs() < 1e-6).all()
    )
    logits = run_logits(known.model, trace_modules(known.model, known.task.clean).reads["logits"])[:, -1]
    assert np.isclose(
        table["score"].iloc[-1],
        float((logits.gather(1, known.task.answers) - logits.gather(1, known.task.wrong)).mean()),
    )


def test_refusals():
    model = tiny_model("llama", dtype=torch.float64)
    task, text = make_task(model), random_tokens(model, 2, 6)
    for run, words in [
        (lambda: build_graph(model, task, "head", target="metric", pattern="frozen"), "pattern is no option"),
        (lambda: build_graph(model, task, "head", target="metric", ports="merged"), "ports is no option"),
        (lambda: build_graph(model, text, "head", attribution="eap"), "attribution must be"),
        (
            lambda: build_graph(model, task, "head", target="metric", attribution="saliency"),
            "attribution must be",
        ),
        (lambda: build_graph(model, task, "neuron", target="metric"), "nodes must be"),
        (lambda: build_graph(model, replace(task, metric="accuracy"), "head", target="metric"), "a step"),
        (lambda: patch_nodes(model, task, "block"), "must be 'layer' or 'head'"),
        (lambda: patch_nodes(model, task, value="zero"), "value must be"),
        (lambda: Proximity("l2"), "proximity must be"),
        (lambda: Proximity(eps=0), "eps must be"),
        (lambda: trace_flow(model, text, skip_first=6), "skip_first must lie"),
        (lambda: trace_routes(model, text, skip_first=6), "skip_first must lie"),
        (lambda: trace_routes(model, text, "block"), "nodes must be 'layer' or 'head'"),
        (lambda: prune_greedily(model, text), "give a Task"),
        (lambda: integrate_masks(model, task, path="loop"), "path"),
        (lambda: integrate_masks(model, task, n_steps=0), "n_steps"),
        (lambda: learn_masks(model, task, judging=judging("loss")), "metric must be"),
        (
            lambda: score_graph(model, "head", np.full(len(list_edges(model)), np.nan), "none"),
            "must be finite",
        ),
        (lambda: random_graph(model, "neuron"), "nodes must be"),
    ]:
        with pytest.raises(ValueError, match=words):
            run()


def test_a_comparison_goes_on_where_it_stopped(tmp_path):
    known, calls = KNOWN["copy"](), []
    every = list_methods()

    def counted(name):
        def make(*args, **options):
            calls.append(name)
            return every[name](*args, **options)

        return make

    def compare_some(names, **options):
        return compare_methods(
            known.model,
            known.task,
            known.task,
            {name: counted(name) for name in names},
            [4, 1_000],
            out=tmp_path / "methods.csv",
            **options,
        )

    compare_some(["EAP"])
    table = compare_some(["EAP", "ACDC", "random"])
    assert (
        calls == ["EAP", "ACDC", "random"]
        and table.equals(pd.read_csv(tmp_path / "methods.csv").astype(table.dtypes))
        and not table.duplicated(["method", "ablation", "n_edges"]).any()
    )
    faith = table[table["ablation"] == "edge"].set_index(["method", "n_edges"])["faithfulness"]
    assert (
        np.isclose(faith["EAP", 4], 1, atol=1e-3)
        and np.isclose(faith["ACDC", 4], 1, atol=1e-3)
        and np.isclose(faith["EAP", 1_000], 1)
        and abs(faith["random", 4]) < 0.1
    )
    compare_some(["EAP"], seeds=(0, 1))
    assert calls[3:] == ["EAP"]  # of the second seed
    with pytest.raises(ValueError, match="at least one"):
        compare_some([])
    with pytest.raises(ValueError, match="seeds must hold at least one"):
        Comparing(seeds=())
    pd.DataFrame({"method": ["EAP"]}).to_csv(tmp_path / "methods.csv")
    with pytest.raises(ValueError, match="has no column 'nodes'"):
        compare_some(["EAP"])


def test_areas_are_means_over_the_range_of_budgets():
    known, budgets = KNOWN["induction"](), [2, 7, 20, 100]
    methods = {name: list_methods()[name] for name in ("EAP-IG", "ACDC")}

    def areas(n_edges):
        return compare_methods(known.model, known.task, known.task, methods, n_edges, n_boot=50)

    for _, rows in areas(budgets[::-1]).groupby(["method", "ablation"]):
        assert (
            rows["n_edges"].tolist() == budgets
            and np.allclose(rows["cpr"], np.trapezoid(rows["faithfulness"], budgets) / 98, atol=1e-4)
            and np.allclose(
                rows["cmd"], np.trapezoid((1 - rows["faithfulness"]).abs(), budgets) / 98, atol=1e-4
            )
        )
        assert (
            (rows["cpr_low"] <= rows["cpr"]).all()
            and (rows["cpr"] <= rows["cpr_high"]).all()
            and 0.5 < rows["cpr"].iloc[0] < 1.01
        )
        if rows["method"].iloc[0] == "ACDC":
            assert rows["n_kept"].tolist() == [2, 7, 7, 7]
    assert areas([7])["cpr"].isna().all()


def test_what_a_method_took():
    known = KNOWN["copy"]()

    def large(model, data, nodes, progress, seed=0):  # noqa: ARG001  (the shape of all)
        torch.ones(300 * 2**20 // 4).sum()  # 300 MB, gone when the graph is there
        return random_graph(model, nodes, seed)

    took = (
        compare_methods(
            known.model,
            known.task,
            known.task,
            {"random": list_methods()["random"], "large": large},
            [4],
        )
        .groupby("method")[["seconds", "memory"]]
        .max()
    )
    assert (
        250 < took.loc["large", "memory"] - took.loc["random", "memory"] < 400
        and (took["seconds"] >= 0).all()
    )


def test_seeds_draw_prompts_and_go_to_methods_that_draw():
    known, seen = KNOWN["copy"](), []

    def method(model, data, nodes, progress, seed):  # noqa: ARG001
        seen.append((seed, data.clean.tolist()))
        return random_graph(model, nodes, seed)

    # noqa: E731  (weights hold noise of another seed; prompts alone are taken)
    def draw(seed):
        return KNOWN["copy"](seed=seed).task

    table = compare_methods(
        known.model,
        draw,
        draw(9),
        {"mine": method},
        [4],
        seeds=(3, 4),
    )
    assert seen == [(s, draw(s).clean.tolist()) for s in (3, 4)] and sorted(set(table["seed"])) == [3, 4]


def test_several_rules_select_from_one_graph_found_once(tmp_path):
    """Each rule's rows are those that it has alone; a table that holds some is completed, not made again."""
    known, found = KNOWN["sort"](), []

    def method(model, data, nodes, progress):
        found.append(1)
        return list_methods()["EAP-IG"](model, data, nodes=nodes, progress=progress)

    def compared(selection, **options):
        rows = compare_methods(
            known.model, known.task, known.task, {"mine": method}, [3, 6], selection=selection, **options
        )
        return rows.drop(columns=["seconds", "memory"])

    rules = ["top", Top(signed=True), Coverage(share=0.5)]
    names = ["top", "top(signed=True)", "coverage(share=0.5)"]
    table = compared(rules)
    assert len(found) == 1 and table["selection"].unique().tolist() == names
    for name, rule in zip(names, rules, strict=True):
        alone, rows = compared(rule), table[table["selection"] == name].reset_index(drop=True)
        pd.testing.assert_frame_equal(alone, rows)
    assert not np.allclose(table["n_kept"][:4], table["n_kept"][8:])
    found.clear()
    out = tmp_path / "rules.csv"
    compared("top(signed=True)", out=out)
    pd.testing.assert_frame_equal(
        compared(rules, out=out).set_index("selection").loc[names].reset_index()[table.columns],
        table,
        check_dtype=False,
    )
    assert len(found) == 2 and len(pd.read_csv(out)) == len(table)
    compared(rules[::-1], out=out)
    assert len(found) == 2
    for selection, message in (([], "at least one rule"), (["top", "best"], "method must be one of")):
        with pytest.raises(ValueError, match=message):
            Comparing(selection=selection)


def test_methods_are_compared_on_text():
    """Every one, and what follows a metric's gradient has the derivative of the cross-entropy."""
    known = KNOWN["chain"]()
    text = known.task.clean
    table = compare_methods(
        known.model,
        text,
        text.flip(0),
        list_methods(),
        [4, 40],
        truth=known.edges,
    )
    assert set(table["method"]) == set(list_methods()) and set(table["task"]) == {"text"}
    found = table[(table["ablation"] == "edge") & (table["n_edges"] == 4)].set_index("method")
    assert all(
        np.isclose(found.loc[name, "faithfulness"], 1, atol=1e-3)
        and found.loc[name, "average_precision"] == 1
        for name in ("exact patching", "EAP", "EAP-IG", "ACDC", "edge pruning")
    )
    model = tiny_model("llama", dtype=torch.float64)
    every, tokens = complete_graph(model), random_tokens(model, 3, 6)
    masks = torch.ones(len(every), dtype=torch.float64, requires_grad=True)
    logp = run_ablated(model, every, tokens, value="mean", masks=masks).log_softmax(-1)
    wanted = torch.autograd.grad(logp[:, 1:-1].gather(-1, tokens[:, 2:, None]).mean(), masks)[0]
    assert (
        np.allclose(
            list_methods()["EAP"](model, tokens, nodes="head", progress=False).edges["weight"],
            wanted,
            rtol=1e-9,
            atol=1e-12,
        )
        and wanted.abs().max() > 1e-3
    )


def test_a_method_that_can_not_is_left_out():
    known = KNOWN["copy"]()
    some = {name: list_methods()[name] for name in ("AtP", "EAP")}
    with pytest.warns(UserWarning, match="AtP is left out: nodes must be 'layer' or 'head'"):
        table = compare_methods(
            known.model,
            known.task,
            known.task,
            some,
            [4],
            nodes="block",
        )
    assert set(table["method"]) == {"EAP"}
    with pytest.warns(UserWarning, match="EAP is left out: corrupted must differ from clean"):
        compare_methods(
            known.model,
            known.task.clean,
            known.task,
            {"EAP": list_methods(value="corrupted")["EAP"]},
            [4],
            progress=False,
        )
    with pytest.raises(ValueError, match="needs a Task"):
        compare_methods(known.model, known.task.clean, known.task, some, [4], value="corrupted")
    with pytest.raises(ValueError, match="edges must be among"):
        compare_methods(known.model, known.task, known.task, some, [4], truth=["a0->a1"])


def test_methods_of_features_are_compared_by_the_same_function(tmp_path):
    known = KNOWN_FEATURES["renamed over three layers"]()

    def values(model, text, dictionaries, progress, attribution="ig"):
        options = {"skip_first": 0, "keep": None, "progress": progress}
        return build_graph(model, text, dictionaries, attribution=attribution, **options)

    methods = {"ig": values, "gradient": partial(values, attribution="gradient")}
    truth = [f"{source}->{target}" for source, target, _ in known.edges]
    table = compare_methods(
        known.model,
        known.tokens,
        known.tokens,
        methods,
        [8, len(known.edges), 200],
        nodes=known.dictionaries,
        truth=truth,
        n_boot=20,
        out=tmp_path / "fine.csv",
        progress=False,
    )
    assert (
        set(table["method"]) == {"ig", "gradient"}
        and (table["roc_auc"] > 0.95).all()
        and table["nodes"].str.fullmatch(r"m0 \w{8}, m1 \w{8}, m2 \w{8}").all()
    )
    whole = table[(table["ablation"] == "edge") & (table["n_edges"] == 200)]
    assert np.allclose(whole["faithfulness"], 1, atol=1e-3)
