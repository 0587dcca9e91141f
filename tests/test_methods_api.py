"""A method of attribution from outside the package: written in a few lines, run at every grain and target."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from circuitgraph.attribution.closed_form import open_reader, value_cotangent
from circuitgraph.attribution.method import METHODS, Attribution, Method, find_method, register
from circuitgraph.attribution.metric import method_names
from circuitgraph.model.blocks import norm_scale, run_mlp
from circuitgraph.model.loading import tiny_model
from circuitgraph.model.modules import list_readers, trace_modules
from feature_oracles import all_dictionaries
from oracles import random_tokens
from short import build_graph
from test_feature_general import make_task


class TwoPoints(Method):
    """The mean of the gradients halfway and at the input."""

    def points(self, n_steps):  # noqa: ARG002
        return [(0.5, 0.5), (1.0, 0.5)]


@dataclass(frozen=True)
class Scaled(Method):
    """The gradient times a number."""

    factor: float = -2.0

    def explain(self, gradients, model, changed, x):  # noqa: ARG002
        return self.factor * gradients(changed)


def build(data, nodes, method, **options):
    """Edges with all weights, by name of source, target and port."""
    model = tiny_model("llama")
    options |= {} if isinstance(nodes, str) else {"keep": None}
    edges = build_graph(model, data, nodes, attribution=method, progress=False, **options).edges
    return edges.astype({"source": str, "target": str, "port": str}).set_index(["source", "target", "port"])


def assert_same(ours, theirs):
    ours, theirs = ours.align(theirs, fill_value=0.0)
    assert np.abs(ours - theirs).max() < 1e-12 and np.abs(theirs).max() > 1e-3


def nodes_of(grain):
    return all_dictionaries(tiny_model("llama")) if grain == "feature" else grain


def mean_weight(data, nodes, one, other, **options):
    """Half of what one method gives an edge and half of what another does."""
    a, b = (build(data, nodes, name, n_steps=1, **options)["weight"] for name in (one, other))
    a, b = a.align(b, fill_value=0.0)
    return (a + b) / 2


def test_a_method_by_hand_on_an_mlp():
    """Gradients of the MLP's share of itself by automatic differentiation, at half its input and at all."""
    model = tiny_model("llama")
    tokens = random_tokens(model, 2, 7)
    with torch.no_grad():
        trace = trace_modules(model, tokens)
    reader = next(r for r in list_readers(model)[0] if r.module == "m1")
    x, scale = trace.reads["m1"], norm_scale(model.layers[1].ln2, trace.reads["m1"])
    cotangent, grad = value_cotangent(trace.writes[:, :, reader.row], 1), 0
    for alpha in (0.5, 1.0):
        at = (alpha * x).requires_grad_()
        value = (run_mlp(model, 1, at, scale=scale)[0] * cotangent).sum()
        grad = grad + torch.autograd.grad(value, at)[0] / 2
    writes = trace.writes[:, :, : reader.n_before]
    wanted = torch.einsum("bpd, bpwd -> bpw", grad, writes)
    for method in (TwoPoints("two-points"), TwoPoints("two-points", closed_form=True)):
        explained = open_reader(model, reader, trace, None, tokens, Attribution(method))
        assert torch.allclose(method.weigh_reader(explained, writes)[:, :, 0], wanted, atol=1e-12)


@pytest.mark.parametrize("grain", ["head", "layer", "block", "feature"])
@pytest.mark.parametrize("closed_form", [True, False])
def test_points_of_ones_own_serve_every_grain(grain, closed_form):
    tokens, nodes = random_tokens(tiny_model("llama"), 2, 7), nodes_of(grain)
    ours = build(tokens, nodes, TwoPoints("two-points", closed_form=closed_form))["weight"]
    assert_same(ours, mean_weight(tokens, nodes, "ig", "gradient"))


def test_points_of_ones_own_serve_a_metric():
    task = make_task(tiny_model("llama"))
    ours = build(task, "head", TwoPoints("two-points"), target="metric")["weight"]
    assert_same(ours, mean_weight(task, "head", "eap-ig", "eap", target="metric"))
    nodes = nodes_of("feature")
    ours = build(task, nodes, TwoPoints("two-points", closed_form=True), target="metric")["weight"]
    assert_same(ours, mean_weight(task, nodes, "ig", "gradient", target="metric"))


@pytest.mark.parametrize("grain", ["head", "layer", "block", "feature"])
def test_what_takes_the_place_of_the_gradient_serves_every_grain(grain):
    tokens, nodes = random_tokens(tiny_model("llama"), 2, 7), nodes_of(grain)
    ours = build(tokens, nodes, Scaled("scaled", scope="sequence"))["weight"]
    assert_same(ours, -2 * build(tokens, nodes, "gradient")["weight"])


def test_what_takes_the_place_of_the_gradient_serves_a_metric():
    task = make_task(tiny_model("llama"))
    ours = build(task, "head", Scaled("scaled", factor=3.0), target="metric")["weight"]
    assert_same(ours, 3 * build(task, "head", "eap", target="metric")["weight"])


def test_a_method_has_a_name_once_it_is_registered():
    method = TwoPoints("two-points")
    with pytest.raises(ValueError, match="attribution must be one of 'ig', 'gradient', .*got 'two-points'"):
        Attribution("two-points")
    try:
        register(method)
        again = TwoPoints("two-points")
        register(again)
        assert Attribution("two-points").method is again and find_method(method) is method
        assert "two-points" in method_names("metric", "head")
        with pytest.raises(ValueError, match="the name 'two-points' is taken"):
            register(Method("two-points"))
    finally:
        del METHODS["two-points"]


def test_a_graph_records_a_method_by_its_name():
    model = tiny_model("llama")
    graph = build_graph(
        model, random_tokens(model, 1, 5), attribution=TwoPoints("two-points"), progress=False
    )
    described = Attribution(TwoPoints("two-points")).describe()
    assert described["attribution"] == "two-points" and list(described) == list(Attribution().describe())
    assert described.items() <= graph.meta.items()


def test_where_a_method_has_no_meaning_it_is_refused():
    of_modules = TwoPoints("two-points", targets=("node/module",))
    of_modules.check("node", "block")
    for target, grain in (("metric", "head"), ("node", "feature"), ("metric", "feature")):
        with pytest.raises(ValueError, match="attribution must be one of .*, got 'two-points'"):
            of_modules.check(target, grain)
    with pytest.raises(ValueError, match="'own' is of blocks"):
        TwoPoints("own", targets=(), refusal="{name!r} is of blocks").check("node", "head")
    with pytest.raises(ValueError, match="give it scope='sequence'"):
        Scaled("scaled").check("node", "feature")
    with pytest.raises(ValueError, match="attribution must be one of"):
        Scaled("scaled", scope="sequence").check("metric", "feature")
    with pytest.raises(ValueError, match="positions='keep' goes with"):
        TwoPoints("two-points").check("node", "feature", True)
    with pytest.raises(ValueError, match="holds the scales"):
        Attribution(TwoPoints("two-points", norms=("frozen",)), norm="live", baseline="mean")
    with pytest.raises(NotImplementedError, match="takes no contributions out"):
        Method("own").weigh_sequence(None, None)


def test_defaults_are_the_methods_own():
    named = {name: method.default_baseline("metric", "head") for name, method in METHODS.items()}
    assert {name for name, baseline in named.items() if baseline == "zero"} == {
        "lrp",
        "gradcam",
        "guided-gradcam",
    }
    assert all(method.default_baseline("node", "head") == "zero" for method in METHODS.values())
    assert all(method.default_baseline("metric", "feature") == "zero" for method in METHODS.values())
