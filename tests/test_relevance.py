"""Attribution methods against captum, the authors' definitions, and brute force."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr import (
    FeatureAblation,
    GuidedBackprop,
    GuidedGradCam,
    InputXGradient,
    IntegratedGradients,
    LayerGradCam,
)
from torch import nn

import oracles
from circuitgraph.attribution.autodiff import VjpOptions, open_sequence, readers_vjp
from circuitgraph.attribution.closed_form import open_reader, reader_gradients, value_cotangent
from circuitgraph.attribution.method import Attribution
from circuitgraph.attribution.method import METHODS
from circuitgraph.attribution.relevance import DetachedHeadNorm, DetachedNorm, grad_cam, guided_average
from circuitgraph.attribution.relevance import value_function as value_of
from circuitgraph.model.blocks import apply_norm, attention_mask, norm_scale, run_logits
from circuitgraph.build import metric as metric_build
from circuitgraph.model.loading import TINY_MODELS, tiny_model
from circuitgraph.model.modules import list_readers, run_reader, trace_modules
from circuitgraph.data.task import Task
from feature_oracles import D_DICT, all_dictionaries, draw
from oracles import random_tokens, walk_by_hand, writes_by_hand
from short import build_graph
from test_feature_general import all_features, by_autograd, nonlinear, reads_of, run_whole

NODE_METHODS = [name for name, method in METHODS.items() if "node/module" in method.targets]
pytestmark = pytest.mark.filterwarnings("ignore:Setting")  # captum says what it sets
PLACES = [("m1", "output"), ("m1", "input"), ("a1", "output"), ("a1", "input"), ("a1.h2", "output")]
WITH_MLP = [name for name in TINY_MODELS if name != "attention-only"]


def open_module(name, grain="head", **options):
    model = tiny_model(name, **options)
    tokens = random_tokens(model)
    with torch.no_grad():
        return (
            model,
            tokens,
            trace_modules(model, tokens, grain),
            {r.module: r for r in list_readers(model, grain)[0]},
        )


def change_backward(model, rule):
    return rule.method.backward(model, rule)


def explain_reader(model, reader, trace, x0, tokens, rule):
    return rule.method.explain_reader(open_reader(model, reader, trace, x0, tokens, rule))


def weigh_reader(model, reader, trace, x0, tokens, rule, contributions):
    return rule.method.weigh_reader(open_reader(model, reader, trace, x0, tokens, rule), contributions)


def value_function(model, reader, trace, tokens, rule):
    return value_of(open_reader(model, reader, trace, None, tokens, rule))


def sequence_gradients(model, module, dictionary, x, index, active, rule, memory=1e9):
    explained = open_sequence(model, module, dictionary, x, index, active, rule, memory)
    return explained.readers, rule.method.explain_sequence(explained)


def brought(model, trace, grain, reader):
    """What each writer brings to a reader, biases included."""
    written, names = trace.writes.clone(), list_readers(model, grain)[1]
    if "const" in names:
        written[:, :, names.index("const")] = trace.biases[reader.module]
    return written[:, :, : reader.n_before]


class Net(nn.Module):
    """The MLP of a layer as a network of modules, for captum: `[batch d pos]` to the sum of its values."""

    def __init__(self, mlp, cotangent):
        super().__init__()
        self.map, self.up, self.act, self.down, self.cotangent = (
            nn.Identity(),
            nn.Linear(*mlp.W_in.shape[::-1]),
            nn.ReLU(),
            nn.Linear(*mlp.W_out.shape[::-1], bias=False),
            cotangent,
        )
        self.double().load_state_dict({"up.weight": mlp.W_in, "up.bias": mlp.b_in, "down.weight": mlp.W_out})

    def forward(self, x):
        return (
            self.down(self.act(self.up(self.map(x).mT)))
            * self.cotangent.repeat(len(x) // len(self.cotangent), 1, 1)
        ).sum((1, 2))


def relu_net():
    model, tokens, trace, readers = open_module("no-norm-relu", "layer")
    cotangent = value_cotangent(trace.writes[:, :, readers["m1"].row], 0)
    return model, tokens, trace, readers["m1"], Net(model.layers[1].mlp, cotangent), trace.reads["m1"]


# Another backward pass


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("method", ["guided-backprop", "lrp", "relp"])
def test_a_changed_backward_pass_leaves_every_value_bit_for_bit(name, method):
    model = tiny_model(name)
    changed, tokens = change_backward(model, Attribution(method)), random_tokens(model)
    for a, b in ((trace_modules(model, tokens), trace_modules(changed, tokens)),):
        assert torch.equal(a.writes, b.writes) and torch.equal(
            run_logits(model, a.reads["logits"]), run_logits(changed, b.reads["logits"])
        )
    assert change_backward(model, Attribution("ig")) is model


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("grain", ["head", "layer", "block"])
@pytest.mark.parametrize("method", ["guided-backprop", "lrp", "relp"])
def test_closed_forms_agree_with_automatic_differentiation_through_the_changed_model(name, grain, method):
    model, tokens, trace, readers = open_module(name, grain)
    held = {
        key: {
            n: DetachedNorm(norm.kind, norm.weight, norm.bias, norm.eps)
            for n, norm in ((n, getattr(layer, n)) for n in ("ln1", "ln1_post", "ln2", "ln2_post"))
        }
        for key, layer in enumerate(model.layers)
    }

    def detach_heads(attn):
        norms = {n: getattr(attn, n) for n in ("q_norm", "k_norm") if getattr(attn, n) is not None}
        return replace(attn, **{n: DetachedHeadNorm(**vars(norm)) for n, norm in norms.items()})

    for pattern in ("live", "frozen") if grain != "block" else ("live",):
        rule = Attribution(method, skip_first=0, pattern=pattern)
        changed = change_backward(model, rule)
        frozen = changed.__class__(
            **{
                **vars(changed),
                "layers": tuple(
                    replace(layer, **held[i], attn=detach_heads(layer.attn))
                    for i, layer in enumerate(changed.layers)
                ),
            }
        )
        for reader in list(readers.values())[:-1]:
            cotangent = value_cotangent(trace.writes[:, :, reader.row : reader.row + len(reader.names)], 0)
            ports = (
                trace.reads[reader.module][:, :, None]
                .repeat(1, 1, len(reader.names) * len(reader.ports), 1)
                .requires_grad_()
            )
            looked = None
            if pattern == "frozen" and reader.kind == "attn":
                attn, x = model.layers[reader.layer].attn, trace.reads[reader.module]
                looked = torch.stack(
                    [oracles.head_by_hand(model, reader.layer, h, x, x, x)[1] for h in range(model.n_heads)],
                    1,
                )
                assert attn is not None
            y = run_reader(frozen, reader, ports, looked)
            (theirs,) = torch.autograd.grad((y * cotangent).sum(), ports)
            if looked is not None:
                theirs = theirs[:, :, 2::3]
            assert torch.allclose(
                reader_gradients(changed, reader, trace, None, tokens, rule), theirs, atol=1e-10
            )


def test_guided_backprop_is_captums():
    model, tokens, trace, reader, net, x = relu_net()
    ours = explain_reader(model, reader, trace, None, tokens, Attribution("guided-backprop", skip_first=0))[
        :, :, 0
    ]
    theirs = GuidedBackprop(net).attribute(x.mT.clone().requires_grad_()).mT
    plain = reader_gradients(model, reader, trace, None, tokens, Attribution("gradient", skip_first=0))[
        :, :, 0
    ]
    assert torch.allclose(ours, theirs, atol=1e-12) and not torch.allclose(ours, plain)


@pytest.mark.parametrize("name", WITH_MLP)
def test_guided_backprop_clips_behind_the_nonlinearity_and_nowhere_else(name):
    model, tokens, trace, readers = open_module(name, "layer")
    rule, mlp, layer, x = (
        Attribution("guided-backprop", skip_first=0),
        model.layers[1].mlp,
        model.layers[1],
        trace.reads["m1"],
    )
    h = apply_norm(layer.ln2, x).detach().requires_grad_()
    up = F.linear(h, mlp.W_in, mlp.b_in)
    pre = up if mlp.W_gate is None else F.linear(h, mlp.W_gate, mlp.b_gate)
    at = pre.detach().requires_grad_()
    (slope,) = torch.autograd.grad(mlp.act(at).sum(), at)
    cotangent = value_cotangent(trace.writes[:, :, readers["m1"].row], 0)
    if layer.ln2_post.kind != "none":
        cotangent = cotangent * layer.ln2_post.weight * trace.post_scale["m1"]
    t = cotangent @ mlp.W_out
    kept = (t * slope * (1 if mlp.W_gate is None else up)).clamp(min=0)
    at_h = kept @ (mlp.W_in if mlp.W_gate is None else mlp.W_gate) + (
        0 if mlp.W_gate is None else (t * mlp.act(pre)) @ mlp.W_in
    )
    moved = x.detach().requires_grad_()
    (theirs,) = torch.autograd.grad(apply_norm(layer.ln2, moved, norm_scale(layer.ln2, x)), moved, at_h)
    assert torch.allclose(
        explain_reader(model, readers["m1"], trace, None, tokens, rule)[:, :, 0], theirs, atol=1e-12
    )
    for module in ("a1", "logits"):
        a, b = (
            explain_reader(model, readers[module], trace, None, tokens, Attribution(method))
            for method in ("guided-backprop", "gradient")
        )
        assert torch.equal(a, b)  # no such nonlinearity there


# Maps


def test_gradcam_is_captums():
    model, tokens, trace, reader, net, x = relu_net()
    rule = Attribution("gradcam", skip_first=0)
    ours = (explain_reader(model, reader, trace, None, tokens, rule)[:, :, 0] * x).sum(-1)
    theirs = LayerGradCam(net, net.map).attribute(x.mT.clone().requires_grad_(), relu_attributions=True)[:, 0]
    assert torch.allclose(ours, theirs, atol=1e-12) and (ours == 0).any() and (ours > 0).any()
    weights = weigh_reader(model, reader, trace, None, tokens, rule, brought(model, trace, "layer", reader))
    assert torch.allclose(weights.sum((2, 3)), theirs, atol=1e-12)
    guided = GuidedGradCam(net, net.map).attribute(x.mT.clone().requires_grad_()).mT
    assert torch.allclose(
        explain_reader(model, reader, trace, None, tokens, Attribution("guided-gradcam", skip_first=0))[
            :, :, 0
        ],
        guided,
        atol=1e-12,
    )


class Port(nn.Module):
    """The sum of one head's values in a sequence, as a function of one of its ports, `[batch d pos]`."""

    def __init__(self, values, x, port, head):
        super().__init__()
        self.map, self.values, self.x, self.port, self.head = nn.Identity(), values, x, port, head

    def forward(self, x):
        moved = self.map(x).mT
        return self.values([moved if i == self.port else self.x for i in range(3)])[..., self.head].sum(1)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "bidirectional"])
def test_gradcam_of_heads_is_captums_port_by_port(name):
    model, tokens, trace, readers = open_module(name)
    reader, x = readers["a1"], trace.reads["a1"]
    ours = explain_reader(model, reader, trace, None, tokens, Attribution("gradcam", skip_first=0)).unflatten(
        2, (-1, 3)
    )
    plain = reader_gradients(
        model, reader, trace, None, tokens, Attribution("gradient", skip_first=0)
    ).unflatten(2, (-1, 3))
    values = value_function(model, reader, trace, tokens, Attribution("gradcam", skip_first=0))
    for head in range(len(reader.names)):
        for port in range(3):
            net = Port(values, x, port, head)
            theirs = LayerGradCam(net, net.map).attribute(
                x.mT.clone().requires_grad_(), relu_attributions=True
            )[:, 0]
            n_read = (
                (plain[:, :, head, port] != 0).any(-1).sum(1, keepdim=True)
            )  # a query at the first position has one key, and no gradient: it is on no map
            assert torch.allclose(
                (ours[:, :, head, port] * x).sum(-1) * n_read / x.shape[1],
                theirs * (plain[:, :, head, port] != 0).any(-1),
                atol=1e-12,
            )


def test_positions_that_are_not_read_are_on_no_map():
    model, tokens, trace, readers = open_module("gpt2", "layer")
    for module, read in (("m0", slice(1, None)), ("logits", slice(1, -1))):
        reader, x = readers[module], trace.reads[module]
        inner = grad_cam(
            reader_gradients(model, reader, trace, None, tokens, Attribution("gradient"))[:, read], x[:, read]
        )
        whole = explain_reader(model, reader, trace, None, tokens, Attribution("gradcam"))
        assert torch.allclose(whole[:, read], inner) and whole[:, 0].abs().max() == 0


# Paths


def authors_path(gradient, start, end, steps, fraction, max_dist):
    """Guided IG as in its authors' code, one input at a time: points of the path, and attributions."""
    x, attribution, points = start.copy(), np.zeros_like(end), []
    whole = np.abs(end - start).sum()

    def to_x(alpha):
        return start + (end - start) * alpha

    for step in range(steps):
        points.append(x.copy())
        actual = gradient(x)
        slope, alpha = actual.copy(), (step + 1) / steps
        lowest, highest = to_x(max(alpha - max_dist, 0)), to_x(min(alpha + max_dist, 1))
        target, gamma = whole * (1 - alpha), np.inf
        while gamma > 1:
            old, behind = x.copy(), (x - start) / (end - start) < max(alpha - max_dist, 0)
            x[behind] = lowest[behind]
            distance = np.abs(x - end).sum()
            if np.isclose(distance, target, rtol=1e-9, atol=1e-9):
                attribution += (x - old) * actual
                break
            slope[x == highest] = np.inf
            chosen = (np.abs(slope) <= np.quantile(np.abs(slope), fraction, method="lower")) & (
                slope != np.inf
            )
            room = (np.abs(x - highest) * chosen).sum()
            gamma = (distance - target) / room if room > 0 else np.inf
            x[chosen] = highest[chosen] if gamma > 1 else (highest + (x - highest) * (1 - gamma))[chosen]
            attribution += (x - old) * actual
    return points, attribution


@pytest.mark.parametrize(
    ("steps", "fraction", "reach"), [(20, 0.25, 0.2), (50, 0.25, 0.08), (12, 0.1, 1.0), (200, 0.25, 0.02)]
)
def test_guided_paths_are_the_authors(steps, fraction, reach):
    random = torch.Generator().manual_seed(0)
    A, B, rows = (
        torch.randn(3, 17, 9, generator=random, dtype=torch.float64),
        torch.randn(3, 9, generator=random, dtype=torch.float64),
        [],
    )
    start, end = torch.randn(2, 3, 17, generator=random, dtype=torch.float64)

    def value(x, r):
        return (torch.tanh(x @ A[r]) * B[r]).sum(-1) + (x[..., 0] * x[..., 1])

    def gradient(x, r):
        at = x.detach().requires_grad_()
        return torch.autograd.grad(value(at, r), at)[0]

    def gradients(x):
        rows.append(x.clone())
        return torch.stack([gradient(x[r], r) for r in range(3)])[None]

    average = guided_average(gradients, start, end, steps, fraction=fraction, reach=reach)[0]
    by_start = torch.zeros_like(end)
    for a, b in zip(rows, [*rows[1:]], strict=False):
        by_start += (b - a) * torch.stack([gradient(a[r], r) for r in range(3)])
    for r in range(3):
        points, attribution = authors_path(
            lambda x, r=r: gradient(torch.from_numpy(x), r).numpy(),
            start[r].numpy().copy(),
            end[r].numpy(),
            steps,
            fraction,
            reach,
        )
        assert (
            len(points) == len(rows) - 1
            and max(np.abs(p - x[r].numpy()).max() for p, x in zip(points, rows, strict=False)) < 1e-8
        )
        assert np.allclose(
            attribution, by_start[r].numpy(), atol=1e-7
        )  # their sum, with slopes at the start of each step
        if steps >= 50:
            assert (
                abs((average[r] * (end - start)[r]).sum() - (value(end[r], r) - value(start[r], r)))
                < 30 / steps**2
            )
    assert not torch.allclose(average, guided_average(gradients, start, end, steps, reach=0)[0], atol=1e-3)


def test_without_a_band_the_guided_path_is_straight_and_ig_captums():
    model, tokens, trace, reader, net, x = relu_net()

    def gradients(rows):
        at = rows.view_as(x.mT).clone().requires_grad_()
        return torch.autograd.grad(net(at).sum(), at)[0].flatten(1)[None]

    ours = (
        guided_average(gradients, torch.zeros_like(x).mT.flatten(1), x.mT.flatten(1), 40, reach=0)[0].view_as(
            x.mT
        )
        * x.mT
    )
    assert torch.allclose(
        ours,
        IntegratedGradients(net).attribute(x.mT.clone(), n_steps=41, method="riemann_trapezoid") * 41 / 40,
        atol=1e-10,
    )  # its weights of 41 points sum to 40/41
    for rule, theirs in (
        (
            Attribution(n_steps=12, skip_first=0),
            IntegratedGradients(net).attribute(x.mT.clone(), n_steps=12, method="gausslegendre"),
        ),
        (Attribution("gradient", skip_first=0), InputXGradient(net).attribute(x.mT.clone().requires_grad_())),
    ):
        assert torch.allclose(
            explain_reader(model, reader, trace, None, tokens, rule)[:, :, 0] * x, theirs.mT, atol=1e-12
        )


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("grain", ["head", "block"])
def test_guided_ig_is_complete(name, grain):
    model, tokens, trace, readers = open_module(name, grain)
    other = trace_modules(model, random_tokens(model, seed=5), grain)
    for base, options in ((None, {}), (other, {"baseline": "corrupted"})):
        rule = Attribution("guided-ig", n_steps=64, **options)
        for reader in readers.values():
            x, x0 = (
                trace.reads[reader.module],
                torch.zeros((), dtype=torch.float64) if base is None else base.reads[reader.module],
            )
            values, written = (
                value_function(model, reader, trace, tokens, rule),
                brought(model, trace, grain, reader),
            )
            if base is not None:
                written = written - brought(model, base, grain, reader)
            weights = (
                weigh_reader(model, reader, trace, None if base is None else x0, tokens, rule, written)
                .sum((1, 3))
                .unflatten(1, (len(reader.names), -1))
                .sum(2)
            )
            change = (values([x] * len(reader.ports)) - values([x0.expand_as(x)] * len(reader.ports))).sum(1)
            assert (weights - change).abs().max() < (
                2e-2 if "relu" in name else 2e-3
            ) * change.abs().max().clamp(min=1), reader.module  # ReLU: kinks between the points


# LRP


def softmax_remainder(model, trace, layer, cotangent):
    """Of the half of a head's value that comes to its pattern, the part that the softmax keeps.

    `cotangent [batch pos head d_model]` is on what heads write.
    """
    x, attn = trace.reads[f"a{layer}"], model.layers[layer].attn
    kept = []
    for head in range(model.n_heads):
        shared = head // (model.n_heads // model.n_kv_heads)
        q, k, v = (
            oracles.project_by_hand(model, layer, port, i, x)
            for port, i in (("q", head), ("k", shared), ("v", shared))
        )
        q, k = (oracles.turn_by_hand(model, layer, t) for t in (q, k))
        u = cotangent[:, :, head] @ attn.W_O[:, head]
        raw = (q @ k.mT * attn.scale).detach().requires_grad_()
        scores = raw if attn.softcap is None else attn.softcap * torch.tanh(raw / attn.softcap)
        pattern = scores.masked_fill(attention_mask(attn, x.shape[1]), -torch.inf).softmax(-1)
        arrives = 0.5 * (pattern * (u @ v.mT)).sum()
        (passed,) = torch.autograd.grad(arrives, raw)
        kept.append(arrives.detach() - (passed * raw.detach()).sum())
    return torch.stack(kept)


def bias_relevance(model, reader, trace, rule):
    """Relevance that biases inside a module keep, by head: each bias dotted with its coefficient."""
    changed, i = change_backward(model, rule), reader.layer
    layer, leaves = changed.layers[i], []

    def leaf(t):
        if t is None:
            return None
        leaves.append(t.detach().clone().requires_grad_())
        return leaves[-1]

    def opened(part, names):
        return part.__class__(**{**vars(part), **{n: leaf(getattr(part, n)) for n in names}})

    if reader.kind == "mlp":
        layer = layer.__class__(
            **{
                **vars(layer),
                "ln2": opened(layer.ln2, ["bias"]),
                "mlp": opened(layer.mlp, ["b_in", "b_gate"]),
            }
        )
    else:
        layer = layer.__class__(
            **{
                **vars(layer),
                "ln1": opened(layer.ln1, ["bias"]),
                "attn": opened(layer.attn, ["b_Q", "b_K", "b_V"]),
            }
        )
    changed = changed.__class__(
        **{
            **vars(changed),
            "layers": tuple(layer if j == i else other for j, other in enumerate(changed.layers)),
        }
    )
    cotangent = value_cotangent(
        trace.writes[:, :, reader.row : reader.row + len(reader.names)], rule.skip_first
    )
    y = run_reader(
        changed,
        reader,
        trace.reads[reader.module][:, :, None].expand(-1, -1, len(reader.names) * len(reader.ports), -1),
    )
    values = (y * cotangent).sum((0, 1, 3))
    if not leaves:
        return torch.zeros_like(values)
    grads = [
        torch.autograd.grad(v, leaves, retain_graph=True, materialize_grads=True, allow_unused=True)
        for v in values
    ]
    return torch.stack(
        [sum((g * b).sum() for g, b in zip(row, leaves, strict=True)) for row in grads]
    ).detach()


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("pattern", ["live", "frozen"])
def test_lrp_conserves_relevance(name, pattern):
    """A module's value is the relevance of all writers and `const`, and of inner biases and softmax."""
    model, tokens, trace, readers = open_module(name)
    rule = Attribution("lrp", skip_first=0, pattern=pattern)
    for reader in readers.values():
        values = value_function(model, reader, trace, tokens, rule)(
            [trace.reads[reader.module]] * len(reader.ports)
        ).sum((0, 1))
        weights = (
            weigh_reader(model, reader, trace, None, tokens, rule, brought(model, trace, "head", reader))
            .sum((0, 1, 3))
            .unflatten(0, (len(reader.names), -1))
        )
        if reader.kind == "logits":
            if model.logit_softcap is None and model.b_U is None and model.ln_final.bias is None:
                assert torch.allclose(weights.sum(1), values, atol=1e-10)
            continue
        kept = bias_relevance(model, reader, trace, rule)
        if reader.kind == "attn" and pattern == "live":
            cotangent = value_cotangent(trace.writes[:, :, reader.row : reader.row + len(reader.names)], 0)
            post = model.layers[reader.layer].ln1_post
            if post.kind != "none":
                cotangent = cotangent * post.weight * trace.post_scale[reader.module][:, :, None]
            kept = kept + softmax_remainder(model, trace, reader.layer, cotangent)
        assert torch.allclose(weights.sum(1) + kept, values, atol=1e-9), reader.module
        if reader.kind == "attn" and pattern == "live" and name == "llama":
            assert torch.allclose(weights[:, 2], values / 2, atol=1e-10) and torch.allclose(
                weights[:, 0], weights[:, 1], atol=1e-10
            )  # no biases: half to values, queries and keys alike


def test_lrp_is_relevance_handed_down_step_by_step():
    """A gated MLP of three units, and a head of three positions, in relevances rather than coefficients."""
    model, tokens, trace, readers = open_module("llama")
    rule, mlp, layer = Attribution("lrp", skip_first=0), model.layers[1].mlp, model.layers[1]
    x, y = trace.reads["m1"][0, 4], trace.writes[0, 4, readers["m1"].row]
    h = apply_norm(layer.ln2, x)
    up, gate = mlp.W_in @ h, mlp.W_gate @ h
    hidden = mlp.act(gate) * up
    R_out = y * y / y.square().sum()  # the value, by channel of the output
    R_hidden = (mlp.W_out * hidden * (R_out / y)[:, None]).sum(0)  # linear: by share of each output
    R_h = sum(
        (W * h * (half / pre)[:, None]).sum(0)
        for W, pre, half in ((mlp.W_in, up, R_hidden / 2), (mlp.W_gate, gate, R_hidden / 2))
    )  # product: half each; activation and norm: all of it
    ours = explain_reader(model, readers["m1"], trace, None, tokens, rule)[0, 4, 0] * x
    assert torch.allclose(ours, R_h, atol=1e-12) and abs(float(ours.sum()) - 1) < 1e-12
    attn, x, head = model.layers[1].attn, trace.reads["a1"], 2
    h, shared = apply_norm(layer.ln1, x)[0], head // 2
    q, k = (oracles.turn_by_hand(model, 1, (h @ W.T)[None])[0] for W in (attn.W_Q[head], attn.W_K[shared]))
    v, S = h @ attn.W_V[shared].T, (q @ k.T) * attn.scale
    A = S.masked_fill(attention_mask(attn, len(h)), -torch.inf).softmax(-1)
    y = trace.writes[0, :, readers["a1"].row + head]
    z = A @ v
    R_z = torch.einsum("de, pe, pd -> pe", attn.W_O[:, head], z, y / y.square().sum(1, keepdim=True))
    R_pair = A[:, :, None] * v[None] * torch.where(z == 0, 0, R_z / z)[:, None]  # [query key channel]
    R_v, R_A = R_pair.sum(0) / 2, R_pair.sum(2) / 2
    R_S = torch.where(A > 0, S * (R_A - A * R_A.sum(1, keepdim=True)), 0)
    in_k = (q[:, None] * k[None] * attn.scale) * torch.where(S == 0, 0, R_S / S)[:, :, None] / 2
    R_q, R_k = in_k.sum(1), in_k.sum(0)
    ours = explain_reader(model, readers["a1"], trace, None, tokens, rule)[0].unflatten(1, (-1, 3))[:, head]
    for port, R in enumerate((R_q, R_k, R_v)):
        assert torch.allclose((ours[:, port] * x[0]).sum(1), R.sum(1), atol=1e-12)


# A task's metric


def make_task(model):
    answers = torch.tensor([[1, 2], [3, 7], [4, 5]])
    return Task(
        random_tokens(model, 3, 7, 2),
        random_tokens(model, 3, 7, 3),
        "logit_diff",
        answers[:, :1],
        answers[:, 1:],
    )


class Clip(torch.autograd.Function):
    """Pass back positive gradients alone."""

    @staticmethod
    def forward(_ctx, x):
        return x.clone()

    @staticmethod
    def backward(_ctx, g):
        return g.clamp(min=0)


def detached_norm(norm, x, whole=None):
    """A norm written out, its scale without gradient."""
    whole = x if whole is None else whole
    if norm.kind == "none":
        return x
    if norm.kind == "layer":
        x, whole = x - x.mean(-1, keepdim=True), whole - whole.mean(-1, keepdim=True)
    y = x / (whole.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt().detach()
    y = y if norm.weight is None else y * norm.weight
    return y if norm.bias is None else y + norm.bias


def mlp_with_rules(method):
    """An MLP written out with the rules of a method."""
    guided = method == "guided-backprop"

    def gate(value, up):
        return value * up if guided else (value * up.detach() + value.detach() * up) / 2

    def mlp(model, layer, x):
        m, h = model.layers[layer].mlp, oracles.norm_by_hand(model.layers[layer].ln2, x)
        up = h @ m.W_in.T + (0 if m.b_in is None else m.b_in)
        pre = up if m.W_gate is None else h @ m.W_gate.T + (0 if m.b_gate is None else m.b_gate)
        value = m.act(Clip.apply(pre)) if guided else pre * (m.act(pre) / pre).detach()
        value = value if m.W_gate is None else gate(value, up)
        return oracles.norm_by_hand(model.layers[layer].ln2_post, value @ m.W_out.T)

    return mlp


def derivatives_along_edges(model, task, written):
    """The metric's derivative by one number for each edge, walked writer by writer."""
    numbers = {}

    def read(reader, port, writes, bias):
        x = bias
        for writer, y in writes.items():
            edge = f"{writer}->{reader}<{port}>" if port in "qkv" else f"{writer}->{reader}"
            m = numbers.setdefault(edge, torch.ones((), dtype=torch.float64, requires_grad=True))
            x = x + m * y + (1 - m) * written[writer]
        return x

    logits = walk_by_hand(model, "head", task.clean, read)[0][:, -1]
    value = (logits.gather(1, task.answers) - logits.gather(1, task.wrong)).mean()
    return dict(zip(numbers, torch.autograd.grad(value, list(numbers.values())), strict=True))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt-neox"])
@pytest.mark.parametrize("method", ["gradient", "relp", "guided-backprop"])
def test_edges_of_a_metric_are_derivatives_along_each_edge(name, method, monkeypatch):
    """The metric as a function of one number for each edge, with the method's rules written out."""
    model = tiny_model(name)
    task, norm = make_task(model), oracles.norm_by_hand
    written = writes_by_hand(model, "head", task.corrupted)
    if method == "relp":
        monkeypatch.setattr(oracles, "norm_by_hand", detached_norm)
    if method != "gradient":
        monkeypatch.setattr(oracles, "mlp_by_hand", mlp_with_rules(method))
    theirs = derivatives_along_edges(model, task, written)
    monkeypatch.setattr(oracles, "norm_by_hand", norm)
    ours = build_graph(model, task, "head", target="metric", attribution=method, progress=False)
    weights = dict(zip(ours.edge_names, ours.edges["weight"], strict=True))
    assert max(abs(weights[edge] - float(w)) for edge, w in theirs.items()) < 1e-9
    assert len(theirs) == len(weights) - sum(edge.startswith("const") for edge in weights)


@pytest.mark.parametrize(
    ("name", "recorded"), [("llama", -0.1566617997729697), ("qwen2", 0.11779889496216345)]
)
def test_lrp_of_a_metric_is_that_of_the_authors_package(name, recorded):
    """Relevance of the embeddings, as lxt 2.1 gave it once on the same weights in double precision.

    Its rules were those of RMSNorm, gated MLPs and attention; it adds 1e-10 to each denominator.
    """
    edges = build_graph(
        tiny_model(name),
        make_task(tiny_model(name)),
        "head",
        target="metric",
        attribution="lrp",
        progress=False,
    ).edges
    assert abs(edges.query("source == 'embed'")["weight"].sum() - recorded) < 1e-6


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_lrp_of_a_metric_holds_patterns_if_asked_and_maps_are_positive(name):
    model = tiny_model(name)
    task = make_task(model)
    edges = build_graph(
        model, task, "head", target="metric", attribution="lrp", pattern="frozen", progress=False
    ).edges
    assert (edges.query("port in ('q', 'k')")["weight"] == 0).all() and (
        edges.query("port == 'v'")["weight"] != 0
    ).any()
    for method in ("gradcam", "guided-gradcam"):
        graph = build_graph(model, task, "head", target="metric", attribution=method, progress=False)
        assert (
            graph.meta["attribution"] == method
            and graph.meta["baseline"] == "zero"
            and np.isfinite(graph.edges["weight"]).all()
        )
        if method == "gradcam":
            assert (
                graph.edges.groupby(["target", "port"], observed=True)["weight"].sum() > -1e-9
            ).all()  # what is kept of each map is positive


# Occlusion


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize(
    "options", [{}, {"norm": "live"}, {"baseline": "corrupted"}, {"ports": "merged"}, {"pattern": "frozen"}]
)
def test_occlusion_is_captums_feature_ablation(name, options):
    grain = "layer" if options.get("norm") == "live" else "head"
    model, tokens, trace, readers = open_module(name, grain)
    rule, base = (
        Attribution("occlusion", **options),
        trace_modules(model, random_tokens(model, seed=5), grain),
    )
    for reader in readers.values():
        values, x, written = (
            value_function(model, reader, trace, tokens, rule),
            trace.reads[reader.module],
            brought(model, trace, grain, reader),
        )
        other = torch.zeros_like(written) if rule.baseline == "zero" else brought(model, base, grain, reader)
        ours = weigh_reader(model, reader, trace, None, tokens, rule, written - other).unflatten(
            2, (len(reader.names), -1)
        )
        every, kinds = (
            list(range(len(reader.ports))),
            [[2]]
            if rule.pattern == "frozen" and reader.kind == "attn"
            else [[i] for i in range(len(reader.ports))],
        )
        for i, moved in enumerate([every] if rule.ports == "merged" else kinds):

            def value(c, moved=moved, values=values, x=x, every=every):
                at_ports = values([c.sum(2) if j in moved else x for j in every])
                return at_ports.flatten(1).sum(1, keepdim=True)

            mask = torch.arange(written.shape[2])[None, None, :, None]
            theirs = FeatureAblation(value).attribute(written, baselines=other, feature_mask=mask)[:, 0, :, 0]
            assert torch.allclose(ours[:, :, :, i].sum((1, 2)), theirs, atol=1e-10)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt-neox"])
def test_occlusion_with_live_norms_is_the_reader_run_without_its_writer(name):
    model, tokens, trace, readers = open_module(name)
    for reader in list(readers.values())[1:-1]:
        x, written = trace.reads[reader.module], brought(model, trace, "head", reader)
        ours = weigh_reader(
            model, reader, trace, None, tokens, Attribution("occlusion", norm="live"), written
        )
        clean, n = trace.writes[:, :, reader.row : reader.row + len(reader.names)], len(reader.ports)
        for w in (0, reader.n_before - 1):
            for port in range(n):
                ports = x[:, :, None].repeat(1, 1, len(reader.names) * n, 1)
                ports[:, :, port::n] -= written[:, :, w, None]
                fall = ((clean - run_reader(model, reader, ports)) * clean).sum(-1) / clean.square().sum(-1)
                assert (
                    torch.allclose(ours[:, 1:, port::n, w], fall[:, 1:], atol=1e-10)
                    and (ours[:, 0] == 0).all()
                )


def test_a_head_under_a_shared_live_norm_is_refused():
    model, tokens, trace, readers = open_module("gemma2")
    with pytest.raises(ValueError, match="whose heads share a norm"):
        value_function(model, readers["a0"], trace, tokens, Attribution("occlusion", norm="live"))


# Every grain


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("method", NODE_METHODS)
def test_whole_modules_as_features_give_the_graph_of_layers(name, method):
    model, index = tiny_model(name), ["source", "target", "port"]
    tokens = random_tokens(model, 2, 7)
    for pattern in ("live", "frozen"):
        modules = build_graph(model, tokens, "layer", attribution=method, pattern=pattern, progress=False)
        features = build_graph(
            model, tokens, {}, attribution=method, pattern=pattern, keep=None, progress=False
        )
        a, b = (
            g.edges.astype({c: str for c in index}).set_index(index)["weight"] for g in (modules, features)
        )
        a, b = a.align(b, fill_value=0.0)
        assert np.abs(a - b).max() < 1e-10 and np.abs(a).max() > 1e-3


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("method", NODE_METHODS)
def test_every_method_runs_at_every_grain(name, method):
    model = tiny_model(name)
    tokens = random_tokens(model, 2, 7)
    for nodes in ("head", "block", all_dictionaries(model)):
        graph = build_graph(model, tokens, nodes, attribution=method, n_steps=4, progress=False)
        assert (
            graph.meta["attribution"] == method
            and np.isfinite(graph.edges["weight"]).all()
            and (graph.edges["weight"] != 0).any()
        )


@pytest.mark.parametrize("method", ["gradcam", "guided-ig", "occlusion", "lrp"])
def test_readers_in_groups_give_the_same_edges(method):
    model = tiny_model("llama")
    tokens, dictionaries = random_tokens(model, 2, 6), all_dictionaries(model)
    a, b = (
        build_graph(
            model,
            tokens,
            dictionaries,
            attribution=method,
            n_steps=4,
            keep=None,
            memory=memory,
            progress=False,
        )
        for memory in (4e9, 3_000)
    )
    one, two = (dict(zip(g.edge_names, g.edges["weight"], strict=True)) for g in (a, b))
    assert one.keys() == two.keys() and max(abs(one[edge] - two[edge]) for edge in one) < 1e-12


@pytest.mark.parametrize(("module", "reads"), PLACES)
@pytest.mark.parametrize("method", ["guided-backprop", "lrp"])
def test_readers_of_features_are_pulled_back_through_the_changed_model(module, method, reads):
    model = tiny_model("llama")
    live = VjpOptions(gates="live")
    for pattern in ("live",):
        rule = Attribution(method, pattern=pattern)
        changed, dictionary, x = (
            change_backward(model, rule),
            nonlinear(module, reads),
            reads_of(model, module),
        )
        grads, oracle = (
            readers_vjp(changed, module, dictionary, x, all_features(dictionary, len(x)), rule, options=live),
            by_autograd(changed, module, dictionary, x, rule),
        )
        at = torch.arange(len(x))
        for port, grad in grads.local.items():
            assert torch.allclose(grad, oracle["q" if port == "mlp" else port][at, :, at], atol=1e-10)
        for port, grad in grads.sources.items():
            assert torch.allclose(grad, oracle[port], atol=1e-10)
        plain = readers_vjp(
            model, module, dictionary, x, all_features(dictionary, len(x)), rule, options=live
        )
        if module == "m1" and reads == "output":
            assert not torch.allclose(plain.local["mlp"], grads.local["mlp"])


def sequence(module, reads="output", name="llama"):
    """A model, a dictionary, what its module reads, and which features are active where (not at first)."""
    model = tiny_model(name)
    x, dictionary = reads_of(model, module), draw(model, module, reads, "none")
    index = torch.cat([all_features(dictionary, len(x)), torch.full((len(x), 1), D_DICT)], 1)
    active = (torch.rand(index.shape, generator=torch.Generator().manual_seed(3)) < 0.6).double()
    active[0] = 0
    return model, dictionary, x, index, active


@pytest.mark.parametrize(("module", "reads"), PLACES)
def test_maps_of_features_are_those_of_their_sums_over_a_sequence(module, reads):
    model, dictionary, x, index, active = sequence(module, reads)
    which, grads = sequence_gradients(model, module, dictionary, x, index, active, Attribution("gradcam"))
    for port, grad in grads.items():
        for f in which.tolist():
            ports = {name: x.clone().requires_grad_() for name in ("q", "k", "v", "in")}
            total = (run_whole(model, module, dictionary, x, ports)[:, f] * active[:, f]).sum()
            g = torch.autograd.grad(
                total, ports["q" if port == "mlp" else port], allow_unused=True, materialize_grads=True
            )[0]
            read = (g != 0).any(1)
            alpha = g.sum(0) / max(int(read.sum()), 1)
            theirs = torch.stack(
                [alpha if read[s] and alpha @ x[s] > 0 else 0 * alpha for s in range(len(x))]
            )
            assert torch.allclose(grad[:, which.tolist().index(f)], theirs, atol=1e-10)
    for method in ("guided-gradcam", "guided-ig"):
        a, b = (
            sequence_gradients(
                model, module, dictionary, x, index, active, Attribution(method), memory=memory
            )[1]
            for memory in (1e9, 1)
        )
        assert a.keys() == b.keys() and all(
            torch.allclose(a[port], b[port], atol=1e-12) for port in a
        )  # a piece at a time


@pytest.mark.parametrize(("module", "reads"), PLACES)
@pytest.mark.parametrize("ports", ["split", "merged"])
def test_guided_ig_of_features_is_complete(module, reads, ports):
    model, dictionary, x, index, active = sequence(module, reads)
    which, grads = sequence_gradients(
        model, module, dictionary, x, index, active, Attribution("guided-ig", n_steps=96, ports=ports)
    )
    total = sum((grad * x[:, None]).sum((0, 2)) for grad in grads.values())
    clean, empty = (
        run_whole(model, module, dictionary, x, dict.fromkeys(("q", "k", "v", "in"), end))
        for end in (x, 0 * x)
    )
    change = ((clean - empty) * active).sum(0)
    assert which.tolist() == list(range(D_DICT + 1)) and torch.allclose(total, change, atol=2e-3)


@pytest.mark.parametrize(("module", "reads"), PLACES)
@pytest.mark.parametrize("options", [{}, {"ports": "merged"}])
def test_occlusion_of_features_is_brute_force(module, reads, options):
    model, dictionary, x, index, _ = sequence(module, reads)
    written = torch.randn(5, *x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 3
    rule = Attribution("occlusion", **options)
    explained = open_sequence(model, module, dictionary, x, index, torch.ones(index.shape), rule)
    falls = rule.method.weigh_sequence(explained, written)
    run = partial(run_whole, model, module, dictionary, x)
    clean = dict.fromkeys(("q", "k", "v", "in"), x)
    for port, weights in falls.items():
        moved = {"in": tuple(clean)}.get(port, (port,)) if options else ("q",) if port == "mlp" else (port,)
        for w, c in enumerate(written):
            assert torch.allclose(weights[w], run(clean) - run(clean | {p: x - c for p in moved}), atol=1e-10)


# What has no meaning


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attribution": "relp"}, "relp.*is of a task's metric"),
        ({"attribution": "gradcam", "baseline": "mean"}, "has no baseline"),
        ({"attribution": "lrp", "norm": "live", "baseline": "mean"}, "holds the scales"),
        ({"attribution": "guided-ig", "norm": "live", "baseline": "mean"}, "holds the scales"),
        ({"attribution": "saliency"}, "attribution must be one of 'ig', 'gradient', 'guided-ig'"),
        ({"attribution": "eap"}, "attribution must be one of .*got 'eap'"),
        ({"attribution": "lrp", "nodes": {}, "positions": "keep"}, "positions='keep' goes with"),
        ({"attribution": "guided-backprop", "norm": "live"}, "no meaning with baseline='zero'"),
    ],
)
def test_what_has_no_meaning_is_refused(options, words):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=words):
        build_graph(model, random_tokens(model, 1, 7), progress=False, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attribution": "guided-ig"}, "path of each reader's own"),
        ({"attribution": "occlusion"}, "exact patching of edges"),
        ({"attribution": "relp", "nodes": {}}, "is of a task's metric and of modules"),
        ({"attribution": "gradcam", "nodes": {}}, "maps the one value"),
        ({"attribution": "gradient", "pattern": "frozen"}, "pattern is no option"),
        ({"attribution": "gradcam", "baseline": "corrupted"}, "has no baseline"),
    ],
)
def test_what_has_no_meaning_for_a_metric_is_refused(options, words):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=words):
        build_graph(model, make_task(model), target="metric", progress=False, **options)


def test_a_prompt_without_effect_gives_no_weight():
    """Two answers alike leave the metric no gradient on that prompt; the others' edges stay as they are."""
    model = tiny_model("gpt2")
    task = make_task(model)
    answers = task.answers.clone()
    answers[1] = task.wrong[1]
    flat = Task(task.clean, task.corrupted, "logit_diff", answers, task.wrong)
    rest = Task(
        task.clean[[0, 2]], task.corrupted[[0, 2]], "logit_diff", task.answers[[0, 2]], task.wrong[[0, 2]]
    )
    a, b = (
        build_graph(
            model,
            t,
            all_dictionaries(model),
            target="metric",
            attribution="gradient",
            keep=None,
            progress=False,
        )
        for t in (flat, rest)
    )
    one, two = (dict(zip(g.edge_names, g.edges["weight"], strict=True)) for g in (a, b))
    assert max(abs(one.get(edge, 0.0) * 3 - w * 2) for edge, w in two.items()) < 1e-10


@pytest.mark.parametrize("method", ["eap", "lrp", "gradcam"])
def test_gradients_of_a_metric_are_computed_once(method, monkeypatch):
    "Not once for each reader: that costs time and memory as the model has modules."
    model = tiny_model("llama")
    tokens = random_tokens(model, 4, 8)
    task = Task(tokens, tokens.roll(1, 0), lambda logits: logits[:, -1, 0])
    calls = []
    port_gradients = metric_build.port_gradients

    def count(*args, **options):
        calls.append(args)
        return port_gradients(*args, **options)

    monkeypatch.setattr(metric_build, "port_gradients", count)
    build_graph(model, task, "head", target="metric", attribution=method, baseline="zero", progress=False)
    assert len(calls) == 1
