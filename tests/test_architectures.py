"""Every supported architecture against Hugging Face's own code, beyond every window and in half precision."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import circuitgraph as cg
from circuitgraph.model.blocks import run_logits
from circuitgraph.model.decompose import UnsupportedModel, check_decomposition
from circuitgraph.model.loading import load_model
from circuitgraph.model.modules import trace_modules
from circuitgraph.names import GRAINS
from families import FAMILIES, GROUPED, N_POS, exact, hugging_face

pytestmark = pytest.mark.filterwarnings("ignore", "error:::circuitgraph")


@pytest.fixture(scope="module")
def both(request, tmp_path_factory):
    family, options = FAMILIES[request.param]
    theirs = hugging_face(family, options)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    ours = load_model(folder, dtype=torch.float64)
    tokens = torch.randint(50, (3, N_POS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "softmax", lambda x, dim, dtype=None: x.softmax(dim))  # noqa: ARG005
        return request.param, ours, exact(theirs)(tokens).logits, tokens, folder


def deviation(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


families = pytest.mark.parametrize("both", list(FAMILIES), indirect=True)


@families
def test_modules_give_hugging_face_s_logits_beyond_every_window(both):
    name, model, logits, tokens, _ = both
    assert max(check_decomposition(model, n_pos=8)) < 1e-6
    tol = 1e-6 if name in ("gpt-neo", "gpt-j") else 1e-10  # their attention is in single precision
    for grain in GRAINS:
        stream = trace_modules(model, tokens, grain).reads["logits"]
        assert deviation(run_logits(model, stream), logits) < tol


@families
def test_all_edges_kept_is_the_model_at_every_grain(both):
    _, model, logits, tokens, _ = both
    for grain in GRAINS:
        kept = cg.run_ablated(model, cg.complete_graph(model, grain), tokens, value="zero")
        assert deviation(kept, logits) < 1e-6


@families
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(both, dtype):
    "Weights are rounded once; what is computed from them is not."
    _, _, _, tokens, folder = both
    half = load_model(folder, dtype=dtype)
    assert half.dtype == torch.float32 and half.bridge.original_model.dtype == dtype
    rounded = load_model(folder, dtype=torch.float32)
    for p in rounded.bridge.original_model.parameters():
        p.data = p.data.to(dtype).float()
    graph = cg.build_graph(half, tokens, "layer", run=cg.Run(progress=False))
    assert all(math.isfinite(w) for w in graph.edges["weight"])
    expected = load_model(rounded.bridge)(tokens)
    kept = cg.run_ablated(half, cg.complete_graph(half, "head"), tokens, value="zero")
    assert deviation(kept, expected) < 2e-2


def test_a_window_that_is_read_wrong_is_noticed(tmp_path):
    "The short sequences of the check do not reach the window; the long one does."
    hugging_face("Mistral", {**GROUPED, "sliding_window": 40}).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert [layer.attn.window for layer in model.layers] == [40, 40]
    layers = tuple(replace(layer, attn=replace(layer.attn, window=None)) for layer in model.layers)
    with pytest.raises(UnsupportedModel, match="layer 0 deviates from the original by .* on 48 positions"):
        check_decomposition(replace(model, layers=layers))
