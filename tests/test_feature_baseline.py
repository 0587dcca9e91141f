"""The rivals that draw graphs of features: each against its definition in plain loops, on models small enough for that; and EAP-IG over activations."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from circuitgraph.ablate import ablation_curve
from circuitgraph.attribution import Rule
from circuitgraph.baseline import patch_edges
from circuitgraph.build import build_graph
from circuitgraph.dictionary import FunctionDictionary, Gate, LinearDictionary
from circuitgraph.feature_baseline import ablate_circuit_nodes, find_feature_circuit, list_feature_methods, random_features, trace_contributions, weigh_interactions
from circuitgraph.feature_general import score_task
from circuitgraph.model import embed_tokens, list_readers, run_logits, tiny_model
from circuitgraph.task import Task
from circuitgraph.train import train_interaction_bases
from feature_oracles import all_dictionaries, draw
from known import KNOWN
from known_features import KNOWN_FEATURES
from oracles import head_by_hand, mlp_by_hand, norm_by_hand, random_tokens, walk_by_hand


def make_task(model, n=3, n_pos=5, same=0):
    clean, corrupted = random_tokens(model, n, n_pos), random_tokens(model, n, n_pos, seed=7)
    return Task(clean, torch.cat([clean[:, :same], corrupted[:, same:]], 1), answers=torch.arange(n)[:, None] + 3, wrong=torch.arange(n)[:, None] + 13)


def score(model, task, final):
    """The logit difference of each prompt."""
    logits = run_logits(model, final)[:, -1]
    return logits.gather(1, task.answers)[:, 0] - logits.gather(1, task.wrong)[:, 0]


def forward(model, tokens, change):
    """The final stream, where `change(module, what it writes, what it reads)` says what goes on; a block writes the whole stream."""
    x = sum(change(name, y.expand(*tokens.shape, -1), None) for name, y in embed_tokens(model, tokens).items())
    for i, layer in enumerate(model.layers):
        before = x
        heads = sum(head_by_hand(model, i, h, x, x, x)[0] for h in range(model.n_heads))
        x = before + change(f"a{i}", norm_by_hand(layer.ln1_post, heads) + (0 if layer.attn.b_O is None else layer.attn.b_O), before)
        read = before if layer.parallel else x
        x = x + change(f"m{i}", mlp_by_hand(model, i, read) + (0 if layer.mlp.b_out is None else layer.mlp.b_out), read)
        x = change(f"b{i}", x, before)
    return x


def take_apart(model, dictionaries, module, y, x):
    """Features and error."""
    if (d := dictionaries.get(module)) is None: return y[..., :0], y
    acts = d.encode(norm_by_hand(model.layers[int(module[1:])].ln2, x) if d.reads == "normed" else y)
    return acts, y - acts @ d.W_dec - d.b_dec


def put_together(dictionaries, module, acts, rest): return rest if module not in dictionaries else acts @ dictionaries[module].W_dec + dictionaries[module].b_dec + rest


@torch.no_grad()
def record(model, dictionaries, tokens):
    """Nodes and outputs of all modules."""
    nodes, outputs = {}, {}
    def change(module, y, x):
        outputs[module] = y = y.detach()
        if module[0] != "b" or module in dictionaries: nodes[module] = take_apart(model, dictionaries, module, y, x)
        return y
    forward(model, tokens, change)
    return nodes, outputs


def circuit_by_hand(model, dictionaries, task, adjacent, baseline="corrupted", threshold=0.0, n_steps=10):
    """Effects by node and weights by edge: each module by itself, each node at each position by itself."""
    (clean, outputs), (other, _) = record(model, dictionaries, task.clean), record(model, dictionaries, task.corrupted)
    if baseline == "zero":
        bias = {name: 0 if name[0] not in "am" or name in dictionaries else model.layers[int(name[1:])].attn.b_O if name[0] == "a" else model.layers[int(name[1:])].mlp.b_out for name in clean}
        clean = {name: (a, e - (0 if bias[name] is None else bias[name])) for name, (a, e) in clean.items()}
        other = {name: (0 * a, 0 * e) for name, (a, e) in clean.items()}
    else: bias = dict.fromkeys(clean, None)
    effects, weights, left = {}, {}, {}
    def write(module, nodes): return put_together(dictionaries, module, *nodes) + (0 if bias[module] is None else bias[module])
    def name_of(module, j): return f"{module}/{'err' if j < 0 else j}" if module in dictionaries else module
    def add_effects(module):
        grads = [0, 0]
        for k in range(n_steps):
            nodes = [(a + k / n_steps * (b - a)).requires_grad_() for a, b in zip(clean[module], other[module], strict=True)]
            final = forward(model, task.clean, lambda name, y, _, nodes=nodes: write(module, nodes) if name == module else y)
            for i, g in enumerate(torch.autograd.grad(score(model, task, final).sum(), nodes, allow_unused=True, materialize_grads=True)): grads[i] = grads[i] + g / n_steps
        found = [g * (a - b) for g, a, b in zip(grads, clean[module], other[module], strict=True)]
        found[1] = found[1].sum(-1, keepdim=True)
        left[module] = [g * (e.abs() > threshold) for g, e in zip(grads, found, strict=True)]
        for j in range(found[0].shape[-1]): effects[name_of(module, j)] = float(found[0][..., j].sum(1).mean())
        effects[name_of(module, -1)] = float(found[1].sum(1).mean())
    def add_edges(u, d):
        leaves, values = [x.clone().requires_grad_() for x in clean[u]], {}
        def change(name, y, x):
            if name == u: return write(u, leaves)
            if name == d: values[d] = take_apart(model, dictionaries, d, y, x)
            return outputs[name] if name[0] != "b" or name in dictionaries else y  # what lies between is held
        final = forward(model, task.clean, change)
        if d == "logits": readers = [("logits", s) for s in score(model, task, final)]
        else:
            places = [(b, t) for b in range(len(task)) for t in range(task.clean.shape[1])]
            readers = [(name_of(d, j), left[d][0][b, t, j] * values[d][0][b, t, j]) for j in range(values[d][0].shape[-1]) for b, t in places if left[d][0][b, t, j] != 0]
            readers += [(name_of(d, -1), (left[d][1][b, t] * values[d][1][b, t]).sum()) for b, t in places if left[d][1][b, t].any()]
        for reader, value in readers:
            g = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
            w = [x * (a - b) for x, a, b in zip(g, clean[u], other[u], strict=True)]
            brought = {name_of(u, j): float(w[0][..., j].sum()) for j in range(w[0].shape[-1])} | {name_of(u, -1): float(w[1].sum())}
            for node, x in brought.items(): weights[node, reader] = weights.get((node, reader), 0) + x / len(task)
    for module in clean: add_effects(module)
    for u, d in adjacent: add_edges(u, d)
    return effects, weights


def assert_circuit(graph, effects, weights):
    got = {(s, t): w for s, t, w in zip(graph.edges["source"], graph.edges["target"], graph.edges["weight"], strict=True)}
    largest = max(map(abs, weights.values()))
    assert largest > 1e-3
    for edge in got.keys() | weights.keys(): assert abs(got.get(edge, 0) - weights.get(edge, 0)) < 1e-9 * max(1, largest), (edge, got.get(edge, 0), weights.get(edge, 0))
    if effects is None: return
    found = graph.nodes.set_index("name")["effect"]
    assert all(abs(found[name] - value) < 1e-9 for name, value in effects.items()) and max(map(abs, effects.values())) > 1e-3


def stream_edges(model, streams=True):
    """Which module reads which: by hand."""
    embeds = list(embed_tokens(model, torch.zeros(1, 1, dtype=torch.long)))
    parallel, pairs, before = model.layers[0].parallel, [], embeds
    for i in range(model.n_layers):
        pairs += [(u, d) for u in before for d in (f"a{i}", f"m{i}")] + [(f"a{i}", f"m{i}")] * (not parallel)
        if streams:
            pairs += [(u, f"b{i}") for u in (*before, f"a{i}", f"m{i}")]
            before = [f"b{i}"]
        else: before = [*before, f"a{i}", f"m{i}"]
    return pairs if streams else [*pairs, *((u, "logits") for u in before)]


@pytest.mark.parametrize("baseline", ["corrupted", "zero"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "gemma2"])
def test_a_circuit_of_modules_is_its_plain_loop(name, baseline):
    """Pairs that begin alike: what stands before they differ is not run."""
    model = tiny_model(name)
    task, dictionaries = make_task(model, same=2), all_dictionaries(model, gate="relu")
    del dictionaries["a1"]
    dictionaries["m0"] = replace(draw(model, "m0", "normed", "relu"), W_skip=None)
    graph = find_feature_circuit(model, task, dictionaries, baseline=baseline, threshold=0.0, batch_size=2, progress=False)
    assert_circuit(graph, *circuit_by_hand(model, dictionaries, task, stream_edges(model, False), baseline))


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "gpt-neox"])
def test_a_circuit_of_streams_is_its_plain_loop(name):
    model = tiny_model(name)
    task, dictionaries = make_task(model), all_dictionaries(model, gate="relu") | {f"b{i}": draw(model, f"b{i}", "stream", "relu") for i in range(2)}
    graph = find_feature_circuit(model, task, dictionaries, threshold=0.02, progress=False)
    effects, weights = circuit_by_hand(model, dictionaries, task, stream_edges(model), threshold=0.02)
    last = {(node, "logits"): effect for node, effect in effects.items() if node.startswith("b1/")}
    assert_circuit(graph, effects, weights | last)
    some = find_feature_circuit(model, task, dictionaries, threshold=0.0, progress=False)
    assert len(some) > len(graph)  # thresholds cut readers


def test_a_metric_of_ones_own_is_the_one_with_a_name():
    """And batches of prompts, or points of the path one by one, are all together."""
    model = tiny_model("gpt2")
    task, dictionaries = make_task(model, same=1), all_dictionaries(model, gate="relu")
    own = replace(task, metric=lambda logits: logits[:, -1].gather(1, task.answers)[:, 0] - logits[:, -1].gather(1, task.wrong)[:, 0])
    named, *others = (find_feature_circuit(model, t, dictionaries, threshold=0.0, batch_size=size, progress=False) for t, size in ((task, None), (own, None), (own, 4), (task, 2)))
    assert all(graph.edge_names == named.edge_names and np.allclose(graph.edges["weight"], named.edges["weight"], rtol=1e-9, atol=1e-12) for graph in others)


def test_dictionaries_that_are_functions_give_the_same_circuits():
    """What is known of a dictionary (its directions, its gate) makes circuits faster, not different."""
    model = tiny_model("llama")
    task, dictionaries = make_task(model), all_dictionaries(model, gate="relu")
    functions = {name: FunctionDictionary(name, d.reads, d.d_dict, d.encode, lambda acts, d=d: d.decode(acts.to(d.W_dec))) for name, d in dictionaries.items()}
    for make in (find_feature_circuit, trace_contributions):
        known, unknown = (make(model, task, some, threshold=0.0, progress=False) for some in (dictionaries, functions))
        assert known.edge_names == unknown.edge_names and np.allclose(known.edges["weight"], unknown.edges["weight"], rtol=1e-9, atol=1e-12)


def test_without_error_edges_only_those_are_gone():
    model = tiny_model("llama")
    task, dictionaries = make_task(model), all_dictionaries(model, gate="relu")
    del dictionaries["m0"]
    every, coded = (find_feature_circuit(model, task, dictionaries, threshold=0.0, error_edges=e, progress=False) for e in (True, False))
    errors = every.edges["source"].astype(str).str.endswith("err").to_numpy()
    assert errors.any() and every.keep(~errors).edge_names == coded.edge_names and np.array_equal(every.keep(~errors).edges["weight"], coded.edges["weight"])
    assert "m0" in set(coded.edges["source"])  # a whole module is no error


@torch.no_grad()
def test_on_a_linear_model_effects_are_exact():
    """The metric is linear in what modules write: effects are what patching each node does."""
    known = KNOWN["chain"]()
    model = replace(known.model, layers=tuple(replace(layer, mlp=replace(layer.mlp, act=lambda x: x)) for layer in known.model.layers))
    dictionaries = {"m0": draw(model, "m0", gate="none")}
    graph = find_feature_circuit(model, known.task, dictionaries, progress=False)
    (clean, _), (other, _) = (record(model, dictionaries, tokens) for tokens in (known.task.clean, known.task.corrupted))
    whole = float(score(model, known.task, forward(model, known.task.clean, lambda _n, y, _x: y)).mean())
    for j in range(6):
        moved = clean["m0"][0].clone()
        moved[..., j] = other["m0"][0][..., j]
        patched = forward(model, known.task.clean, lambda name, y, _, moved=moved: put_together(dictionaries, "m0", moved, clean["m0"][1]) if name == "m0" else y)
        assert abs(float(graph.nodes.set_index("name")["effect"][f"m0/{j}"]) - (whole - float(score(model, known.task, patched).mean()))) < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("errors", ["default", "keep", "remove"])
def test_node_ablation_is_a_plain_run(errors):
    model = tiny_model("gpt2")
    task, dictionaries = make_task(model), all_dictionaries(model, gate="relu") | {"b0": draw(model, "b0", "stream", "relu")}
    graph = find_feature_circuit(model, task, dictionaries, progress=False)
    mean = {name: tuple(x.mean(0) for x in pair) for name, pair in record(model, dictionaries, task.corrupted)[0].items()}
    effect = graph.nodes.set_index("name")["effect"].abs()
    def run(threshold):
        def change(name, y, x):
            if "embed" in name or name == "b1": return y
            acts, rest = take_apart(model, dictionaries, name, y, x)
            on = torch.tensor([effect[f"{name}/{j}"] > threshold for j in range(6)])
            stays = {"default": effect[f"{name}/err"] > threshold, "keep": True, "remove": False}[errors]
            return put_together(dictionaries, name, torch.where(on, acts, mean[name][0]), rest if stays else mean[name][1].expand_as(rest))
        return score(model, task, forward(model, task.clean, change)).mean()
    thresholds = [0.0, 0.1, 0.3]
    none, whole = run(float("inf")), score(model, task, forward(model, task.clean, lambda _n, y, _x: y)).mean()
    table = ablate_circuit_nodes(model, graph, task, dictionaries, thresholds, errors=errors)
    assert np.allclose(table["faithfulness"], [float((run(t) - none) / (whole - none)) for t in thresholds], atol=1e-9) and table["faithfulness"].nunique() > 1
    if errors == "default": assert np.isclose(ablate_circuit_nodes(model, graph, task, dictionaries, [-1.0])["faithfulness"][0], 1)


def contributions_by_hand(model, dictionaries, task, threshold):
    """Attributions and edges, recursively: the gradient at what a module writes, from explicit matrices of a linear network."""
    n_pos, d, names = task.clean.shape[1], model.d_model, [f"{kind}{i}" for i in range(model.n_layers) for kind in "am"]
    effects, weights = {}, {}
    def add(table, key, value): table[key] = table.get(key, 0) + float(value) / len(task)
    def add_prompt(b):
        one = replace(task, clean=task.clean[b : b + 1], corrupted=task.corrupted[b : b + 1], answers=task.answers[b : b + 1], wrong=task.wrong[b : b + 1])
        reads = {}
        def keep(name, y, x):
            reads[name] = x
            return y
        final = forward(model, one.clean, keep)
        nodes, outputs = record(model, dictionaries, one.clean)
        def norm_matrix(norm, x):
            scale = 1.0 if norm.kind == "none" else 1 / ((x - x.mean() if norm.kind == "layer" else x).pow(2).mean() + norm.eps).sqrt()
            centre = torch.eye(d, dtype=x.dtype) - (1 / d if norm.kind == "layer" else 0)
            return (torch.eye(d, dtype=x.dtype) if norm.weight is None else torch.diag(norm.weight)) @ centre * scale
        maps = {}  # of a module, by reading and source position
        for name in names:
            i, x = int(name[1:]), reads[name][0]
            layer = model.layers[i]
            if name[0] == "a":
                N = [norm_matrix(layer.ln1, x[s]) for s in range(n_pos)]
                for t in range(n_pos):
                    for s in range(t + 1):
                        maps[name, t, s] = sum(head_by_hand(model, i, h, x[None], x[None], x[None])[1][0, t, s] * layer.attn.W_O[:, h] @ layer.attn.W_V[h // (model.n_heads // model.n_kv_heads)] for h in range(model.n_heads)) @ N[s]
            else:
                for t in range(n_pos):
                    h = norm_by_hand(layer.ln2, x[t])
                    up = layer.mlp.W_in @ h + (0 if layer.mlp.b_in is None else layer.mlp.b_in)
                    ratio = layer.mlp.act(up) / up if layer.mlp.W_gate is None else layer.mlp.act(layer.mlp.W_gate @ h + (0 if layer.mlp.b_gate is None else layer.mlp.b_gate))
                    maps[name, t, t] = layer.mlp.W_out @ torch.diag(ratio) @ layer.mlp.W_in @ norm_matrix(layer.ln2, x[t])
        direct = (model.W_U[one.answers[0, 0]] - model.W_U[one.wrong[0, 0]]) @ norm_matrix(model.ln_final, final[0, -1])
        def lefts(name, t):
            """Of each node that passes: its name, and the left vector at what the module writes."""
            G, (acts, rest), dictionary = gradient(names.index(name) if name in names else -1, t), nodes[name], dictionaries.get(name)
            if dictionary is None: return [(name, G)] if rest[0, t] @ (G) > threshold else []
            g = dictionary.W_dec @ G
            return [(f"{name}/{j}", g[j] * dictionary.W_enc[:, j]) for j in range(6) if acts[0, t, j] * g[j] > threshold]
        cache = {}
        def gradient(k, t):
            """At what the k-th module (-1: an embedding) writes at position t."""
            if (k, t) in cache: return cache[k, t]
            G = direct.clone() if t == n_pos - 1 else torch.zeros(d, dtype=model.dtype)
            for later in names[k + 1 :]:
                if k >= 0 and model.layers[0].parallel and later == f"m{names[k][1:]}" : continue
                for to in range(t, n_pos):
                    if (later, to, t) in maps: G = G + sum((left @ maps[later, to, t] for _, left in lefts(later, to)), torch.zeros(d, dtype=model.dtype))
            cache[k, t] = G
            return G
        for k, writer in [*((-1, name) for name in nodes if "embed" in name), *enumerate(names)]:
            acts, rest, W = *nodes[writer], getattr(dictionaries.get(writer), "W_dec", None)
            bias = 0 if W is not None or k < 0 else (model.layers[int(writer[1:])].attn.b_O if writer[0] == "a" else model.layers[int(writer[1:])].mlp.b_out)
            for t in range(n_pos):
                brought = [(f"{writer}/{j}", acts[0, t, j] * W[j]) for j in range(6)] + [(f"{writer}/err", rest[0, t])] if W is not None else [(writer, rest[0, t] - (0 if bias is None else bias))]
                into = [("logits", direct)] if t == n_pos - 1 else []
                for later in names[k + 1 :]:
                    if k >= 0 and model.layers[0].parallel and later == f"m{writer[1:]}": continue
                    for to in range(t, n_pos):
                        if (later, to, t) in maps: into += [(reader, left @ maps[later, to, t]) for reader, left in lefts(later, to)]
                for node, y in brought:
                    add(effects, node, y @ gradient(k, t))
                    for reader, left in into: add(weights, (node, reader), y @ left)
    for b in range(len(task)): add_prompt(b)
    return effects, weights


@torch.no_grad()
@pytest.mark.parametrize("threshold", [0.0, 0.05])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt-neox"])
def test_patch_free_circuits_are_their_recursion(name, threshold):
    model = tiny_model(name)
    task, dictionaries = make_task(model, n=2, n_pos=4), {name: replace(d, b_in=None) for name, d in all_dictionaries(model, gate="relu").items()}
    graph = trace_contributions(model, task, dictionaries, threshold=threshold, batch_size=1, progress=False)
    effects, weights = contributions_by_hand(model, dictionaries, task, threshold)
    assert_circuit(graph, effects, weights)
    out = graph.edges.groupby(graph.edges["source"].astype(str))["weight"].sum()
    found = graph.nodes.set_index("name")["effect"]
    assert all(abs(found[node] - total) < 1e-9 for node, total in out.items())  # a node is worth what goes out of it


@torch.no_grad()
def test_a_module_without_dictionary_is_traced_as_a_whole():
    model = tiny_model("llama")
    task, dictionaries = make_task(model, n=2, n_pos=4), {"m0": replace(draw(model, "m0", gate="relu"), b_in=None), "a1": replace(draw(model, "a1", gate="relu"), b_in=None)}
    graph = trace_contributions(model, task, dictionaries, threshold=0.0, progress=False)
    assert_circuit(graph, *contributions_by_hand(model, dictionaries, task, 0.0))


@pytest.mark.parametrize("chain", [("b0", "b1"), ("m0", "a1", "m1")])
def test_interactions_are_their_plain_loop(chain):
    model = tiny_model("llama")
    tokens = random_tokens(model, 3, 4)
    bases = train_interaction_bases(model, random_tokens(model, 24, 6, seed=3), list(chain), d_dict=5, progress=False)
    graph, skip = weigh_interactions(model, tokens, bases, n_steps=3, batch_size=2, progress=False), 1
    found = graph.edges.set_index([graph.edges["source"].astype(str), graph.edges["target"].astype(str)])
    def shares(u, d, b, t, j):
        "Integrated gradients of one direction at one position."
        code, total = bases[u].encode(record(model, {}, tokens[b : b + 1])[1][u]), 0
        for alpha, weight in Rule(n_steps=3).steps:
            leaf, values = (alpha * code).requires_grad_(), {}
            def change(name, y, _, leaf=leaf, values=values):
                if name == d: values["code"] = bases[d].encode(y)
                return bases[u].decode(leaf) if name == u else y
            forward(model, tokens[b : b + 1], change)
            total = total + weight * (torch.autograd.grad(values["code"][0, t, j], leaf)[0] * code).sum((0, 1))
        return total
    n = 0
    for u, d in zip(chain, chain[1:], strict=False):
        for j in range(bases[d].d_dict):
            found_by_hand = torch.stack([shares(u, d, b, t, j) for b in range(3) for t in range(skip, 4)])
            for i, share in enumerate(found_by_hand.mT):
                edge, n = found.loc[(f"{u}/{i}", f"{d}/{j}")], n + 1
                assert np.allclose(edge[["weight", "abs_weight", "rms_weight"]].astype(float), [share.square().mean(), share.abs().mean(), share.square().mean().sqrt()], rtol=1e-7, atol=1e-12)
    assert n == len(graph) and (graph.edges["weight"] >= 0).all()


def test_interactions_of_a_linear_model_are_its_weights():
    """No attention, no norm, MLPs without a bend: the stream is multiplied by a matrix."""
    model = tiny_model("no-norm")
    model = replace(model, layers=tuple(replace(layer, attn=replace(layer.attn, W_O=0 * layer.attn.W_O), mlp=replace(layer.mlp, act=lambda x: x)) for layer in model.layers))
    tokens, random = random_tokens(model, 4, 5), lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)
    square, zero = torch.linalg.qr(random(16, 16))[0], torch.zeros(16, dtype=torch.float64)
    bases = {f"b{i}": LinearDictionary(f"b{i}", "stream", square, square.mT.contiguous(), zero, zero, Gate("none")) for i in range(2)}
    mlp = model.layers[1].mlp
    interaction = square.mT @ (torch.eye(16, dtype=torch.float64) + mlp.W_out @ mlp.W_in) @ square
    code = bases["b0"].encode(record(model, {}, tokens)[1]["b0"])[:, 1:]
    graph = weigh_interactions(model, tokens, bases, n_steps=1, progress=False)
    wanted = interaction.square() * code.square().mean((0, 1))
    assert np.allclose(graph.edges["weight"].to_numpy().reshape(16, 16), wanted, rtol=1e-9)


def activations_by_hand(model, task, grain, steps):
    """EAP-IG over activations: every edge of each of its runs, from the walk that edge ablation is held against."""
    def read_all(_reader, _port, writes, bias): return sum(writes.values()) + bias
    with torch.no_grad(): clean, other = (walk_by_hand(model, grain, tokens, read_all)[1] for tokens in (task.clean, task.corrupted))
    groups, total = [[name for name in clean if name.endswith("embed")], *(list(r.names) for r in list_readers(model, grain)[0][:-1])], {}
    for group in groups:
        for alpha, weight in steps:
            leaves, held = {}, {name: other[name] + alpha * (clean[name] - other[name]) for name in group}
            def read(reader, port, writes, bias, leaves=leaves, held=held):
                if (reader, port) not in leaves: leaves[reader, port] = torch.zeros(*task.clean.shape, model.d_model, dtype=model.dtype, requires_grad=True)
                return sum(held.get(name, y) for name, y in writes.items()) + bias + leaves[reader, port]
            logits = walk_by_hand(model, grain, task.clean, read)[0][:, -1]
            metric = (logits.gather(1, task.answers) - logits.gather(1, task.wrong)).mean()
            for key, grad in zip(leaves, torch.autograd.grad(metric, list(leaves.values()), allow_unused=True, materialize_grads=True), strict=True): total[key] = total.get(key, 0) + weight / len(groups) * grad
    return {(writer, *key): float((grad * (clean[writer] - other[writer]).detach()).sum()) for key, grad in total.items() for writer in clean}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "gemma2"])
@pytest.mark.parametrize("grain", ["head", "layer", "block"])
def test_paths_of_activations_are_their_loop(name, grain):
    model = tiny_model(name)
    task = make_task(model)
    graph = build_graph(model, task, grain, attribution="eap-ig-activations", target="metric", n_steps=2, batch_size=2, progress=False)
    wanted = activations_by_hand(model, task, grain, Rule(n_steps=2).steps)
    got = graph.edges["weight"].to_numpy()
    assert graph.meta["attribution"] == "eap-ig-activations" and np.abs(got).max() > 1e-3
    assert np.allclose(got, [0 if edge[0] == "const" else wanted[edge] for edge in zip(*(graph.edges[c].astype(str) for c in ("source", "target", "port")), strict=True)], rtol=1e-8, atol=1e-11)


def test_on_a_linear_model_paths_of_activations_are_patching_less_blocked_runs():
    known = KNOWN["chain"]()
    model = replace(known.model, layers=tuple(replace(layer, mlp=replace(layer.mlp, act=lambda x: x)) for layer in known.model.layers))
    exact, graph = patch_edges(model, known.task, progress=False), build_graph(model, known.task, "head", target="metric", attribution="eap-ig-activations", progress=False)
    whole = sum(s * float(score_task(model, known.task, forward_stream(model, tokens)).mean()) for s, tokens in ((1, known.task.clean), (-1, known.task.corrupted)))
    runs = len(list_readers(model, "head")[0])  # the embeddings, and each module but logits
    on = exact.edges["weight"].abs().to_numpy() > 0.5
    behind = {"logits": 0} | {f"m{i}": model.n_layers - i for i in range(model.n_layers)}  # modules on the way of the chain from here on
    share = np.array([(runs - behind[target]) / runs for target in exact.keep(on).edges["target"]])
    assert on.sum() == len(known.edges) and np.allclose(graph.keep(on).edges["weight"] / whole, exact.keep(on).edges["weight"] * share, atol=1e-10)


@torch.no_grad()
def forward_stream(model, tokens): return forward(model, tokens, lambda _n, y, _x: y)


@pytest.mark.parametrize("name", list(KNOWN_FEATURES))
def test_all_methods_have_one_shape_and_are_judged(name):
    known = KNOWN_FEATURES[name]()
    task = known.task
    for method, make in list_feature_methods().items():
        graph = make(known.model, task, known.dictionaries, progress=False)
        table = ablation_curve(known.model, graph, task, [len(graph)], value="corrupted", dictionaries=known.dictionaries, n_boot=2, progress=False)
        assert graph.meta["ports"] == "merged" and graph.meta["dictionaries"].keys() == known.dictionaries.keys() and len(graph) and table["faithfulness"].notna().all(), method


def test_nothing_passes_a_threshold_that_is_too_high():
    model = tiny_model("gpt2")
    task, dictionaries = make_task(model), all_dictionaries(model, gate="relu")
    for make in (find_feature_circuit, trace_contributions): assert set(make(model, task, dictionaries, threshold=1e6, progress=False).edges["target"]) == {"logits"}
    blind = replace(task, metric=lambda logits: 0 * logits.sum((1, 2)))
    assert not len(find_feature_circuit(model, blind, dictionaries | {f"b{i}": draw(model, f"b{i}", "stream", "relu") for i in range(2)}, progress=False))
    assert not len(trace_contributions(model, blind, dictionaries, progress=False))


def test_bad_input_is_refused():
    model = tiny_model("llama")
    task, dictionaries = make_task(model), {"m0": draw(model, "m0", gate="relu"), "a1": draw(model, "a1", gate="relu")}
    stream, mid = draw(model, "b0", "stream", "relu"), draw(model, "m1", "stream", "relu")
    graph = find_feature_circuit(model, task, dictionaries, progress=False)
    values = build_graph(model, task.clean, dictionaries, progress=False)
    for run, words in [
        (lambda: find_feature_circuit(model, task, dictionaries, baseline="mean"), "baseline must be 'corrupted' or 'zero', got 'mean'"), (lambda: find_feature_circuit(model, task, dictionaries, threshold=-1), "threshold must be at least 0"),
        (lambda: find_feature_circuit(model, replace(task, corrupted=task.clean), dictionaries), "corrupted prompts must differ"), (lambda: find_feature_circuit(model, task, dictionaries, n_steps=0), "n_steps must be at least 1"), (lambda: find_feature_circuit(model, task, {"m1": mid}), "name its module 'b1'"),
        (lambda: find_feature_circuit(model, task, {"b0": replace(stream, reads="output")}), "'b0' reads 'stream'"), (lambda: find_feature_circuit(model, task, {"a0.h1": draw(model, "a0.h1")}), "whole modules, got one of the head 'a0.h1'"),
        (lambda: find_feature_circuit(model, replace(task, metric="accuracy"), dictionaries), "metric must be one of"), (lambda: find_feature_circuit(model, replace(task, clean=task.clean + 100), dictionaries), "clean"),
        (lambda: trace_contributions(model, task, {"b0": stream}), "leave out b0"), (lambda: trace_contributions(model, task, dictionaries, threshold=float("nan")), "threshold must be at least 0"),
        (lambda: random_features(model, task, dictionaries, keep=0), "keep must be at least 1"),
        (lambda: weigh_interactions(model, task.clean, {"m0": dictionaries["m0"]}), "at least two layers"), (lambda: weigh_interactions(model, task.clean, {"a1": dictionaries["a1"], "m0": dictionaries["m0"]}), "in the order of computation, got a1, m0"),
        (lambda: weigh_interactions(model, task.clean, dictionaries, skip_first=5), "skip_first must lie in"), (lambda: ablate_circuit_nodes(model, graph, task, dictionaries, value="resample"), "value must be one of"),
        (lambda: ablate_circuit_nodes(model, graph, task, dictionaries, errors="drop"), "errors must be one of"), (lambda: ablate_circuit_nodes(model, values, task, dictionaries), "must hold the effects"),
        (lambda: ablate_circuit_nodes(model, graph, task, {"m0": dictionaries["m0"]}), "dictionaries must be those"), (lambda: build_graph(model, task, "head", target="metric", attribution="eap-ig-activation"), "attribution must be"),
        (lambda: build_graph(model, task.clean, "head", attribution="eap-ig-activations"), "attribution must be"),
    ]:
        with pytest.raises(ValueError, match=words): run()
