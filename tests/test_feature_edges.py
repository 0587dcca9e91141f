"""Edges between features: the closed form against automatic differentiation, groups, refusals."""

from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

import circuitgraph.build.features
import feature_oracles
from circuitgraph.attribution.method import Attribution
from circuitgraph.data.corpus import load_corpus
from circuitgraph.dictionary.places import neuron_basis, token_basis, visit_modules
from circuitgraph.dictionary.protocol import FunctionDictionary, find_structure
from circuitgraph.build.features import weigh_features
from circuitgraph.cut import cut_model, list_parts, part_ports, read_activity
from circuitgraph.attribution.autodiff import readers_vjp
from circuitgraph.model.blocks import apply_norm, head_scales, norm_scale, run_attention, run_logits
from circuitgraph.model.blocks import run_mlp, write_heads
from circuitgraph.model.loading import TINY_MODELS, load_model, tiny_model
from circuitgraph.model.modules import embed_tokens
from circuitgraph.data.task import Task
from circuitgraph.options import Pruning, Run
from feature_oracles import Hidden
from oracles import random_tokens
from short import build_graph

pytestmark = pytest.mark.filterwarnings("ignore", "error:::circuitgraph")


def weigh(model, tokens, dictionaries, rule, others="layer", **options):
    """All edges between features over a text, nothing pruned."""
    cut, run = cut_model(model, dictionaries, others), Run(progress=False, **options)
    return weigh_features(cut, tokens, rule, pruning=Pruning(n_edges=None), run=run)


draw = partial(feature_oracles.draw, d_dict=11, k=4)
all_dictionaries = partial(feature_oracles.all_dictionaries, d_dict=11, k=4)


class Tally:
    """Sums of edges `{(source, target, port): (sum, absolute sum, sum of squares)}`."""

    def __init__(self, rule):
        self.rule, self.sums, self.complete = rule, {}, []

    def add(self, reader, value, read, writers, ports):
        """Add one reader at one position, and `(change of its value, sum of its weights)` to `complete`."""
        weights, change = weigh_one(value, read, writers, self.rule, ports)
        self.complete.append((change, sum(w for port in weights.values() for w in port.values())))
        for port, edges in weights.items():
            for source, w in edges.items():
                old = self.sums.get((source, reader, port), np.zeros(3))
                self.sums[source, reader, port] = old + np.array([w, abs(w), w * w])


def write_part(model, part, read, y):
    """What the nodes of a part write, what it adds to `const`, and the stream after it."""
    layer, d = model.layers[part.layer], part.dictionary
    own = layer.attn.b_O if part.kind == "attn" else layer.mlp.b_out
    bears_bias = own is not None and (part.head == 0 or part.head < 0 and d is None)
    bias = own if bears_bias else torch.zeros(model.d_model, dtype=model.dtype)
    after = y + (own if own is not None and part.head == 0 else 0)
    if d is None:
        return {part.module: y - (0 if own is None or part.head >= 0 else own)}, bias, after
    place = {"output": y, "stream": read + y}.get(d.reads)
    if place is None:
        place = place_value(model, part, read, [read] * 3, norm_of(model, part, read), y)
    written, b_dec = decompose(part, place, y)
    return written, bias + b_dec, after


def decompose(part, place, y):
    """What features and error node write, and the bias of the decoder."""
    d = part.dictionary
    acts = d.encode(place)
    written = {f"{part.module}/{i}": acts[:, i : i + 1] * d.W_dec[i] for i in range(d.d_dict)}
    return written | {f"{part.module}/err": y - d.decode(acts)}, d.b_dec


def tally_logits(tally, model, tokens, x, writers):
    """Add the margins of the next tokens of one sequence."""
    scale = norm_scale(model.ln_final, x)[None]

    def margin(xs, p):
        logits = run_logits(model, xs[0][None], scale=scale)[0, p]
        return logits[tokens[p + 1]] - logits.mean()

    for p in range(tally.rule.skip_first, len(x) - 1):
        tally.add("logits", partial(margin, p=p), x, writers, ("logits",))


@torch.no_grad()
def by_definition(model, tokens, dictionaries, rule, others="layer"):
    """Every edge with each gradient taken by automatic differentiation; and completeness of each reader."""
    parts, nodes = list_parts(model, dictionaries, others)
    tally = Tally(rule)
    for sequence in tokens:
        embedded = embed_tokens(model, sequence[None])
        written = {name: y.expand(1, len(sequence), -1)[0] for name, y in embedded.items()}
        bias, x = torch.zeros(model.d_model, dtype=model.dtype), sum(written.values())
        for part in parts:
            if part.kind == "embed":
                y = written.pop("embed")
                more, bias = decompose(part, y, y)
                written |= more
                continue
            if part.kind == "attn" and part.head <= 0:
                before = x, bias, dict(written)
            early = model.layers[part.layer].parallel or part.kind == "attn"
            read, const, writers = before if early else (x, bias, dict(written))
            writers = {**writers, "const": const.expand(len(read), -1)}
            y, values = module_values(model, part, read)
            for node, active in values.items():
                for value in active[rule.skip_first :]:
                    if value is not None:
                        tally.add(node, value, read, writers, part_ports(part, rule))
            more, more_bias, after = write_part(model, part, read, y)
            written, bias, x = written | more, bias + more_bias, x + after
        tally_logits(tally, model, sequence, x, {**written, "const": bias.expand(len(x), -1)})
    sums = {key: total for key, total in tally.sums.items() if total[1] > 0}
    return sums, np.array(tally.complete), list(nodes["name"])


def norm_of(model, part, read):
    return norm_scale(
        model.layers[part.layer].ln1 if part.kind == "attn" else model.layers[part.layer].ln2, read
    )


def attend(model, part, xs, read, scale):
    """What the heads of a part mix, all its scales frozen where it reads `read`."""
    scales = head_scales(model, part.layer, apply_norm(model.layers[part.layer].ln1, read)[None])
    return run_attention(model, part.layer, *(x[None] for x in xs[:3]), scale=scale[None], head_scales=scales)


def run_part(model, part, xs, read, scale, post_scale):
    layer = model.layers[part.layer]
    if part.kind == "mlp":
        out, post = run_mlp(model, part.layer, xs[0][None], scale=scale[None], post_scale=post_scale)
        return (out + (0 if layer.mlp.b_out is None else layer.mlp.b_out))[0], post
    out, post = write_heads(
        model,
        part.layer,
        attend(model, part, xs, read, scale),
        post_scale=post_scale,
    )
    if part.head >= 0:
        return out[0, :, part.head], post
    return (out.sum(2) + (0 if layer.attn.b_O is None else layer.attn.b_O))[0], post


def place_value(model, part, read, xs, scale, y):
    norm = model.layers[part.layer].ln1 if part.kind == "attn" else model.layers[part.layer].ln2
    reads = part.dictionary.reads
    if reads == "z":
        return attend(model, part, xs, read, scale).transpose(1, 2).flatten(2)[0]
    bare = type(norm)(norm.kind, None, None, norm.eps)
    return {
        "output": lambda: y,
        "stream": lambda: read + y,
        "input": lambda: read,
        "normed": lambda: apply_norm(norm, read, scale),
        "scaled": lambda: apply_norm(bare, read, scale),
    }[reads]()


def module_values(model, part, read):
    """What a part writes, and the value of each node and position as a function of what its ports read.

    The last port is the encoder's own; None where there is no reader."""
    scale, d = norm_of(model, part, read), part.dictionary
    y, post = run_part(model, part, [read] * 3, read, scale, None)

    def out(xs):
        return run_part(model, part, xs, read, scale, post)[0]

    if d is None:
        bias = (
            model.layers[part.layer].attn.b_O if part.kind == "attn" else model.layers[part.layer].mlp.b_out
        )
        own = y - (0 if bias is None or part.head >= 0 else bias)
        return y, {
            part.module: [
                lambda xs, p=p: (out(xs)[p] * own[p]).sum() / own[p].square().sum() for p in range(len(read))
            ]
        }
    known = find_structure(d)

    def pre(xs):
        return place_value(model, part, xs[-1], xs[:3], scale, out(xs)) @ known.W_enc + known.b_enc

    clean = pre([read] * 4)
    slope, acts = known.gate.slope(clean), known.gate(clean)
    error = y - d.decode(acts)
    unit = error / error.norm(dim=1, keepdim=True)
    values = {
        f"{part.module}/{j}": [
            (lambda xs, p=p, j=j: slope[p, j] * pre(xs)[p, j]) if acts[p, j] != 0 else None
            for p in range(len(read))
        ]
        for j in range(d.d_dict)
    }
    on = (acts != 0) * slope
    return y, values | {
        f"{part.module}/err": [
            lambda xs, p=p: unit[p] @ (out(xs)[p] - (on[p] * pre(xs)[p]) @ known.W_dec)
            for p in range(len(read))
        ]
    }


def weigh_one(value, read, writers, rule, ports):
    """Integrated gradients `{port: {source: weight}}` of one reader, and the change of its value."""
    names = {"q": 0, "k": 1, "v": 2, "mlp": 0, "logits": 0, "in": 3}
    grads = [torch.zeros_like(read) for _ in range(4)]
    for alpha, weight in rule.steps:
        with torch.enable_grad():
            xs = [(alpha * read).requires_grad_() for _ in range(4)]
            found = torch.autograd.grad(value(xs), xs, allow_unused=True)
        for total, grad, x in zip(grads, found, xs, strict=True):
            total += weight * (torch.zeros_like(x) if grad is None else grad)
    if rule.ports == "merged":
        grads, names = [sum(grads)] * 4, names | {"in": 0}
    change = float(value([read] * 4) - value([torch.zeros_like(read)] * 4))
    return {
        port: {source: float((grads[names[port]] * c).sum()) for source, c in writers.items()}
        for port in ports
    }, change


def as_sums(edges, n, n_logits):
    over = np.where(edges["target"].astype(str) == "logits", n_logits, n)
    return {
        key: np.array(row)
        for key, *row in zip(
            zip(
                edges["source"].astype(str),
                edges["target"].astype(str),
                edges["port"].astype(str),
                strict=True,
            ),
            edges["weight"] * over,
            edges["abs_weight"] * over,
            edges["rms_weight"] ** 2 * over,
            strict=True,
        )
    }


def compare(model, tokens, dictionaries, rule, rtol=1e-6, others="layer"):
    nodes, edges = weigh(model, tokens, dictionaries, rule, others, batch_size=2)
    wanted, complete, names = by_definition(model, tokens, dictionaries, rule, others)
    got = as_sums(
        edges,
        tokens.numel() - len(tokens) * rule.skip_first,
        tokens.numel() - len(tokens) * (rule.skip_first + 1),
    )
    assert list(nodes["name"]) == names and np.allclose(nodes["kept"], 1)
    assert len(wanted) > 60
    largest = max(sums[1] for sums in wanted.values())
    for key in wanted.keys() | got.keys():
        assert np.allclose(
            wanted.get(key, np.zeros(3)), got.get(key, np.zeros(3)), rtol=rtol, atol=1e-9 * largest
        ), (key, wanted.get(key), got.get(key))
    return complete


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "gemma2", "attention-only"])
@pytest.mark.parametrize("tokens_only", [False, True])
def test_edges_from_the_embedding_are_the_gradients_of_each_value(name, tokens_only):
    model = tiny_model(name, dtype=torch.float64)
    tokens = random_tokens(model, 2, 5)
    embedding = token_basis(model, tokens[:1]) if tokens_only else draw(model, "embed", gate="relu")
    dictionaries = {"embed": embedding, "a1": draw(model, "a1")}
    compare(model, tokens, dictionaries, Attribution(n_steps=4))
    compare(model, tokens, dictionaries, Attribution(n_steps=4, ports="merged"), others="head")


@pytest.mark.parametrize("name", TINY_MODELS)
def test_edges_are_the_gradients_of_each_value(name):
    model = tiny_model(name, dtype=torch.float64)
    complete = compare(model, random_tokens(model, 2, 5), all_dictionaries(model), Attribution(n_steps=16))
    error = np.abs(complete[:, 0] - complete[:, 1]).max() / np.abs(complete[:, 0]).max()
    assert error < (1e-2 if "relu" in name else 1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"reads": "stream"},
        {"reads": "z"},
        {"reads": "normed"},
        {"reads": "input"},
        {"reads": "scaled"},
        {"gate": "gated"},
        {"gate": "jumprelu"},
        {"gate": "relu"},
        {"gate": "none"},
    ],
    ids=str,
)
def test_places_and_gates(options):
    model = tiny_model("qwen2", dtype=torch.float64)
    dictionaries = all_dictionaries(model, **{k: v for k, v in options.items() if v != "z"})
    if options.get("reads") == "z":
        dictionaries["a1"] = draw(model, "a1", reads="z")
    compare(model, random_tokens(model, 2, 5, seed=4), dictionaries, Attribution(n_steps=3))


@pytest.mark.parametrize(
    "rule",
    [Attribution(attribution="gradient"), Attribution(ports="merged", n_steps=3)],
    ids=["gradient", "merged"],
)
@pytest.mark.parametrize("which", ["every module", "some modules"])
def test_rules_and_mixed_grains(rule, which):
    model = tiny_model("llama", dtype=torch.float64)
    dictionaries = all_dictionaries(model)
    if which == "some modules":
        dictionaries = {name: dictionaries[name] for name in ("m0", "a1")}
    compare(model, random_tokens(model, 2, 5, seed=4), dictionaries, rule)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gpt-neox", "gemma2"])
@pytest.mark.parametrize("modules", [("m0",), ("a0.h1", "m0", "a1")], ids=str)
@pytest.mark.parametrize(
    "rule", [Attribution(n_steps=3), Attribution(ports="merged", n_steps=3)], ids=["split", "merged"]
)
def test_heads(name, modules, rule):
    model = tiny_model(name, dtype=torch.float64)
    compare(
        model,
        random_tokens(model, 2, 5),
        {module: draw(model, module) for module in modules},
        rule,
        others="head",
    )


def build(model, tokens, dictionaries, **options):
    return build_graph(model, tokens, dictionaries, n_steps=3, progress=False, **options)


def test_groups_and_batches_change_nothing():
    model = tiny_model("llama", dtype=torch.float64)
    tokens, dictionaries = random_tokens(model, 5, 6), all_dictionaries(model)
    whole = build(model, tokens, dictionaries, keep=None)
    for options in ({"batch_size": 2}, {"memory": 32 * 3 * 60 * 2}):
        assert_same(whole, build(model, tokens, dictionaries, keep=None, **options))


def test_shards_merge_to_the_whole():
    model = tiny_model("llama", dtype=torch.float64)
    tokens, dictionaries = random_tokens(model, 5, 6), all_dictionaries(model)
    whole, parts = (
        build(model, tokens, dictionaries, keep=None),
        [build(model, shard, dictionaries, keep=None) for shard in (tokens[:1], tokens[1:])],
    )
    assert len(parts[0]) < len(whole)
    assert_same(whole, parts[0].merge(parts[1]))

    def into(graph):
        total = graph.edges.groupby("target", observed=False)["abs_weight"].sum()
        return total.reindex(whole.nodes["name"], fill_value=0).to_numpy()

    pruned = [build(model, shard, dictionaries, keep=3) for shard in (tokens[:1], tokens[1:])]
    with pytest.warns(UserWarning, match=r"pruned in one text .* Pruning\(n_edges=None\)"):
        few = pruned[0].merge(pruned[1])
    read = into(whole) > 0
    assert (
        np.allclose(few.nodes["kept"][read], into(few)[read] / into(whole)[read])
        and few.nodes["kept"][read].min() < 0.7
    )
    with pytest.raises(ValueError, match=r"merged before they are cut, but one has the step .top_edges\(5"):
        parts[0].merge(parts[1].top_edges(5))
    with pytest.raises(ValueError, match="must agree in 'dictionaries'"):
        parts[0].merge(build(model, tokens[1:], {"m0": dictionaries["m0"]}, keep=None))


def assert_same(a, b):
    pd.testing.assert_frame_equal(a.nodes, b.nodes)
    assert a.edge_names == b.edge_names and np.array_equal(a.edges["count"], b.edges["count"])
    for column in ("weight", "abs_weight", "rms_weight"):
        assert np.allclose(a.edges[column], b.edges[column], rtol=1e-9, atol=1e-12)


def test_kept_is_the_share_that_pruning_leaves():
    model = tiny_model("llama", dtype=torch.float64)
    tokens, dictionaries = random_tokens(model, 3, 6), all_dictionaries(model)
    whole, few = build(model, tokens, dictionaries, keep=None), build(model, tokens, dictionaries, keep=5)
    kept = few.nodes.set_index("name")["kept"]

    def into(graph, name):
        return graph.edges[graph.edges["target"].astype(str) == name]["abs_weight"]

    assert len(into(few, "m1/3")) == 5
    assert np.isclose(into(few, "m1/3").sum(), into(whole, "m1/3").nlargest(5).sum())
    assert np.isclose(kept["m1/3"], into(few, "m1/3").sum() / into(whole, "m1/3").sum())
    for name in ("a1/err", "logits"):  # a whole module, and the error of one, keep what they read
        assert len(into(few, name)) == len(into(whole, name)) > 5 and np.isclose(kept[name], 1)
    assert build(model, tokens, dictionaries, keep=None, share=0.1).edges.shape[0] < len(whole)


def test_pruning_by_mass_keeps_the_fewest_edges_that_hold_it():
    model = tiny_model("llama", dtype=torch.float64)
    tokens, dictionaries = random_tokens(model, 3, 6), all_dictionaries(model)
    _, whole = weigh(model, tokens, dictionaries, Attribution())
    cut, pruning = cut_model(model, dictionaries), Pruning(None, mass=0.7)
    nodes, edges = weigh_features(cut, tokens, Attribution(), pruning=pruning, run=Run(progress=False))
    share = nodes.set_index("name")["kept"]
    fine = [name for name in set(whole["target"]) if "/" in name and not name.endswith("err")]
    assert len(fine) > 20
    for name in fine:
        size = whole[whole["target"] == name]["abs_weight"].sort_values(ascending=False).to_numpy()
        held = size.cumsum() / size.sum()
        n_needed = int(np.searchsorted(held, 0.7)) + 1
        assert (edges["target"] == name).sum() == n_needed
        assert np.isclose(share[name], held[n_needed - 1])


@pytest.mark.parametrize("layer", [3, 20])
def test_completeness_on_a_real_model(layer):
    model = load_model("smollm2-135m")
    tokens = load_corpus("default", model, 64, seq_len=32)
    dictionaries = {f"{kind}{layer}": draw(model, f"{kind}{layer}", d_dict=400) for kind in "am"}
    _, edges = weigh(model, tokens, dictionaries, Attribution(n_steps=16))
    parts = [part for part in list_parts(model, dictionaries)[0] if part.dictionary is not None]
    activity, into, late = (
        read_activity(model, tokens, parts),
        edges.groupby("target", observed=True)["weight"].sum(),
        (torch.arange(32) > 0).repeat(2),
    )
    for part in parts:
        read = activity.reads[part.module].view(2, 32, -1)

        def pre(xs, part=part, read=read):
            return (
                torch.cat(
                    [
                        run_part(model, part, [x] * 3, clean, norm_of(model, part, clean), None)[0]
                        for x, clean in zip(xs, read, strict=True)
                    ]
                )
                @ part.structure.W_enc
            )

        active = (
            torch.zeros(64, 400).scatter(1, activity.index[part.module], activity.value[part.module]) != 0
        )
        change = ((pre(read) - pre(torch.zeros_like(read))) * active)[late].mean(0)
        found = into.reindex([f"{part.module}/{j}" for j in range(400)]).fillna(0).to_numpy()
        assert (active.sum(1) == 4).all() and np.abs(found - change.numpy()).max() < 1e-3 * float(
            change.abs().max()
        )


def test_dead_features_stay():
    model = tiny_model("llama", dtype=torch.float64)
    dead = replace(draw(model, "m0", gate="relu"), b_enc=torch.full((11,), -1e3, dtype=torch.float64))
    graph = build(model, random_tokens(model, 2, 6), {"m0": dead})
    nodes = graph.nodes.set_index("name")
    assert (
        (nodes.loc[[f"m0/{i}" for i in range(11)], "frequency"] == 0).all()
        and nodes.loc["m0/err", "frequency"] == 1
        and not graph.edges["source"].astype(str).str.match(r"m0/\d").any()
    )


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    model = tiny_model("llama", dtype=torch.float64)
    tokens, dictionaries = random_tokens(model, 3, 6), all_dictionaries(model)
    whole, calls = build(model, tokens, dictionaries), []

    def stop_late(*args, real=circuitgraph.build.features.add_part):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr("circuitgraph.build.features.add_part", stop_late)
        with pytest.raises(KeyboardInterrupt):
            build(model, tokens, dictionaries, checkpoint=tmp_path / "run", batch_size=3)
    done = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert done == ["edges-0.parquet", "edges-1.parquet", "edges-2.parquet", "request.json"]
    with monkeypatch.context() as patch:
        patch.setattr(
            "circuitgraph.build.features.add_part",
            lambda *args, real=circuitgraph.build.features.add_part: calls.append(1) or real(*args),
        )
        assert (
            build(model, tokens, dictionaries, checkpoint=tmp_path / "run", batch_size=3) == whole
            and len(calls) == 4
        )  # one part was left, and the logits
    for other in ({"keep": 7}, {"mass": 0.9}):
        with pytest.raises(ValueError, match="belongs to a run with another"):
            build(model, tokens, dictionaries, checkpoint=tmp_path / "run", **other)


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (lambda d: {"m7": replace(d["m0"], module="m7")}, {}, "there is no 'm7'"),
        (lambda d: {"m1": d["m0"]}, {}, "must stand under the names"),
        (lambda d: {"m0": d["m0"]}, {"others": None}, "a0 has no dictionary"),
        (lambda d: d, {"others": "neuron"}, "others must be"),
        (lambda d: d, {"memory": 100}, "memory must hold the sums of one reader"),
        (lambda d: d, {"keep": 0}, "n_edges must be at least 1"),
        (lambda d: d, {"share": 1.0}, "share must lie"),
        (lambda d: d, {"mass": 0.0}, "mass must lie"),
        (lambda d: d, {"baseline": "mean"}, "zero baseline"),
        (lambda d: {"b0": replace(d["m0"], module="b0")}, {}, "'b0': the residual stream .* Give .* a0"),
        (lambda d: d | {"a0.h1": replace(d["a0"], module="a0.h1")}, {}, "a layer or of its heads"),
    ],
)
def test_refusals(change, options, words):
    model = tiny_model("llama", dtype=torch.float64)
    with pytest.raises(ValueError, match=words):
        build(model, random_tokens(model, 2, 6), change(all_dictionaries(model)), **options)


def test_no_text_and_what_a_place_can_not_give_are_refused():
    model, parallel = tiny_model("llama", dtype=torch.float64), tiny_model("gpt-neox", dtype=torch.float64)
    with pytest.raises(ValueError, match="data must not be empty"):
        build(model, random_tokens(model, 2, 6)[:0], all_dictionaries(model))
    nonlinear = FunctionDictionary(
        "m0",
        "output",
        11,
        lambda x: x[..., :11].tanh(),
        lambda a: a @ torch.ones(11, model.d_model, dtype=a.dtype),
    )
    with pytest.raises(ValueError, match="affine"):
        build(model, random_tokens(model, 1, 6), {"m0": nonlinear}, positions="keep")
    with pytest.raises(ValueError, match="parallel layer"):
        build(parallel, random_tokens(parallel, 2, 6), {"m0": draw(parallel, "m0", reads="stream")})


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize(
    "rule",
    [Attribution(n_steps=3), Attribution(ports="merged", n_steps=3), Attribution(pattern="frozen")],
    ids=["split", "merged", "frozen"],
)
def test_compiled_loops_and_plain_products_agree(monkeypatch, name, rule):
    model = tiny_model(name, dtype=torch.float64)
    tokens, dictionaries = (
        random_tokens(model, 3, 6),
        all_dictionaries(model, reads="stream" if name == "llama" else "output"),
    )
    fast = weigh(model, tokens, dictionaries, rule)[1]
    monkeypatch.setattr("circuitgraph.build.features.is_compiled", lambda _: False)
    plain = weigh(model, tokens, dictionaries, rule)[1]
    pd.testing.assert_frame_equal(fast, plain, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-neox"])
@pytest.mark.parametrize(
    "modules", [("a0", "m0", "a1", "m1"), ("a0.h1", "m0", "a1")], ids=["every module", "a head"]
)
def test_effects_on_a_metric(name, modules):
    """Against the edges of each prompt with positions kept, times the metric's gradient by each value."""
    model = tiny_model(name, dtype=torch.float64)
    clean, dictionaries = random_tokens(model, 3, 6), {module: draw(model, module) for module in modules}
    task = Task(
        clean, clean.flip(0), answers=torch.tensor([[1], [2], [3]]), wrong=torch.tensor([[4], [5], [6]])
    )
    graph = build_graph(
        model, task, dictionaries, target="metric", n_steps=3, keep=None, skip_first=0, progress=False
    )
    found = dict(
        zip(
            zip(
                graph.edges["source"].astype(str),
                graph.edges["target"].astype(str),
                graph.edges["port"].astype(str),
                strict=True,
            ),
            graph.edges["weight"],
            strict=True,
        )
    )
    effects, wanted = effects_by_splicing(model, task, dictionaries), {}
    for b, sequence in enumerate(clean):
        edges = build_graph(
            model,
            sequence[None],
            dictionaries,
            positions="keep",
            n_steps=3,
            keep=None,
            n_logits=1,
            progress=False,
        ).edges
        for source, target, port, weight in zip(
            edges["source"].astype(str),
            edges["target"].astype(str),
            edges["port"].astype(str),
            edges["weight"],
            strict=True,
        ):
            if port == "logits":
                continue
            (reader, p), key = target.split("@"), (source.split("@")[0], target.split("@")[0], port)
            wanted[key] = wanted.get(key, 0.0) + weight * float(effects[reader][b, int(p)])
    assert len(wanted) > 60
    largest = max(map(abs, wanted.values()))
    for key, weight in wanted.items():
        assert abs(weight - found.get(key, 0.0)) < 1e-9 * largest, key
    assert {key for key in found if key[2] != "logits"} <= set(wanted) and graph.meta[
        "target"
    ] == f"logit_diff of {task.name}"
    for data, target, words in ((task, "node", "a task goes with"), (clean, "metric", "a task goes with")):
        with pytest.raises(ValueError, match=words):
            build_graph(model, data, dictionaries, target=target)


def effects_by_splicing(model, task, dictionaries):
    """Gradient of the mean metric at every value `[prompt pos]`, by node.

    Leaves move activations and errors, and scale modules and heads without dictionary."""
    leaves, parts = {}, list_parts(model, dictionaries)[0]

    def splice(kind, layer, places):
        out = places["output"]
        for part in [part for part in parts if part.place == f"{kind}{layer}"]:
            y, d = places["output"] if part.head < 0 else places["heads"][:, :, part.head], part.dictionary
            own = (
                None
                if part.head >= 0
                else model.layers[layer].attn.b_O
                if kind == "a"
                else model.layers[layer].mlp.b_out
            )
            size = y.new_zeros(y.shape[:2]).requires_grad_()
            if d is None:
                leaves[part.module], unit = (size,), (y - (0 if own is None else own)).detach()
            else:
                acts = d.encode(y)
                more, error = torch.zeros_like(acts).requires_grad_(), y - d.decode(acts)
                leaves[part.module], unit = (size, more), (error / error.norm(dim=-1, keepdim=True)).detach()
                out = out + d.decode(acts + more) - d.decode(acts)
            out = out + size[..., None] * unit
        return out

    x = visit_modules(model, task.clean, splice)
    logits = run_logits(model, x)
    last = logits[torch.arange(len(task)), task.last]
    score = (last.gather(1, task.answers) - last.gather(1, task.wrong)).mean()
    found = {}
    for name, (size, *more) in leaves.items():
        grads = torch.autograd.grad(score, [size, *more], retain_graph=True)
        found[f"{name}/err" if more else name] = grads[0]
        for grad in grads[1:]:
            found |= {f"{name}/{j}": grad[..., j] for j in range(grad.shape[-1])}
    return found


@pytest.mark.parametrize("name", ["llama", "gemma2", "no-norm-relu"])
@pytest.mark.parametrize("ports", ["split", "merged"])
def test_functions_get_the_edges_of_what_they_compute(name, ports):
    model = tiny_model(name, dtype=torch.float64)
    tokens = random_tokens(model, 2, 5)
    known = all_dictionaries(model, gate="none") | {"m1": draw(model, "m1", gate="none", reads="normed")}
    options = {"rule": Attribution(n_steps=3, ports=ports)}
    wanted = weigh(model, tokens, known, **options)[1]
    for hidden in (("a1", "m0"), tuple(known)):
        nodes, found = weigh(
            model, tokens, {key: Hidden(d) if key in hidden else d for key, d in known.items()}, **options
        )
        both = wanted.merge(
            found, on=["source", "target", "port"], how="outer", suffixes=("", "_found")
        ).fillna({c: 0.0 for c in ("weight", "weight_found", "abs_weight", "abs_weight_found")})
        for column in ("weight", "abs_weight", "rms_weight"):
            assert np.allclose(
                both[column].fillna(0),
                both[f"{column}_found"].fillna(0),
                rtol=1e-6,
                atol=1e-9 * wanted[column].abs().max(),
            ), column
        few = weigh(
            model,
            tokens,
            {key: Hidden(d) if key in hidden else d for key, d in known.items()},
            **options,
            memory=32 * 3 * 60 * 2,
        )[1]
        pd.testing.assert_frame_equal(found, few, rtol=1e-9)


def test_nonlinear_encoders_and_decoders_are_complete():
    """Weights into a feature sum to the change of its activation, with a nonlinear decoder too."""
    model = tiny_model("llama", dtype=torch.float64)
    tokens, dictionaries = random_tokens(model, 3, 6), {}
    for key, d in all_dictionaries(model, gate="none").items():
        dictionaries[key] = FunctionDictionary(
            key,
            "output",
            d.d_dict,
            lambda x, d=d: d.encode(x).tanh(),
            lambda a, d=d: d.decode(a + 0.3 * a.square()),
        )
    rule = Attribution(n_steps=16)
    nodes, edges = weigh(model, tokens, dictionaries, rule)
    into = edges.groupby("target", observed=False)["weight"].sum()
    parts, _ = list_parts(model, dictionaries)
    activity = read_activity(model, tokens, parts)
    late = (torch.arange(6) > 0).repeat(3)
    for part in parts:
        pulls = [
            readers_vjp(model, part.module, part.dictionary, x, index, rule).change
            for x, index in zip(
                activity.reads[part.module], activity.index[part.module].unflatten(0, (3, 6)), strict=True
            )
        ]
        change, index = (
            torch.cat(pulls)[late],
            torch.cat([activity.index[part.module], torch.full((18, 1), part.n_nodes - 1)], 1)[late],
        )
        total = torch.zeros(part.n_nodes, dtype=torch.float64).index_add(
            0, index.flatten(), change.flatten()
        ) / int(late.sum())
        names = [f"{part.module}/{j}" for j in range(part.n_nodes - 1)] + [f"{part.module}/err"]
        assert np.allclose(into[names], total, atol=1e-5 * edges["abs_weight"].max()), part.module
    merged = [weigh(model, t, dictionaries, rule)[1] for t in (tokens[:1], tokens[1:])]
    assert len(merged[0]) and len(merged[1])


def test_neurons_are_features_without_an_error():
    model = tiny_model("llama", dtype=torch.float64)
    tokens, dictionaries = (
        random_tokens(model, 3, 6),
        all_dictionaries(model) | {name: neuron_basis(model, name) for name in ("m0", "m1")},
    )
    graph = build_graph(model, tokens, dictionaries, n_steps=16, keep=None, progress=False)
    nodes, into = graph.nodes.set_index("name"), graph.edges.groupby("target", observed=False)["weight"].sum()
    assert nodes.loc["m1/err", "mean_activation"] < 1e-12 and into["m1/err"] == 0
    activity = read_activity(model, tokens, list_parts(model, dictionaries)[0])
    value = (
        torch.zeros(18, 32, dtype=torch.float64)
        .scatter(1, activity.index["m1"], activity.value["m1"])[(torch.arange(6) > 0).repeat(3)]
        .mean(0)
    )
    assert np.allclose(
        into[[f"m1/{j}" for j in range(32)]], value, atol=1e-9
    )  # a gated neuron without biases is zero at an empty input
