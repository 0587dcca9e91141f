"""The rivals that draw graphs of features: each against its definition in plain loops, on models small
enough for that; and EAP-IG over activations."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from circuitgraph.attribution.method import Attribution
from circuitgraph.methods.patching import patch_edges
from circuitgraph.dictionary.protocol import Gate, LinearDictionary
from circuitgraph.methods.feature_circuits import ablate_circuit_nodes, find_feature_circuit
from circuitgraph.methods.compare import list_methods
from circuitgraph.methods.feature_circuits import random_features
from circuitgraph.methods.patch_free import trace_contributions
from circuitgraph.methods.patch_free import weigh_interactions
from circuitgraph.attribution.metric import score_task
from circuitgraph.model.blocks import run_logits
from circuitgraph.model.loading import tiny_model
from circuitgraph.model.modules import embed_tokens, list_readers
from circuitgraph.data.task import Task
from circuitgraph.dictionary.interaction import BasisConfig, train_interaction_bases
from feature_oracles import Hidden, all_dictionaries, draw
from known import KNOWN
from known_features import KNOWN_FEATURES
from circuitgraph.options import Judging, Run
from oracles import head_by_hand, mlp_by_hand, norm_by_hand, random_tokens, walk_by_hand, with_act
from short import ablation_curve, build_graph

QUIET = Run(progress=False)


def make_task(model, n=3, n_pos=5, same=0):
    clean, corrupted = random_tokens(model, n, n_pos), random_tokens(model, n, n_pos, seed=7)
    return Task(
        clean,
        torch.cat([clean[:, :same], corrupted[:, same:]], 1),
        answers=torch.arange(n)[:, None] + 3,
        wrong=torch.arange(n)[:, None] + 13,
    )


def score(model, task, final):
    """The logit difference of each prompt."""
    logits = run_logits(model, final)[:, -1]
    return logits.gather(1, task.answers)[:, 0] - logits.gather(1, task.wrong)[:, 0]


def forward(model, tokens, change):
    """The final stream, where `change(module, what it writes, what it reads)` says what goes on; a block
    writes the whole stream."""
    x = sum(
        change(name, y.expand(*tokens.shape, -1), None) for name, y in embed_tokens(model, tokens).items()
    )
    for i, layer in enumerate(model.layers):
        before = x
        heads = sum(head_by_hand(model, i, h, x, x, x)[0] for h in range(model.n_heads))
        x = before + change(
            f"a{i}",
            norm_by_hand(layer.ln1_post, heads) + (0 if layer.attn.b_O is None else layer.attn.b_O),
            before,
        )
        read = before if layer.parallel else x
        x = x + change(
            f"m{i}", mlp_by_hand(model, i, read) + (0 if layer.mlp.b_out is None else layer.mlp.b_out), read
        )
        x = change(f"b{i}", x, before)
    return x


def decompose(model, dictionaries, module, y, x):
    """Features and error."""
    if (d := dictionaries.get(module)) is None:
        return y[..., :0], y
    acts = d.encode(norm_by_hand(model.layers[int(module[1:])].ln2, x) if d.reads == "normed" else y)
    return acts, y - acts @ d.W_dec - d.b_dec


def put_together(dictionaries, module, acts, rest):
    return (
        rest
        if module not in dictionaries
        else acts @ dictionaries[module].W_dec + dictionaries[module].b_dec + rest
    )


@torch.no_grad()
def record(model, dictionaries, tokens):
    """Nodes and outputs of all modules."""
    nodes, outputs = {}, {}

    def change(module, y, x):
        outputs[module] = y = y.detach()
        if module[0] != "b" or module in dictionaries:
            nodes[module] = decompose(model, dictionaries, module, y, x)
        return y

    forward(model, tokens, change)
    return nodes, outputs


def bias_of(model, module):
    """What a module adds whatever it reads."""
    layer = model.layers[int(module[1:])]
    bias = layer.attn.b_O if module[0] == "a" else layer.mlp.b_out
    return 0 if bias is None else bias


class CircuitByHand:
    """Effects by node and weights by edge: each module by itself, each node at each position by itself."""

    def __init__(self, model, dictionaries, task, baseline="corrupted", threshold=0.0, n_steps=10):
        self.model, self.dictionaries, self.task = model, dictionaries, task
        self.threshold, self.n_steps = threshold, n_steps
        self.clean, self.outputs = record(model, dictionaries, task.clean)
        self.other, _ = record(model, dictionaries, task.corrupted)
        self.bias = dict.fromkeys(self.clean, 0)
        if baseline == "zero":
            for name in self.clean:
                if name[0] in "am" and name not in dictionaries:
                    self.bias[name] = bias_of(model, name)
            self.clean = {name: (a, e - self.bias[name]) for name, (a, e) in self.clean.items()}
            self.other = {name: (0 * a, 0 * e) for name, (a, e) in self.clean.items()}
        self.effects, self.weights, self.left = {}, {}, {}

    def write(self, module, nodes):
        return put_together(self.dictionaries, module, *nodes) + self.bias[module]

    def name_of(self, module, j):
        return f"{module}/{'err' if j < 0 else j}" if module in self.dictionaries else module

    def change_of(self, module):
        return [a - b for a, b in zip(self.clean[module], self.other[module], strict=True)]

    def grads_at(self, module, nodes):
        """Gradients of the metric at a module's nodes."""

        def change(name, y, _):
            return self.write(module, nodes) if name == module else y

        total = score(self.model, self.task, forward(self.model, self.task.clean, change)).sum()
        return torch.autograd.grad(total, nodes, allow_unused=True, materialize_grads=True)

    def add_effects(self, module):
        grads = [0, 0]
        for k in range(self.n_steps):
            ends = zip(self.clean[module], self.other[module], strict=True)
            nodes = [(a + k / self.n_steps * (b - a)).requires_grad_() for a, b in ends]
            grads = [g + x / self.n_steps for g, x in zip(grads, self.grads_at(module, nodes), strict=True)]
        acts, rest = (g * change for g, change in zip(grads, self.change_of(module), strict=True))
        rest = rest.sum(-1, keepdim=True)
        effects = zip(grads, (acts, rest), strict=True)
        self.left[module] = [g * (e.abs() > self.threshold) for g, e in effects]
        for j in range(acts.shape[-1]):
            self.effects[self.name_of(module, j)] = float(acts[..., j].sum(1).mean())
        self.effects[self.name_of(module, -1)] = float(rest.sum(1).mean())

    def readers(self, d, final, values):
        """Of each node that reads at a position: its name, and its value times the gradient there."""
        if d == "logits":
            return [("logits", s) for s in score(self.model, self.task, final)]
        left, (acts, rest) = self.left[d], values[d]
        places = [(b, t) for b in range(len(self.task)) for t in range(self.task.clean.shape[1])]
        return [
            (self.name_of(d, j), left[0][b, t, j] * acts[b, t, j])
            for j in range(acts.shape[-1])
            for b, t in places
            if left[0][b, t, j] != 0
        ] + [
            (self.name_of(d, -1), (left[1][b, t] * rest[b, t]).sum())
            for b, t in places
            if left[1][b, t].any()
        ]

    def add_edges(self, u, d):
        leaves, values = [x.clone().requires_grad_() for x in self.clean[u]], {}

        def change(name, y, x):
            if name == u:
                return self.write(u, leaves)
            if name == d:
                values[d] = decompose(self.model, self.dictionaries, d, y, x)
            # between the two, modules write what they wrote
            return self.outputs[name] if name[0] != "b" or name in self.dictionaries else y

        final = forward(self.model, self.task.clean, change)
        for reader, value in self.readers(d, final, values):
            options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
            grads = torch.autograd.grad(value, leaves, **options)
            acts, rest = (g * change for g, change in zip(grads, self.change_of(u), strict=True))
            terms = {self.name_of(u, j): acts[..., j] for j in range(acts.shape[-1])}
            for node, x in (terms | {self.name_of(u, -1): rest}).items():
                weight = float(x.sum()) / len(self.task)
                self.weights[node, reader] = self.weights.get((node, reader), 0) + weight


def circuit_by_hand(model, dictionaries, task, adjacent, *args, **options):
    """Effects by node and weights by edge of a sparse feature circuit."""
    circuit = CircuitByHand(model, dictionaries, task, *args, **options)
    for module in circuit.clean:
        circuit.add_effects(module)
    for u, d in adjacent:
        circuit.add_edges(u, d)
    return circuit.effects, circuit.weights


def assert_circuit(graph, effects, weights):
    got = {
        (s, t): w
        for s, t, w in zip(graph.edges["source"], graph.edges["target"], graph.edges["weight"], strict=True)
    }
    largest = max(map(abs, weights.values()))
    assert largest > 1e-3
    for edge in got.keys() | weights.keys():
        assert abs(got.get(edge, 0) - weights.get(edge, 0)) < 1e-9 * max(1, largest), (
            edge,
            got.get(edge, 0),
            weights.get(edge, 0),
        )
    if effects is None:
        return
    found = graph.nodes.set_index("name")["effect"]
    assert (
        all(abs(found[name] - value) < 1e-9 for name, value in effects.items())
        and max(map(abs, effects.values())) > 1e-3
    )


def stream_edges(model, streams=True):
    """Which module reads which: by hand."""
    embeds = list(embed_tokens(model, torch.zeros(1, 1, dtype=torch.long)))
    parallel, pairs, before = model.layers[0].parallel, [], embeds
    for i in range(model.n_layers):
        pairs += [(u, d) for u in before for d in (f"a{i}", f"m{i}")] + [(f"a{i}", f"m{i}")] * (not parallel)
        if streams:
            pairs += [(u, f"b{i}") for u in (*before, f"a{i}", f"m{i}")]
            before = [f"b{i}"]
        else:
            before = [*before, f"a{i}", f"m{i}"]
    return pairs if streams else [*pairs, *((u, "logits") for u in before)]


@pytest.mark.parametrize("baseline", ["corrupted", "zero"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "gemma2"])
def test_a_circuit_of_modules_is_its_plain_loop(name, baseline):
    """Pairs that begin alike: what stands before they differ is not run."""
    model = tiny_model(name)
    task, dictionaries = make_task(model, same=2), all_dictionaries(model, gate="relu")
    del dictionaries["a1"]
    dictionaries["m0"] = replace(draw(model, "m0", "normed", "relu"), W_skip=None)
    graph = find_feature_circuit(
        model, task, dictionaries, baseline=baseline, threshold=0.0, run=Run(2, progress=False)
    )
    assert_circuit(graph, *circuit_by_hand(model, dictionaries, task, stream_edges(model, False), baseline))


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "gpt-neox"])
def test_a_circuit_of_streams_is_its_plain_loop(name):
    model = tiny_model(name)
    task, dictionaries = (
        make_task(model),
        all_dictionaries(model, gate="relu")
        | {f"b{i}": draw(model, f"b{i}", "stream", "relu") for i in range(2)},
    )
    graph = find_feature_circuit(model, task, dictionaries, threshold=0.02, run=QUIET)
    effects, weights = circuit_by_hand(model, dictionaries, task, stream_edges(model), threshold=0.02)
    last = {(node, "logits"): effect for node, effect in effects.items() if node.startswith("b1/")}
    assert_circuit(graph, effects, weights | last)
    some = find_feature_circuit(model, task, dictionaries, threshold=0.0, run=QUIET)
    assert len(some) > len(graph)  # thresholds cut readers


def test_a_metric_of_ones_own_is_the_one_with_a_name():
    """And batches of prompts, or points of the path one by one, are all together."""
    model = tiny_model("gpt2")
    task, dictionaries = make_task(model, same=1), all_dictionaries(model, gate="relu")
    own = replace(
        task,
        metric=lambda logits: (
            logits[:, -1].gather(1, task.answers)[:, 0] - logits[:, -1].gather(1, task.wrong)[:, 0]
        ),
    )
    named, *others = (
        find_feature_circuit(model, t, dictionaries, threshold=0.0, run=Run(size, progress=False))
        for t, size in ((task, None), (own, None), (own, 4), (task, 2))
    )
    assert all(
        graph.edge_names == named.edge_names
        and np.allclose(graph.edges["weight"], named.edges["weight"], rtol=1e-9, atol=1e-12)
        for graph in others
    )


def test_dictionaries_that_are_functions_give_the_same_circuits():
    """What is known of a dictionary (its directions, its gate) makes circuits faster, not different."""
    model = tiny_model("llama")
    task, dictionaries = make_task(model), all_dictionaries(model, gate="relu")
    functions = {name: Hidden(d) for name, d in dictionaries.items()}
    for make in (find_feature_circuit, trace_contributions):
        known, unknown = (
            make(model, task, some, threshold=0.0, run=QUIET) for some in (dictionaries, functions)
        )
        assert known.edge_names == unknown.edge_names and np.allclose(
            known.edges["weight"], unknown.edges["weight"], rtol=1e-9, atol=1e-12
        )


def test_without_error_edges_only_those_are_gone():
    model = tiny_model("llama")
    task, dictionaries = make_task(model), all_dictionaries(model, gate="relu")
    del dictionaries["m0"]
    every, coded = (
        find_feature_circuit(model, task, dictionaries, threshold=0.0, error_edges=e, run=QUIET)
        for e in (True, False)
    )
    errors = every.edges["source"].astype(str).str.endswith("err").to_numpy()
    assert (
        errors.any()
        and every.keep(~errors).edge_names == coded.edge_names
        and np.array_equal(every.keep(~errors).edges["weight"], coded.edges["weight"])
    )
    assert "m0" in set(coded.edges["source"])  # a whole module is no error


@torch.no_grad()
def test_on_a_linear_model_effects_are_exact():
    """The metric is linear in what modules write: effects are what patching each node does."""
    known = KNOWN["chain"]()
    model = with_act(known.model, lambda x: x)
    dictionaries = {"m0": draw(model, "m0", gate="none")}
    graph = find_feature_circuit(model, known.task, dictionaries, run=QUIET)
    (clean, _), (other, _) = (
        record(model, dictionaries, tokens) for tokens in (known.task.clean, known.task.corrupted)
    )
    whole = float(score(model, known.task, forward(model, known.task.clean, lambda _n, y, _x: y)).mean())
    for j in range(6):
        moved = clean["m0"][0].clone()
        moved[..., j] = other["m0"][0][..., j]
        patched = forward(
            model,
            known.task.clean,
            lambda name, y, _, moved=moved: (
                put_together(dictionaries, "m0", moved, clean["m0"][1]) if name == "m0" else y
            ),
        )
        assert (
            abs(
                float(graph.nodes.set_index("name")["effect"][f"m0/{j}"])
                - (whole - float(score(model, known.task, patched).mean()))
            )
            < 1e-9
        )


@torch.no_grad()
@pytest.mark.parametrize("errors", ["default", "keep", "remove"])
def test_node_ablation_is_a_plain_run(errors):
    model = tiny_model("gpt2")
    task, dictionaries = (
        make_task(model),
        all_dictionaries(model, gate="relu") | {"b0": draw(model, "b0", "stream", "relu")},
    )
    graph = find_feature_circuit(model, task, dictionaries, run=QUIET)
    mean = {
        name: tuple(x.mean(0) for x in pair)
        for name, pair in record(model, dictionaries, task.corrupted)[0].items()
    }
    effect = graph.nodes.set_index("name")["effect"].abs()

    def run(threshold):
        def change(name, y, x):
            if "embed" in name or name == "b1":
                return y
            acts, rest = decompose(model, dictionaries, name, y, x)
            on = torch.tensor([effect[f"{name}/{j}"] > threshold for j in range(6)])
            stays = {"default": effect[f"{name}/err"] > threshold, "keep": True, "remove": False}[errors]
            return put_together(
                dictionaries,
                name,
                torch.where(on, acts, mean[name][0]),
                rest if stays else mean[name][1].expand_as(rest),
            )

        return score(model, task, forward(model, task.clean, change)).mean()

    thresholds = [0.0, 0.1, 0.3]
    none, whole = (
        run(float("inf")),
        score(model, task, forward(model, task.clean, lambda _n, y, _x: y)).mean(),
    )
    table = ablate_circuit_nodes(model, graph, task, dictionaries, thresholds, errors=errors)
    assert (
        np.allclose(
            table["faithfulness"], [float((run(t) - none) / (whole - none)) for t in thresholds], atol=1e-9
        )
        and table["faithfulness"].nunique() > 1
    )
    if errors == "default":
        assert np.isclose(
            ablate_circuit_nodes(model, graph, task, dictionaries, [-1.0])["faithfulness"][0], 1
        )


def norm_matrix(norm, x):
    """The norm at one position, its scale held, as a matrix."""
    d, eye = len(x), torch.eye(len(x), dtype=x.dtype)
    weight = eye if norm.weight is None else torch.diag(norm.weight)
    if norm.kind == "none":
        return weight
    centred = x - x.mean() if norm.kind == "layer" else x
    centre = eye - (1 / d if norm.kind == "layer" else 0)
    return weight @ centre / (centred.pow(2).mean() + norm.eps).sqrt()


def attention_matrix(model, i, x, t, s):
    """What position t of an attention layer takes from position s, patterns held."""
    attn, group = model.layers[i].attn, model.n_heads // model.n_kv_heads
    mixed = 0
    for h in range(model.n_heads):
        pattern = head_by_hand(model, i, h, x[None], x[None], x[None])[1][0, t, s]
        mixed = mixed + pattern * attn.W_O[:, h] @ attn.W_V[h // group]
    return mixed @ norm_matrix(model.layers[i].ln1, x[s])


def mlp_matrix(model, i, x):
    """An MLP at one position whose neurons keep the ratio of output to input, or their gate."""
    layer = model.layers[i]
    mlp, h = layer.mlp, norm_by_hand(layer.ln2, x)
    up = mlp.W_in @ h + (0 if mlp.b_in is None else mlp.b_in)
    if mlp.W_gate is None:
        ratio = mlp.act(up) / up
    else:
        ratio = mlp.act(mlp.W_gate @ h + (0 if mlp.b_gate is None else mlp.b_gate))
    return mlp.W_out @ torch.diag(ratio) @ mlp.W_in @ norm_matrix(layer.ln2, x)


class ContributionsByHand:
    """Attributions and edges on one prompt, recursively: the gradient at what a module writes, from explicit
    matrices of a linear network."""

    def __init__(self, model, dictionaries, task, threshold):
        self.model, self.dictionaries, self.threshold = model, dictionaries, threshold
        self.names = [f"{kind}{i}" for i in range(model.n_layers) for kind in "am"]
        self.n_pos, self.cache = task.clean.shape[1], {}
        reads = {}

        def keep(name, y, x):
            reads[name] = x
            return y

        final = forward(model, task.clean, keep)
        self.nodes, _ = record(model, dictionaries, task.clean)
        self.maps = {}  # of a module, by reading and source position
        for name in self.names:
            i, x = int(name[1:]), reads[name][0]
            for t in range(self.n_pos):
                for s in range(t + 1) if name[0] == "a" else ():
                    self.maps[name, t, s] = attention_matrix(model, i, x, t, s)
                if name[0] == "m":
                    self.maps[name, t, t] = mlp_matrix(model, i, x[t])
        answer, wrong = task.answers[0, 0], task.wrong[0, 0]
        self.direct = (model.W_U[answer] - model.W_U[wrong]) @ norm_matrix(model.ln_final, final[0, -1])

    def lefts(self, name, t):
        """Of each node that passes something back: its name, and its gradient before the module."""
        grad, (acts, rest) = self.gradient(self.names.index(name), t), self.nodes[name]
        dictionary = self.dictionaries.get(name)
        if dictionary is None:
            return [(name, grad)] if rest[0, t] @ grad > self.threshold else []
        g = dictionary.W_dec @ grad
        passing = [j for j in range(6) if acts[0, t, j] * g[j] > self.threshold]
        return [(f"{name}/{j}", g[j] * dictionary.W_enc[:, j]) for j in passing]

    def later(self, k, t):
        """Readers behind the k-th module (-1: an embedding) at position t: name, gradient at its output."""
        for name in self.names[k + 1 :]:
            if k >= 0 and self.model.layers[0].parallel and name == f"m{self.names[k][1:]}":
                continue
            for to in range(t, self.n_pos):
                if (name, to, t) in self.maps:
                    for reader, left in self.lefts(name, to):
                        yield reader, left @ self.maps[name, to, t]

    def gradient(self, k, t):
        """At what the k-th module (-1: an embedding) writes at position t."""
        if (k, t) not in self.cache:
            direct = self.direct if t == self.n_pos - 1 else torch.zeros_like(self.direct)
            self.cache[k, t] = sum((left for _, left in self.later(k, t)), direct)
        return self.cache[k, t]

    def brought(self, writer, k, t):
        """What each node of a module writes at a position."""
        acts, rest = self.nodes[writer]
        dictionary = self.dictionaries.get(writer)
        if dictionary is None:
            return [(writer, rest[0, t] - (bias_of(self.model, writer) if k >= 0 else 0))]
        features = [(f"{writer}/{j}", acts[0, t, j] * dictionary.W_dec[j]) for j in range(6)]
        return [*features, (f"{writer}/err", rest[0, t])]

    def add(self, effects, weights, share):
        embeddings = [(-1, name) for name in self.nodes if "embed" in name]
        for k, writer in [*embeddings, *enumerate(self.names)]:
            for t in range(self.n_pos):
                readers = [("logits", self.direct)] if t == self.n_pos - 1 else []
                readers += self.later(k, t)
                for node, y in self.brought(writer, k, t):
                    effects[node] = effects.get(node, 0) + share * float(y @ self.gradient(k, t))
                    for reader, left in readers:
                        weights[node, reader] = weights.get((node, reader), 0) + share * float(y @ left)


def contributions_by_hand(model, dictionaries, task, threshold):
    """Attributions and edges of a patch-free circuit."""
    effects, weights = {}, {}
    for b in range(len(task)):
        rows = {name: getattr(task, name)[b : b + 1] for name in ("clean", "corrupted", "answers", "wrong")}
        prompt = ContributionsByHand(model, dictionaries, replace(task, **rows), threshold)
        prompt.add(effects, weights, 1 / len(task))
    return effects, weights


@torch.no_grad()
@pytest.mark.parametrize("threshold", [0.0, 0.05])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt-neox"])
def test_patch_free_circuits_are_their_recursion(name, threshold):
    model = tiny_model(name)
    task, dictionaries = (
        make_task(model, n=2, n_pos=4),
        {name: replace(d, b_in=None) for name, d in all_dictionaries(model, gate="relu").items()},
    )
    graph = trace_contributions(model, task, dictionaries, threshold=threshold, run=Run(1, progress=False))
    effects, weights = contributions_by_hand(model, dictionaries, task, threshold)
    assert_circuit(graph, effects, weights)
    out = graph.edges.groupby(graph.edges["source"].astype(str))["weight"].sum()
    found = graph.nodes.set_index("name")["effect"]
    assert all(
        abs(found[node] - total) < 1e-9 for node, total in out.items()
    )  # a node is worth what goes out of it


@torch.no_grad()
def test_a_module_without_dictionary_is_traced_as_a_whole():
    model = tiny_model("llama")
    task, dictionaries = (
        make_task(model, n=2, n_pos=4),
        {
            "m0": replace(draw(model, "m0", gate="relu"), b_in=None),
            "a1": replace(draw(model, "a1", gate="relu"), b_in=None),
        },
    )
    graph = trace_contributions(model, task, dictionaries, threshold=0.0, run=QUIET)
    assert_circuit(graph, *contributions_by_hand(model, dictionaries, task, 0.0))


@pytest.mark.parametrize("chain", [("b0", "b1"), ("m0", "a1", "m1")])
def test_interactions_are_their_plain_loop(chain):
    model = tiny_model("llama")
    tokens = random_tokens(model, 3, 4)
    bases = train_interaction_bases(
        model, random_tokens(model, 24, 6, seed=3), list(chain), BasisConfig(d_dict=5), run=QUIET
    )
    graph, skip = weigh_interactions(model, tokens, bases, n_steps=3, run=Run(2, progress=False)), 1
    found = graph.edges.set_index([graph.edges["source"].astype(str), graph.edges["target"].astype(str)])

    def shares(u, d, b, t, j):
        "Integrated gradients of one direction at one position."
        code, total = bases[u].encode(record(model, {}, tokens[b : b + 1])[1][u]), 0
        for alpha, weight in Attribution(n_steps=3).steps:
            leaf, values = (alpha * code).requires_grad_(), {}

            def change(name, y, _, leaf=leaf, values=values):
                if name == d:
                    values["code"] = bases[d].encode(y)
                return bases[u].decode(leaf) if name == u else y

            forward(model, tokens[b : b + 1], change)
            total = total + weight * (torch.autograd.grad(values["code"][0, t, j], leaf)[0] * code).sum(
                (0, 1)
            )
        return total

    n = 0
    for u, d in zip(chain, chain[1:], strict=False):
        for j in range(bases[d].d_dict):
            found_by_hand = torch.stack([shares(u, d, b, t, j) for b in range(3) for t in range(skip, 4)])
            for i, share in enumerate(found_by_hand.mT):
                edge, n = found.loc[(f"{u}/{i}", f"{d}/{j}")], n + 1
                assert np.allclose(
                    edge[["weight", "abs_weight", "rms_weight"]].astype(float),
                    [share.square().mean(), share.abs().mean(), share.square().mean().sqrt()],
                    rtol=1e-7,
                    atol=1e-12,
                )
    assert n == len(graph) and (graph.edges["weight"] >= 0).all()


def test_interactions_of_a_linear_model_are_its_weights():
    """No attention, no norm, MLPs without a bend: the stream is multiplied by a matrix."""
    model = tiny_model("no-norm")
    model = replace(
        model,
        layers=tuple(
            replace(
                layer,
                attn=replace(layer.attn, W_O=0 * layer.attn.W_O),
                mlp=replace(layer.mlp, act=lambda x: x),
            )
            for layer in model.layers
        ),
    )
    tokens, random = (
        random_tokens(model, 4, 5),
        lambda *shape: torch.randn(
            *shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64
        ),
    )
    square, zero = torch.linalg.qr(random(16, 16))[0], torch.zeros(16, dtype=torch.float64)
    bases = {
        f"b{i}": LinearDictionary(f"b{i}", "stream", square, square.mT.contiguous(), zero, zero, Gate("none"))
        for i in range(2)
    }
    mlp = model.layers[1].mlp
    interaction = square.mT @ (torch.eye(16, dtype=torch.float64) + mlp.W_out @ mlp.W_in) @ square
    code = bases["b0"].encode(record(model, {}, tokens)[1]["b0"])[:, 1:]
    graph = weigh_interactions(model, tokens, bases, n_steps=1, run=QUIET)
    wanted = interaction.square() * code.square().mean((0, 1))
    assert np.allclose(graph.edges["weight"].to_numpy().reshape(16, 16), wanted, rtol=1e-9)


def activations_by_hand(model, task, grain, steps):
    """EAP-IG over activations: every edge of each of its runs, from the walk that edge ablation is held
    against."""

    def read_all(_reader, _port, writes, bias):
        return sum(writes.values()) + bias

    with torch.no_grad():
        clean, other = (
            walk_by_hand(model, grain, tokens, read_all)[1] for tokens in (task.clean, task.corrupted)
        )
    groups, total = (
        [
            [name for name in clean if name.endswith("embed")],
            *(list(r.names) for r in list_readers(model, grain)[0][:-1]),
        ],
        {},
    )
    for group in groups:
        for alpha, weight in steps:
            leaves, held = {}, {name: other[name] + alpha * (clean[name] - other[name]) for name in group}

            def read(reader, port, writes, bias, leaves=leaves, held=held):
                if (reader, port) not in leaves:
                    leaves[reader, port] = torch.zeros(
                        *task.clean.shape, model.d_model, dtype=model.dtype, requires_grad=True
                    )
                return sum(held.get(name, y) for name, y in writes.items()) + bias + leaves[reader, port]

            logits = walk_by_hand(model, grain, task.clean, read)[0][:, -1]
            metric = (logits.gather(1, task.answers) - logits.gather(1, task.wrong)).mean()
            for key, grad in zip(
                leaves,
                torch.autograd.grad(metric, list(leaves.values()), allow_unused=True, materialize_grads=True),
                strict=True,
            ):
                total[key] = total.get(key, 0) + weight / len(groups) * grad
    return {
        (writer, *key): float((grad * (clean[writer] - other[writer]).detach()).sum())
        for key, grad in total.items()
        for writer in clean
    }


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "gemma2"])
@pytest.mark.parametrize("grain", ["head", "layer", "block"])
def test_paths_of_activations_are_their_loop(name, grain):
    model = tiny_model(name)
    task = make_task(model)
    graph = build_graph(
        model,
        task,
        grain,
        attribution="eap-ig-activations",
        target="metric",
        n_steps=2,
        batch_size=2,
        progress=False,
    )
    wanted = activations_by_hand(model, task, grain, Attribution(n_steps=2).steps)
    got = graph.edges["weight"].to_numpy()
    assert graph.meta["attribution"] == "eap-ig-activations" and np.abs(got).max() > 1e-3
    assert np.allclose(
        got,
        [
            0 if edge[0] == "const" else wanted[edge]
            for edge in zip(*(graph.edges[c].astype(str) for c in ("source", "target", "port")), strict=True)
        ],
        rtol=1e-8,
        atol=1e-11,
    )


def test_on_a_linear_model_paths_of_activations_are_patching_less_blocked_runs():
    known = KNOWN["chain"]()
    model = with_act(known.model, lambda x: x)
    exact, graph = (
        patch_edges(model, known.task, judging=Judging(run=QUIET)),
        build_graph(
            model, known.task, "head", target="metric", attribution="eap-ig-activations", progress=False
        ),
    )
    whole = sum(
        s * float(score_task(model, known.task, forward_stream(model, tokens)).mean())
        for s, tokens in ((1, known.task.clean), (-1, known.task.corrupted))
    )
    runs = len(list_readers(model, "head")[0])  # the embeddings, and each module but logits
    on = exact.edges["weight"].abs().to_numpy() > 0.5
    behind = {"logits": 0} | {
        f"m{i}": model.n_layers - i for i in range(model.n_layers)
    }  # modules on the way of the chain from here on
    share = np.array([(runs - behind[target]) / runs for target in exact.keep(on).edges["target"]])
    assert on.sum() == len(known.edges) and np.allclose(
        graph.keep(on).edges["weight"] / whole, exact.keep(on).edges["weight"] * share, atol=1e-10
    )


@torch.no_grad()
def forward_stream(model, tokens):
    return forward(model, tokens, lambda _n, y, _x: y)


@pytest.mark.parametrize("name", list(KNOWN_FEATURES))
def test_all_methods_have_one_shape_and_are_judged(name):
    known = KNOWN_FEATURES[name]()
    task = known.task
    for method, make in list_methods("feature").items():
        graph = make(known.model, task, known.dictionaries, progress=False)
        table = ablation_curve(
            known.model,
            graph,
            task,
            [len(graph)],
            value="corrupted",
            dictionaries=known.dictionaries,
            n_boot=2,
            progress=False,
        )
        assert (
            graph.meta["ports"] == "merged"
            and graph.meta["dictionaries"].keys() == known.dictionaries.keys()
            and len(graph)
            and table["faithfulness"].notna().all()
        ), method


def test_nothing_passes_a_threshold_that_is_too_high():
    model = tiny_model("gpt2")
    task, dictionaries = make_task(model), all_dictionaries(model, gate="relu")
    for make in (find_feature_circuit, trace_contributions):
        assert set(make(model, task, dictionaries, threshold=1e6, run=QUIET).edges["target"]) == {"logits"}
    blind = replace(task, metric=lambda logits: 0 * logits.sum((1, 2)))
    assert not len(
        find_feature_circuit(
            model,
            blind,
            dictionaries | {f"b{i}": draw(model, f"b{i}", "stream", "relu") for i in range(2)},
            run=QUIET,
        )
    )
    assert not len(trace_contributions(model, blind, dictionaries, run=QUIET))


def test_bad_input_is_refused():
    model = tiny_model("llama")
    task, dictionaries = (
        make_task(model),
        {"m0": draw(model, "m0", gate="relu"), "a1": draw(model, "a1", gate="relu")},
    )
    stream, mid = draw(model, "b0", "stream", "relu"), draw(model, "m1", "stream", "relu")
    graph = find_feature_circuit(model, task, dictionaries, run=QUIET)
    values = build_graph(model, task.clean, dictionaries, progress=False)
    for run, words in [
        (
            lambda: find_feature_circuit(model, task, dictionaries, baseline="mean"),
            "baseline must be 'corrupted' or 'zero', got 'mean'",
        ),
        (
            lambda: find_feature_circuit(model, task, dictionaries, threshold=-1),
            "threshold must be at least 0",
        ),
        (
            lambda: find_feature_circuit(model, replace(task, corrupted=task.clean), dictionaries),
            "corrupted prompts must differ",
        ),
        (lambda: find_feature_circuit(model, task, dictionaries, n_steps=0), "n_steps must be at least 1"),
        (lambda: find_feature_circuit(model, task, {"m1": mid}), "name its module 'b1'"),
        (
            lambda: find_feature_circuit(model, task, {"b0": replace(stream, reads="output")}),
            "'b0' reads 'stream'",
        ),
        (
            lambda: find_feature_circuit(model, task, {"a0.h1": draw(model, "a0.h1")}),
            "whole modules, got one of the head 'a0.h1'",
        ),
        (
            lambda: find_feature_circuit(model, replace(task, metric="accuracy"), dictionaries),
            "metric must be one of",
        ),
        (lambda: find_feature_circuit(model, replace(task, clean=task.clean + 100), dictionaries), "clean"),
        (lambda: trace_contributions(model, task, {"b0": stream}), "leave out b0"),
        (
            lambda: trace_contributions(model, task, dictionaries, threshold=float("nan")),
            "threshold must be a finite number",
        ),
        (lambda: random_features(model, task, dictionaries, n_edges=0), "n_edges must be at least 1"),
        (lambda: weigh_interactions(model, task.clean, {"m0": dictionaries["m0"]}), "at least two layers"),
        (
            lambda: weigh_interactions(
                model, task.clean, {"a1": dictionaries["a1"], "m0": dictionaries["m0"]}
            ),
            "in the order of computation, got a1, m0",
        ),
        (lambda: weigh_interactions(model, task.clean, dictionaries, skip_first=5), "skip_first must lie in"),
        (
            lambda: ablate_circuit_nodes(model, graph, task, dictionaries, value="resample"),
            "value must be one of",
        ),
        (
            lambda: ablate_circuit_nodes(model, graph, task, dictionaries, errors="drop"),
            "errors must be one of",
        ),
        (lambda: ablate_circuit_nodes(model, values, task, dictionaries), "must hold the effects"),
        (
            lambda: ablate_circuit_nodes(model, graph, task, {"m0": dictionaries["m0"]}),
            "dictionaries must be those",
        ),
        (
            lambda: build_graph(model, task, "head", target="metric", attribution="eap-ig-activation"),
            "attribution must be",
        ),
        (
            lambda: build_graph(model, task.clean, "head", attribution="eap-ig-activations"),
            "attribution must be",
        ),
    ]:
        with pytest.raises(ValueError, match=words):
            run()
