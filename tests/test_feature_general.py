"""Edges of any encoder and decoder: closed forms, finite differences, autograd, completeness, the metric."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from circuitgraph.attribution.closed_form import _project_back, attention_vjp
from circuitgraph.attribution.method import Attribution
from circuitgraph.dictionary.places import neuron_basis, visit_modules
from circuitgraph.dictionary.protocol import FunctionDictionary, Gate, LinearDictionary, PursuitDictionary
from circuitgraph.build.readers import carry_cotangents, list_active, mlp_readers_vjp
from circuitgraph.cut import list_parts, part_ports, read_activity
from circuitgraph.attribution.autodiff import contributions, neuron_contributions, neuron_gradients
from circuitgraph.attribution.autodiff import VjpOptions, freeze_readers, heads_vjp, readers_vjp
from circuitgraph.attribution.autodiff import reader_values, sources_to_stream
from circuitgraph.attribution.metric import metric_gradients, value_effects
from circuitgraph.model.blocks import (
    Norm,
    apply_norm,
    attention_mask,
    head_scales,
    norm_scale,
    project_qkv,
    run_attention,
)
from circuitgraph.model.blocks import run_logits, run_mlp, write_heads
from circuitgraph.model.loading import TINY_MODELS, tiny_model
from circuitgraph.model.modules import trace_modules
from circuitgraph.data.task import Task, score_answers
from feature_oracles import Hidden
from oracles import random_tokens, with_act
from test_feature_edges import all_dictionaries, draw

WITH_MLP = [name for name in TINY_MODELS if name != "attention-only"]


def drawer(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def nonlinear(module, reads="output", d_in=16, d_dict=9, smooth=True):
    """Two layers each way: neither encoder nor decoder is affine."""
    random = drawer(sum(map(ord, module)))
    A, B, C, D = (
        random(d_in, 20) / d_in**0.5,
        random(20, d_dict) / 3,
        random(d_dict, 20) / 2,
        random(20, 16) / 4,
    )
    bend = torch.tanh if smooth else torch.relu
    return FunctionDictionary(
        module, reads, d_dict, lambda y: bend(bend(y @ A) @ B + 0.3), lambda a: F.silu(a @ C + 0.2) @ D + 0.1
    )


def all_features(dictionary, n):
    return torch.arange(dictionary.d_dict).expand(n, -1)


def reads_of(model, module, n_pos=6, seed=1):
    """What a module reads on one sequence, `[pos d_model]`."""
    return (
        trace_modules(model, random_tokens(model, 1, n_pos, seed), "layer")
        .reads[module.split(".")[0]][0]
        .detach()
    )


def run_whole(model, module, dictionary, x, ports):
    """Values of all features and of the error node `[pos reader]` by definition.

    A function of what the module reads by port; norms have the scale that they have at `x`.
    """
    kind, layer, head = (
        module[0],
        int(module[1:].split(".")[0]),
        int(module.split(".h")[1]) if ".h" in module else -1,
    )
    weights = model.layers[layer]
    norm = weights.ln1 if kind == "a" else weights.ln2
    scale = norm_scale(norm, x)[None]

    def write(q, k, v):
        if kind == "m":
            return run_mlp(model, layer, q[None], scale=scale, post_scale=run_mlp(model, layer, x[None])[1])[
                0
            ][0] + (0 if weights.mlp.b_out is None else weights.mlp.b_out), None
        scales = head_scales(model, layer, apply_norm(norm, x)[None])
        z = run_attention(model, layer, q[None], k[None], v[None], scale=scale, head_scales=scales)
        post = write_heads(model, layer, run_attention(model, layer, x[None], x[None], x[None]))[1]
        out = write_heads(model, layer, z, post_scale=post)[0][0]
        return out[:, head] if head >= 0 else out.sum(1) + (
            0 if weights.attn.b_O is None else weights.attn.b_O
        ), z[0].transpose(0, 1).flatten(1)

    def place(ports, y, z):
        if dictionary.reads == "normed":
            return apply_norm(norm, ports["in"], scale[0])
        if dictionary.reads == "scaled":
            return apply_norm(Norm(norm.kind, None, None, norm.eps), ports["in"], scale[0])
        return {"output": y, "stream": ports["in"] + y, "input": ports["in"], "z": z}[dictionary.reads]

    y, z = write(ports["q"], ports["k"], ports["v"])
    own = write(x, x, x)[0].detach()
    if dictionary is None:
        bias = None if head >= 0 else weights.attn.b_O if kind == "a" else weights.mlp.b_out
        own = own - (0 if bias is None else bias)
        return (y * own / own.square().sum(1, keepdim=True)).sum(1, keepdim=True)
    clean = {port: x for port in ports}
    clean_acts = dictionary.encode(place(clean, *write(x, x, x))).detach()
    acts, error = dictionary.encode(place(ports, y, z)), own - dictionary.decode(clean_acts)
    return torch.cat(
        [
            acts,
            ((y - dictionary.decode(acts)) * error / error.norm(dim=1, keepdim=True)).sum(1, keepdim=True),
        ],
        1,
    )


def by_autograd(model, module, dictionary, x, rule):
    """Gradients `{port: [pos reader source d_model]}`, one reader at one position at a time."""
    names, total = ("q", "k", "v", "in"), None
    for alpha, weight in rule.steps:
        ports = {name: (alpha * x).requires_grad_() for name in names}
        values = run_whole(model, module, dictionary, x, ports)
        grads = [
            [
                torch.autograd.grad(
                    v, list(ports.values()), retain_graph=True, allow_unused=True, materialize_grads=True
                )
                for v in row
            ]
            for row in values
        ]
        step = {
            name: torch.stack([torch.stack([g[i] for g in row]) for row in grads])
            for i, name in enumerate(names)
        }
        total = {name: weight * step[name] + (0 if total is None else total[name]) for name in names}
    return total


def assert_gradients(model, module, dictionary, rule, x=None, tol=1e-10):
    x = reads_of(model, module) if x is None else x
    grads = readers_vjp(
        model,
        module,
        dictionary,
        x,
        None if dictionary is None else all_features(dictionary, len(x)),
        rule,
        options=VjpOptions(gates="live"),
    )
    wanted, at = by_autograd(model, module, dictionary, x, rule), torch.arange(len(x))
    if module[0] == "m":
        wanted["mlp"] = wanted.pop("q") + wanted.pop("k") + wanted.pop("v")
    for port, full in wanted.items():
        got = grads.sources.get(port)
        if got is None:
            got = torch.zeros_like(full)
            if port in grads.local:
                got[at, :, at] = grads.local[port]
        assert torch.allclose(got, full, atol=tol), (port, (got - full).abs().max())
    return grads, x


def sum_weights(grads, x):
    """Weights of all writers together, over all ports and positions: `[pos reader]`."""
    return sum(torch.einsum("prd, pd -> pr", g, x) for g in grads.local.values()) + sum(
        torch.einsum("prsd, sd -> pr", g, x) for g in grads.sources.values()
    )


@pytest.mark.parametrize("name", TINY_MODELS)
def test_gradients_are_those_of_each_value(name):
    model = tiny_model(name)
    for module in ["a1", "a1.h1"] + ["m1"] * (name in WITH_MLP):
        assert_gradients(model, module, nonlinear(module), Attribution(n_steps=3))


@pytest.mark.parametrize("reads", ["stream", "input", "normed", "scaled", "z"])
@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_places(name, reads):
    model = tiny_model(name)
    for module in ["a1"] + ["m1"] * (reads != "z"):
        assert_gradients(
            model,
            module,
            nonlinear(module, reads, d_in=model.n_heads * model.d_head if reads == "z" else 16),
            Attribution(n_steps=2),
        )


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "odd-heads"])
def test_modules_and_heads_without_dictionary(name):
    model = tiny_model(name)
    for module in ("a1", "a0.h1", "m1"):
        grads, x = assert_gradients(model, module, None, Attribution(n_steps=16))
        assert grads.change.shape == (len(x), 1) and torch.allclose(
            sum_weights(grads, x), grads.change, atol=1e-5
        )


@pytest.mark.parametrize(
    "name,gate",
    [
        *((name, "topk") for name in TINY_MODELS),
        *(("gemma2", gate) for gate in ("none", "relu", "gated", "jumprelu")),
    ],
)
def test_closed_forms_of_affine_encoders(name, gate):
    model = tiny_model(name)
    dictionaries, rule, tokens = (
        all_dictionaries(model, gate=gate),
        Attribution(n_steps=3),
        random_tokens(model, 1, 6),
    )
    parts, _ = list_parts(model, dictionaries)
    activity = read_activity(model, tokens, parts)
    for part in parts:
        x, module = activity.reads[part.module], part.module
        readers = list_active(model, part, carry_cotangents(model, part), activity, skip_first=0)
        grads = readers_vjp(model, module, dictionaries[module], x[0], activity.index[module], rule)
        on = readers.active[..., None]
        if part.kind == "mlp":
            assert torch.allclose(
                grads.local["mlp"] * on,
                mlp_readers_vjp(model, part.layer, x, readers.inner, rule) * on,
                atol=1e-12,
            )
        else:
            assert_attention_is_closed_form(model, part, x, readers, grads, rule, on)


def assert_attention_is_closed_form(model, part, x, readers, grads, rule, on):
    layer, n = model.layers[part.layer], x.shape[1]
    scale = norm_scale(layer.ln1, x)
    normed = [apply_norm(layer.ln1, at, scale) for at in (0 * x, x)]
    scales = head_scales(model, part.layer, normed[1])
    start, end = (project_qkv(model, part.layer, h, n, scales) for h in normed)
    for p in range(n):
        u = torch.zeros(readers.inner.shape[1], model.n_heads, n, model.d_head, dtype=x.dtype)
        u[:, :, p] = readers.inner[p]
        total = [torch.zeros_like(u)] * 3
        for alpha, weight in rule.steps:
            q, k, v = (
                torch.lerp(a, b, alpha).expand(len(u), -1, -1, -1) for a, b in zip(start, end, strict=True)
            )
            total = [
                t + weight * d
                for t, d in zip(
                    total, attention_vjp(layer.attn, q, k, v, attention_mask(layer.attn, n), u), strict=True
                )
            ]
        wanted = (
            _project_back(model, part.layer, tuple(total), x.expand(len(u), -1, -1), live=False).sum(2)
            * on[p][:, None, None]
        )
        for i, port in enumerate("qkv"):
            got = grads.local["q"][p] * on[p] if port == "q" else grads.sources[port][p] * on[p][:, None]
            assert torch.allclose(got, wanted[:, p, 0] if port == "q" else wanted[:, :, i], atol=1e-12), port


@pytest.mark.parametrize("reads", ["stream", "input", "normed", "scaled"])
@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_closed_forms_of_what_is_read_before_a_module(name, reads):
    model = tiny_model(name)
    dictionaries, tokens = all_dictionaries(model, reads=reads), random_tokens(model, 1, 6)
    parts, _ = list_parts(model, dictionaries)
    activity = read_activity(model, tokens, parts)
    for part in parts:
        readers = list_active(model, part, carry_cotangents(model, part), activity, skip_first=0)
        grads = readers_vjp(
            model,
            part.module,
            dictionaries[part.module],
            activity.reads[part.module][0],
            activity.index[part.module],
            Attribution(n_steps=3),
        )
        assert torch.allclose(
            grads.local["in"] * readers.active[..., None],
            readers.direct * readers.active[..., None],
            atol=1e-12,
        )
        assert part_ports(part, Attribution()) == tuple(
            port for port in ("mlp", "q", "k", "v", "in") if port in grads.local | grads.sources
        )


def test_finite_differences():
    model, step = tiny_model("gemma2"), 1e-6
    for module, reader, position in (("m1", 2, 3), ("m1", 9, 0), ("a1", 4, 5), ("a1", 9, 5), ("a0.h3", 1, 2)):
        dictionary, x = nonlinear(module), reads_of(model, module)
        grads = readers_vjp(
            model, module, dictionary, x, all_features(dictionary, len(x)), Attribution("gradient")
        )
        merged = readers_vjp(
            model,
            module,
            dictionary,
            x,
            all_features(dictionary, len(x)),
            Attribution("gradient", ports="merged"),
        )
        for source, coordinate in ((position, 3), (0, 7)):
            ends = []
            for sign in (1, -1):
                moved = x.clone()
                moved[source, coordinate] += sign * step
                ends.append(
                    run_whole(model, module, dictionary, x, dict.fromkeys(("q", "k", "v", "in"), moved))[
                        position, reader
                    ]
                )
            slope = float((ends[0] - ends[1]) / (2 * step))
            got = (
                merged.sources["in"][position, reader, source, coordinate]
                if merged.sources
                else merged.local["in"][position, reader, coordinate] * (source == position)
            )
            assert abs(float(got) - slope) < 1e-7, (module, reader, source)
        assert set(grads.local) == ({"mlp"} if module[0] == "m" else {"q"})


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-neox", "attention-only"])
def test_weights_are_complete(name):
    model = tiny_model(name)
    for module in ["a1", "a0.h0"] + ["m1"] * (name in WITH_MLP):
        x, dictionary = reads_of(model, module), nonlinear(module)
        grads = readers_vjp(
            model, module, dictionary, x, all_features(dictionary, len(x)), Attribution(n_steps=16)
        )
        clean, empty = (
            run_whole(model, module, dictionary, x, dict.fromkeys(("q", "k", "v", "in"), end))
            for end in (x, 0 * x)
        )
        wanted = clean - empty
        assert torch.allclose(grads.change, wanted, atol=1e-12) and wanted.abs().max() > 0.1
        assert (sum_weights(grads, x) - wanted).abs().max() < 1e-4


def test_memory_and_positions_leave_gradients_as_they_are():
    model = tiny_model("qwen2")
    for module in ("a1", "m1"):
        x, dictionary = reads_of(model, module), nonlinear(module, "stream")
        index = all_features(dictionary, len(x)).flip(1)
        whole = readers_vjp(model, module, dictionary, x, index, Attribution(n_steps=3))
        small = readers_vjp(
            model, module, dictionary, x, index, Attribution(n_steps=3), options=VjpOptions(memory=1)
        )
        part = readers_vjp(model, module, dictionary, x, index, Attribution(n_steps=3), positions=slice(2, 4))
        none = readers_vjp(
            model, module, dictionary, x, index, Attribution(n_steps=3), options=VjpOptions(error=False)
        )
        for kind in ("local", "sources"):
            for port, grad in getattr(whole, kind).items():
                assert (
                    torch.allclose(getattr(small, kind)[port], grad, atol=1e-14)
                    and torch.allclose(getattr(part, kind)[port], grad[2:4], atol=1e-14)
                    and torch.allclose(getattr(none, kind)[port], grad[:, :-1], atol=1e-14)
                )
        assert torch.allclose(part.change, whole.change[2:4])
    assert (
        readers_vjp(
            model, "m1", dictionary, x, index[:, :0], Attribution(), options=VjpOptions(error=False)
        ).local
        == {}
    )


def test_frozen_patterns_leave_the_values_alone():
    model = tiny_model("llama")
    dictionary, x = nonlinear("a1"), reads_of(model, "a1")
    grads = readers_vjp(
        model, "a1", dictionary, x, all_features(dictionary, 6), Attribution(n_steps=16, pattern="frozen")
    )
    assert (
        not grads.local
        and list(grads.sources) == ["v"]
        and torch.allclose(sum_weights(grads, x), grads.change, atol=1e-6)
    )


def test_sources_in_the_heads_meet_projected_writers():
    model = tiny_model("qwen2")
    dictionary, x, writers = nonlinear("a1"), reads_of(model, "a1"), drawer()(6, 5, 16)
    index, rule, layer = all_features(dictionary, 6), Attribution(n_steps=3), model.layers[1]
    whole, heads = (vjp(model, "a1", dictionary, x, index, rule) for vjp in (readers_vjp, heads_vjp))
    for port, W in (("k", layer.attn.W_K), ("v", layer.attn.W_V)):
        normed = apply_norm(replace(layer.ln1, bias=None), writers, norm_scale(layer.ln1, x)[:, None])
        met = torch.einsum(
            "prhse, swhe -> prsw", heads.sources[port], torch.einsum("swd, hed -> swhe", normed, W)
        )
        assert torch.allclose(
            met, torch.einsum("prsd, swd -> prsw", whole.sources[port], writers), atol=1e-12
        )
        assert torch.equal(sources_to_stream(model, 1, port, heads.sources[port], x), whole.sources[port])


def test_a_head_is_its_share_of_the_layer():
    model = tiny_model("llama")
    x, rule, W = reads_of(model, "a1"), Attribution(n_steps=3), drawer()(16, 7)
    no_error = VjpOptions(error=False)

    def linear(module):
        zeros = torch.zeros(7).double(), torch.zeros(16).double()
        return LinearDictionary(module, "output", W, W.mT, *zeros, Gate("none"))

    index = torch.arange(7).expand(6, -1)
    heads = [
        readers_vjp(model, f"a1.h{h}", linear(f"a1.h{h}"), x, index, rule, options=no_error) for h in range(4)
    ]
    layer = readers_vjp(model, "a1", linear("a1"), x, index, rule, options=no_error)
    for port in ("k", "v"):
        assert torch.allclose(sum(h.sources[port] for h in heads), layer.sources[port], atol=1e-12)
    assert torch.allclose(sum(h.local["q"] for h in heads), layer.local["q"], atol=1e-12)


class _Jump(torch.autograd.Function):  # of the older form, which torch.func refuses
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * (x > 0.1)

    @staticmethod
    def backward(ctx, grad):
        return grad * (ctx.saved_tensors[0] > 0.1)


def test_encoders_with_gradients_of_their_own():
    model, random = tiny_model("llama"), drawer()
    x, W = reads_of(model, "m1"), random(16, 8)
    own = FunctionDictionary("m1", "output", 8, lambda y: _Jump.apply(y @ W), lambda a: a @ W.mT)
    plain = replace(own, encoder=lambda y: (y @ W) * (y @ W > 0.1))
    directions = F.normalize(random(12, 16), dim=1)
    pursuit = PursuitDictionary("m1", "output", directions, torch.zeros(16).double(), max_steps=3)
    index = torch.arange(8).expand(6, -1)
    a, b = (readers_vjp(model, "m1", d, x, index, Attribution(n_steps=3)).local["mlp"] for d in (own, plain))
    assert torch.allclose(a, b, atol=1e-14) and a.abs().max() > 0.1
    assert_gradients(model, "m1", pursuit, Attribution(n_steps=2))


@pytest.mark.parametrize("smooth", [True, False])
def test_contributions_sum_to_what_is_written(smooth):
    random, dictionary = drawer(), nonlinear("m0")
    C, D = random(9, 20), random(20, 16)
    if not smooth:
        dictionary = replace(dictionary, decoder=lambda a: torch.relu(a @ C + 0.1) @ D)
    acts = random(40, 9).relu()
    index = acts.topk(int((acts != 0).sum(1).max())).indices
    written, constant = contributions(dictionary, acts, index)
    change = dictionary.decode(acts) - constant
    assert torch.equal(constant, dictionary.decode(torch.zeros(9).double())) and written.shape == (
        40,
        index.shape[1],
        16,
    )
    assert (written.sum(1) - change).norm() / change.norm() < (1e-3 if smooth else 2e-2)
    assert not written[acts.gather(1, index) == 0].any() and torch.allclose(
        contributions(dictionary, acts, index, memory=1)[0], written
    )
    for p, r in ((3, 1), (7, 0)):
        a, total = acts[p], 0
        for alpha, weight in Attribution(n_steps=16).steps:
            total = (
                total
                + weight * torch.autograd.functional.jacobian(dictionary.decode, alpha * a)[:, index[p, r]]
            )
        assert torch.allclose(written[p, r], a[index[p, r]] * total, atol=1e-12)


def test_contributions_of_affine_decoders_are_directions():
    dictionary = draw(tiny_model("llama"), "m0")
    acts = dictionary.encode(drawer()(5, 16))
    index = acts.abs().topk(4).indices
    written, constant = contributions(dictionary, acts, index)
    assert torch.equal(written, acts.gather(1, index)[..., None] * dictionary.W_dec[index]) and torch.equal(
        constant, dictionary.b_dec
    )
    unknown = Hidden(dictionary)  # nothing is known of the decoder
    assert torch.allclose(contributions(unknown, acts, index, 1)[0], written, atol=1e-14)


@pytest.mark.parametrize("name", WITH_MLP)
def test_neurons(name):
    model = tiny_model(name)
    x, neurons = reads_of(model, "m1"), neuron_basis(model, "m1")
    index = all_features(neurons, 6).flip(1)[:, :7]
    grads = readers_vjp(model, "m1", neurons, x, index, Attribution(n_steps=5))
    closed = neuron_gradients(model, 1, x, index, Attribution(n_steps=5))
    assert torch.allclose(grads.local["in"][:, :-1], closed, atol=1e-13)
    assert (
        not grads.local["in"][:, -1].any() and not grads.local["mlp"].any()
    )  # the error is nothing but rounding, and reads nothing
    acts = neurons.encode(apply_norm(model.layers[1].ln2, x))
    written, constant = neuron_contributions(model, 1, acts, all_features(neurons, 6))
    assert torch.allclose(written.sum(1) + constant, neurons.decode(acts), atol=1e-12)
    if model.layers[1].ln2_post.kind == "none":
        assert torch.allclose(written, contributions(neurons, acts, all_features(neurons, 6))[0], atol=1e-14)
    else:
        with pytest.raises(ValueError, match="must sum to what it writes"):
            contributions(neurons, acts, all_features(neurons, 6))


# The metric as the target


def make_task(model, metric="logit_diff", n=5, n_pos=6, padded=True):
    tokens, answers = random_tokens(model, 2 * n, n_pos, 3), random_tokens(model, n, 3, 4)
    return Task(
        tokens[:n],
        tokens[n:],
        metric,
        answers[:, :2],
        answers[:, 2:],
        torch.tensor([n_pos, n_pos - 2, n_pos, n_pos - 1, 3][:n]) if padded else None,
    )


def mean_metric(model, task, change=None):
    """The mean metric, differentiable, with outputs of modules changed by `change(name, output)`."""

    def visit(kind, layer, places):
        return None if kind == "b" or change is None else change(f"{kind}{layer}", places["output"])

    logits = run_logits(model, visit_modules(model, task.clean, visit))
    if not isinstance(task.metric, str):
        return task.metric(logits).mean()
    return score_answers(
        logits[torch.arange(len(logits)), task.last], task.answers, task.wrong, task.metric
    ).mean()


def collect(model, task, **options):
    parts = list(metric_gradients(model, task, **options))
    return {name: torch.cat([found[name] for _, found in parts]) for name in parts[0][1]}


@pytest.mark.parametrize(
    "name,metric",
    [
        *((name, "logit_diff") for name in TINY_MODELS),
        *(("gpt2", metric) for metric in ("prob_diff", "ce", "own")),
    ],
)
def test_metric_gradients_of_a_spliced_model(name, metric):
    model = tiny_model(name)
    task = make_task(
        model,
        metric
        if metric != "own"
        else lambda logits: logits[:, -1, :5].logsumexp(-1) * logits[:, -2, 3].mean(),
    )
    grads, trace = collect(model, task, batch_size=2), trace_modules(model, task.clean, "layer")
    for module, dictionary in all_dictionaries(model).items():
        written = {}
        mean_metric(
            model,
            task,
            lambda m, y, module=module, written=written: written.setdefault("y", y) if m == module else None,
        )
        acts = dictionary.encode(written["y"]).detach().requires_grad_()
        error = (written["y"] - dictionary.decode(acts)).detach()
        size = error.norm(dim=-1, keepdim=True).requires_grad_()
        value = mean_metric(
            model,
            task,
            lambda m, _, module=module, d=dictionary, acts=acts, error=error, size=size: (
                d.decode(acts) + F.normalize(error, dim=-1) * size if m == module else None
            ),
        )
        by_acts, by_error = torch.autograd.grad(value, [acts, size])
        index = all_features(dictionary, task.clean.numel())
        effects = value_effects(
            dictionary,
            grads[module].flatten(0, 1),
            written["y"].detach().flatten(0, 1),
            acts.flatten(0, 1),
            index,
        )
        assert (
            torch.allclose(effects, torch.cat([by_acts, by_error], -1).flatten(0, 1), atol=1e-12)
            and effects.abs().max() > 1e-6
        )
    assert (
        set(grads) == {"embed", "logits", *all_dictionaries(model)}
        and grads["logits"].shape == trace.reads["logits"].shape
    )


def test_metric_gradients_stop_at_the_end_of_a_prompt():
    model = tiny_model("llama")
    task = make_task(model)
    for grad in collect(model, task).values():
        assert not grad[4, 3:].any() and grad[4, :3].any()


def test_effects_through_a_bent_decoder_and_of_a_module():
    model = tiny_model("gpt2")
    task, dictionary = make_task(model), nonlinear("m0")
    grad = collect(model, task)["m0"]
    y = trace_modules(model, task.clean, "layer").writes[:, :, 4] + model.layers[0].mlp.b_out
    y = y.detach()
    acts = dictionary.encode(y).requires_grad_()
    error = (y - dictionary.decode(acts)).detach()
    (wanted,) = torch.autograd.grad(
        mean_metric(model, task, lambda m, _: dictionary.decode(acts) + error if m == "m0" else None), acts
    )
    got = value_effects(
        dictionary,
        grad.flatten(0, 1),
        y.flatten(0, 1),
        acts.flatten(0, 1),
        all_features(dictionary, acts[..., 0].numel()),
        error=False,
    )
    assert torch.allclose(got, wanted.flatten(0, 1), atol=1e-13)
    own, share = y - model.layers[0].mlp.b_out, torch.ones(*y.shape[:2], 1, dtype=y.dtype, requires_grad=True)
    (wanted,) = torch.autograd.grad(
        mean_metric(model, task, lambda m, _: own * share + model.layers[0].mlp.b_out if m == "m0" else None),
        share,
    )
    assert torch.allclose(
        value_effects(None, grad.flatten(0, 1), own.flatten(0, 1)), wanted.flatten(0, 1), atol=1e-13
    )


def test_metric_weights_are_single_edges_patched_in_a_linear_model():
    model = with_act(tiny_model("no-norm"), lambda x: x)
    task, dictionaries = make_task(model, n=3, padded=False), all_dictionaries(model, gate="none")
    source, target = dictionaries["m0"], dictionaries["m1"]
    grads, seen = collect(model, task), {}
    mean_metric(model, task, lambda m, y: seen.update({m: y.detach()}))
    x = trace_modules(model, task.clean, "layer").reads["m1"].detach()
    acts, index = source.encode(seen["m0"]), all_features(target, x[..., 0].numel())
    at_ports = readers_vjp(model, "m1", target, x.flatten(0, 1), index, Attribution(n_steps=1))
    effects = value_effects(
        target,
        grads["m1"].flatten(0, 1),
        seen["m1"].flatten(0, 1),
        target.encode(seen["m1"]).flatten(0, 1),
        index,
    ).view(3, 6, -1)
    whole = mean_metric(model, task)
    for prompt, position, i, j in ((0, 5, 2, 7), (1, 5, 0, 3), (2, 5, 10, 11)):
        contribution = acts[prompt, position, i] * source.W_dec[i]
        weight = (
            at_ports.local["mlp"].view(3, 6, -1, 16)[prompt, position, j]
            @ contribution
            * effects[prompt, position, j]
        )
        moved = x.clone()
        moved[prompt, position] -= contribution
        out = run_mlp(model, 1, moved)[0] + model.layers[1].mlp.b_out
        old, new = (
            torch.cat([target.encode(y), (y - target.decode(target.encode(y)))], -1)
            for y in (seen["m1"], out)
        )
        change = torch.zeros_like(x)
        if j < 11:
            change[prompt, position] = (new - old)[prompt, position, j] * target.W_dec[j]
        else:  # the error node, along its clean direction
            unit = F.normalize(old[prompt, position, 11:], dim=0)
            change[prompt, position] = unit * (unit @ (new - old)[prompt, position, 11:])
        patched = mean_metric(model, task, lambda m, y, change=change: y + change if m == "m1" else None)
        assert abs(float((whole - patched - weight).detach())) < 1e-13 and abs(float(weight)) > 1e-6


# Refusals


@pytest.mark.parametrize(
    "change,words",
    [
        ({"module": "b0"}, "cut it into its parts"),
        ({"module": "a9"}, "no 'a9'"),
        ({"module": "m0"}, "must be that of 'm0'"),
        ({"index": None}, "index goes with a dictionary"),
        ({"index": torch.zeros(5, 2, dtype=torch.long)}, "must have the shape"),
        ({"index": torch.full((6, 1), 9)}, "must lie in"),
        ({"dictionary": None}, "index goes with"),
        ({"options": VjpOptions(gates="open")}, "gates must be"),
        ({"rule": Attribution(baseline="mean")}, "zero baseline"),
        (
            {
                "dictionary": replace(
                    nonlinear("m1"), encoder=lambda y: (y @ torch.ones(16, 9).double()).detach()
                ),
                "options": VjpOptions(error=False),
            },
            "must carry a gradient",
        ),
    ],
)
def test_refusals(change, words):
    model = tiny_model("llama")
    given = {
        "module": "m1",
        "dictionary": nonlinear("m1"),
        "x": reads_of(model, "m1"),
        "index": torch.zeros(6, 2, dtype=torch.long),
        "rule": Attribution(),
    } | change
    if given["module"] == "b0":
        given["dictionary"] = replace(nonlinear("m1"), module="b0")
    with pytest.raises(ValueError, match=words):
        readers_vjp(model, **given)


def test_what_a_parallel_mlp_does_not_read_is_refused():
    model = tiny_model("gpt-neox")
    with pytest.raises(ValueError, match="beside it"):
        readers_vjp(
            model,
            "m1",
            nonlinear("m1", "stream"),
            reads_of(model, "m1"),
            torch.zeros(6, 2, dtype=torch.long),
            Attribution(),
        )


def test_refusals_of_contributions_and_metrics():
    model, dictionary = tiny_model("llama"), nonlinear("m0")
    with pytest.raises(ValueError, match="leaves some out"):
        contributions(dictionary, torch.ones(2, 9).double(), torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="go with a dictionary"):
        value_effects(dictionary, torch.zeros(2, 16), torch.zeros(2, 16))
    with pytest.raises(ValueError, match="a step"):
        list(metric_gradients(model, make_task(model), "accuracy"))
    with pytest.raises(ValueError, match="one number for each"):
        list(metric_gradients(model, make_task(model, lambda logits: logits[:, -1])))
    with pytest.raises(ValueError, match="differentiable"):
        list(metric_gradients(model, make_task(model, lambda logits: (logits[:, -1, 0] > 0).double())))
    with pytest.raises(ValueError, match="batch_size"):
        list(metric_gradients(model, make_task(model), batch_size=0))


def test_values_at_the_clean_input_are_activations():
    model = tiny_model("llama")
    dictionary, x = draw(model, "m1", gate="gated"), reads_of(model, "m1")
    y = run_mlp(model, 1, x[None])[0][0]
    acts = dictionary.encode(y)
    for gates in ("frozen", "live"):
        readers = freeze_readers(model, "m1", dictionary, x, x, all_features(dictionary, 6), gates=gates)
        values = reader_values(readers, x, x)
        assert torch.allclose(values[:, :-1], acts, atol=1e-12) and torch.allclose(
            values[:, -1], (y - dictionary.decode(acts)).norm(dim=1), atol=1e-12
        )
