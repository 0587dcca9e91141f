"""Dictionaries: every kind, output of the source libraries, files, places and splices, views, refusals."""

import json
import shutil
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from circuitgraph.build.build import build_graph
from circuitgraph.dictionary.formats import from_saelens, hook_place
from circuitgraph.dictionary.look import plot_activations, read_features, show_top, top_activations
from circuitgraph.dictionary.places import encoder_input, fit_dictionary, identity_dictionary
from circuitgraph.dictionary.places import move_to_stream, neuron_basis, principal_components
from circuitgraph.dictionary.places import read_places, run_spliced
from circuitgraph.dictionary.protocol import FunctionDictionary, Gate, LinearDictionary, PursuitDictionary
from circuitgraph.dictionary.protocol import find_structure, reconstruct
from circuitgraph.dictionary.store import load_dictionaries, load_dictionary, save_dictionary
from circuitgraph.model.blocks import run_logits
from circuitgraph.model.loading import TINY_MODELS, load_model, tiny_model
from circuitgraph.model.modules import trace_modules
from circuitgraph.options import Run
from oracles import random_tokens, writes_by_hand

pytestmark = pytest.mark.filterwarnings(
    "ignore", "error:::circuitgraph"
)  # transformers and TransformerLens warn while they boot a model; what this package causes is an error
D, K = 32, 80


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / shape[0] ** 0.5


def linear(gate, reads="output", **options):
    return LinearDictionary(
        "m1",
        reads,
        draw(D, K, seed=1),
        draw(K, D, seed=2),
        options.pop("b_enc", draw(K, seed=3)),
        options.pop("b_dec", draw(D, seed=4)),
        gate,
        **options,
    )


IN, OUT = draw(D, K, seed=1), draw(K, D, seed=2)


def wave(x):
    return torch.sin(x @ IN) ** 2


def bend(acts):
    return torch.tanh(acts @ OUT) * 3


TINY = tiny_model("llama")
GATED = Gate("gated", b_gate=draw(K, seed=5), r_mag=draw(K, seed=6), b_mag=draw(K, seed=7))
KINDS = {
    "linear autoencoder": linear(Gate("none")),
    "mlp": linear(Gate(), b_in=draw(D, seed=4)),
    "mlp, another centre": linear(Gate(), b_in=draw(D, seed=8)),
    "topk": linear(Gate("topk", k=9)),
    "abstopk": linear(Gate("abstopk", k=9)),
    "groupmax": linear(Gate("groupmax", k=8)),
    "jumprelu": linear(Gate("jumprelu", threshold=draw(K, seed=5).abs())),
    "gated": linear(GATED, b_enc=torch.zeros(K)),
    "gated, biased": linear(GATED),
    "transcoder": linear(Gate(), "normed"),
    "skip transcoder": linear(Gate(), "normed", W_skip=draw(D, D, seed=9)),
    "jumprelu transcoder": linear(Gate("jumprelu", threshold=draw(K, seed=5).abs()), "input"),
    "topk transcoder": linear(Gate("topk", k=9), "scaled"),
    "centred transcoder": linear(Gate(), "normed", b_in=draw(D, seed=4)),
    "matching pursuit": PursuitDictionary(
        "m1", "output", F.normalize(draw(K, D), dim=1), draw(D, seed=4), 0.05, 12
    ),
    "pca": principal_components(draw(200, D), 10, "m1"),
    "functions": FunctionDictionary("m1", "output", K, wave, bend),
    "functions, linear decoder": FunctionDictionary(
        "m1", "output", K, wave, lambda a: a @ OUT, OUT, torch.zeros(D)
    ),
    "neurons": neuron_basis(TINY, "m1"),
    "whole module": identity_dictionary(TINY, "m1"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind, tmp_path):
    d = KINDS[kind]
    d_in = TINY.d_model if kind in ("neurons", "whole module") else D
    x = (
        draw(3, 5, d_in, seed=11)
        .to(torch.float64 if kind in ("neurons", "whole module") else torch.float32)
        .mul(3)
        .requires_grad_()
    )
    acts = d.encode(x)
    recon = d.decode(acts)
    assert (
        acts.shape == (3, 5, d.d_dict) and recon.shape == x.shape and d.encode(x[0, 0]).shape == (d.d_dict,)
    )
    (grad,) = torch.autograd.grad(reconstruct(d, x).square().sum(), x)
    assert grad.isfinite().all() and grad.abs().sum(-1).min() > 0
    known = find_structure(d)
    assert (known.W_dec is None) == (kind == "functions") and (known.W_enc is None) == (
        kind in ("functions", "functions, linear decoder", "neurons", "matching pursuit")
    )
    if known.W_dec is not None:
        assert torch.allclose(recon, acts @ known.W_dec + known.b_dec, atol=1e-5)
    save_dictionary(d, tmp_path / "d", d_in, TINY.weights_hash)
    back = load_dictionary(tmp_path / "d", TINY, trust=True)
    assert (back.module, back.reads, back.d_dict) == (d.module, d.reads, d.d_dict)
    assert torch.equal(back.encode(x), acts) and torch.equal(reconstruct(back, x), reconstruct(d, x))
    for name in ("W_enc", "W_dec", "b_enc", "b_dec", "W_skip", "b_in"):
        ours, theirs = getattr(d, name, None), getattr(back, name, None)
        assert (ours is None) == (theirs is None) and (ours is None or torch.equal(ours, theirs)), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d"] and not list(tmp_path.rglob("*.pkl"))
    with pytest.raises(FileExistsError, match="choose another folder"):
        save_dictionary(d, tmp_path / "d", d_in)


# SAELens: in use, in training, old files, a release.


def test_dictionaries_still_in_training_are_those_that_saelens_saves(tmp_path):
    import sae_lens

    for kind in (
        "batchtopk",
        "matryoshka_batchtopk",
        "topk",
        "gated",
        "jumprelu",
        "standard",
        "matching_pursuit",
    ):
        for rescale in ({}, {"rescale_acts_by_decoder_norm": True}) if "topk" in kind else ({},):
            made, config = sae_lens.registry.get_sae_training_class(kind)
            extra = {
                "batchtopk": {"k": 6.0},
                "matryoshka_batchtopk": {"k": 6.0, "matryoshka_widths": [20, K]},
                "topk": {"k": 6},
            }.get(kind, {})
            sae = made(
                config(
                    d_in=D,
                    d_sae=K,
                    metadata=sae_lens.saes.sae.SAEMetadata(hook_name="blocks.1.hook_attn_out"),
                    **({"decoder_init_norm": 1.0} if kind == "matching_pursuit" else {}),
                    **extra,
                    **(
                        {"rescale_acts_by_decoder_norm": False} if "topk" in kind and not rescale else rescale
                    ),
                )
            )
            for i, (name, p) in enumerate(sorted(sae.named_parameters())):
                if kind != "matching_pursuit" or name != "W_dec":
                    p.data = draw(*p.shape, seed=i) * (0.1 if name == "log_threshold" else 1)
            if "batchtopk" in kind:
                sae.topk_threshold = torch.tensor(0.2, dtype=torch.float64)
            sae.save_inference_model(folder := tmp_path / f"{kind}{len(rescale)}")
            saved, live = sae_lens.SAE.load_from_disk(folder), from_saelens(sae)
            x = draw(50, D, seed=20) * 3
            with torch.no_grad():
                assert (live.module, live.reads) == ("a1", "output")
                for d in (live, load_dictionary(folder)):
                    assert (
                        torch.allclose(reconstruct(d, x), saved(x), atol=1e-5)
                        and (saved.encode(x) != 0).any()
                    )
                    if not rescale:
                        assert torch.allclose(d.encode(x), saved.encode(x), atol=1e-5)


OLD = {
    "architecture": "standard",
    "d_in": D,
    "d_sae": K,
    "hook_name": "blocks.0.hook_mlp_out",
    "hook_layer": 0,
    "hook_head_index": None,
    "model_name": "tiny",
    "activation_fn_str": "relu",
    "dtype": "float32",
    "normalize_activations": "none",
    "apply_b_dec_to_input": True,
    "finetuning_scaling_factor": False,
}


@pytest.mark.parametrize(
    "change",
    [{}, {"apply_b_dec_to_input": False}, {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}}],
)
def test_files_of_saelens_before_6(tmp_path, change):
    import sae_lens

    state = {
        "W_enc": draw(D, K, seed=1),
        "b_enc": draw(K, seed=2),
        "W_dec": draw(K, D, seed=3),
        "b_dec": draw(D, seed=4),
    }
    (tmp_path / "cfg.json").write_text(json.dumps(OLD | change))
    save_file(state, tmp_path / "sae_weights.safetensors")
    theirs, ours, x = (
        sae_lens.SAE.load_from_disk(tmp_path),
        load_dictionary(tmp_path),
        draw(40, D, seed=5) * 3,
    )
    with torch.no_grad():
        assert torch.allclose(ours.encode(x), theirs.encode(x), atol=1e-6) and torch.allclose(
            reconstruct(ours, x), theirs(x), atol=1e-6
        )
    assert (ours.module, ours.reads) == ("m0", "output")


def release(tmp_path, monkeypatch, model):
    """A release of two dictionaries as SAELens would fetch it, from local files."""
    import sae_lens
    from sae_lens.loading import pretrained_sae_loaders, pretrained_saes_directory

    for layer in range(2):
        cfg = OLD | {"d_in": model.d_model, "hook_name": f"blocks.{layer}.hook_mlp_out"}
        (folder := tmp_path / "hub" / f"layer_{layer}").mkdir(parents=True)
        (folder / "cfg.json").write_text(json.dumps(cfg))
        save_file(
            {
                "W_enc": draw(model.d_model, K, seed=layer),
                "b_enc": draw(K),
                "W_dec": draw(K, model.d_model),
                "b_dec": draw(model.d_model),
            },
            folder / "sae_weights.safetensors",
        )
        save_file({"sparsity": torch.zeros(K)}, folder / "sparsity.safetensors")
    entry = pretrained_saes_directory.PretrainedSAELookup(
        "tiny-release",
        "nobody/tiny",
        "tiny",
        None,
        {f"id {i}": f"layer_{i}" for i in range(2)},
        {},
        {},
        {},
        {},
        None,
    )

    def known():
        return {"tiny-release": entry}

    for place in (pretrained_saes_directory, sae_lens.saes.sae, sae_lens.loading.pretrained_sae_loaders):
        if hasattr(place, "get_pretrained_saes_directory"):
            monkeypatch.setattr(place, "get_pretrained_saes_directory", known)
    monkeypatch.setattr(
        pretrained_sae_loaders, "hf_hub_download", lambda filename, **_: str(tmp_path / "hub" / filename)
    )


def test_a_release_is_fetched_by_saelens(tmp_path, monkeypatch):
    import sae_lens

    release(tmp_path, monkeypatch, TINY)
    found = load_dictionaries("tiny-release", TINY)
    assert (
        list(found) == ["m0", "m1"]
        and found["m1"].W_enc.dtype == TINY.dtype
        and torch.allclose(found["m1"].W_enc, draw(TINY.d_model, K, seed=1).double())
    )
    assert list(load_dictionaries("tiny-release", TINY, places={"id 1": None})) == ["m1"]
    assert list(load_dictionaries("tiny-release", TINY, places={"id 1": ("a0", "output")})) == ["a0"]
    fetched, fetch = [], sae_lens.SAE.from_pretrained

    def count(release, sae_id):
        fetched.append(sae_id)
        return fetch(release, sae_id)

    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", count)
    assert list(load_dictionaries("tiny-release", TINY, modules=["m1"])) == ["m1"] and fetched == ["id 1"]
    with pytest.raises(ValueError, match="a folder or a release that SAELens knows, got 'nothing'"):
        load_dictionaries("nothing", TINY)


def test_files_are_read_without_saelens(tmp_path, monkeypatch):
    for layer in range(2):
        save_dictionary(replace(KINDS["topk"], module=f"m{layer}"), tmp_path / f"d{layer}")
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    assert isinstance(load_dictionary(tmp_path / "d1"), LinearDictionary)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'transformer-circuitgraph\[sae\]'"):
        load_dictionaries("gpt2-small-res-jb", TINY)


@pytest.mark.parametrize(
    "hook, head, transcodes, place",
    [
        ("blocks.3.hook_resid_pre", None, False, ("b2", "stream")),
        ("blocks.3.hook_resid_post", None, False, ("b3", "stream")),
        ("blocks.3.hook_resid_mid", None, False, ("a3", "stream")),
        ("blocks.3.hook_resid_mid", None, True, ("m3", "input")),
        ("blocks.3.attn.hook_result", 2, False, ("a3.h2", "output")),
        ("blocks.3.attn.hook_z", None, False, ("a3", "z")),
        ("blocks.3.ln2.hook_normalized", None, True, ("m3", "scaled")),
        ("blocks.12.mlp.hook_in", None, True, ("m12", "normed")),
    ],
)
def test_hooks_name_places(hook, head, transcodes, place):
    assert hook_place(hook, head, transcodes) == place


def test_mixed_values_are_followed_to_the_stream():
    tokens = random_tokens(TINY)
    width = TINY.n_heads * TINY.d_head
    d = LinearDictionary(
        "a1", "z", draw(width, K), draw(K, width, seed=1), draw(K), draw(width, seed=2), Gate("topk", k=4)
    )
    moved = fit_dictionary(TINY, d)
    z = read_places(TINY, tokens, [("a1", "z")])["a1", "z"]
    by_hand = reconstruct(d, z.float()).double().unflatten(-1, (TINY.n_heads, TINY.d_head))
    assert torch.allclose(
        reconstruct(moved, z), torch.einsum("bphe, dhe -> bpd", by_hand, TINY.layers[1].attn.W_O), atol=1e-5
    )
    assert fit_dictionary(TINY, moved).W_dec.shape == (K, TINY.d_model)
    with pytest.raises(ValueError, match="has a norm after attention"):
        move_to_stream(tiny_model("gemma2"), d)


# Files of circuit-tracer and dictionary_learning, written by hand.


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("jump", [True, False])
def test_transcoders_of_circuit_tracer(tmp_path, transposed, jump):
    n = TINY.d_model
    for layer in range(2):
        W_enc, W_dec = draw(n, K, seed=layer), draw(K, n, seed=layer + 5)
        state = {
            "W_enc": W_enc.T.contiguous(),
            "W_dec": W_dec.T.contiguous() if transposed else W_dec,
            "b_enc": draw(K),
            "b_dec": draw(n),
            "W_skip": draw(n, n, seed=8),
        } | ({"activation_function.threshold": draw(K, seed=9).abs()} if jump else {})
        save_file(state, tmp_path / f"layer_{layer}.safetensors")
    with pytest.raises(ValueError, match="no config.yaml that says what its transcoders read"):
        load_dictionaries(tmp_path, TINY)
    assert load_dictionaries(tmp_path, TINY, reads="scaled")["m0"].reads == "scaled"
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump(
            {"model_name": "tiny", "feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}
        )
    )
    d, x = load_dictionaries(tmp_path, TINY)["m1"], draw(20, n, seed=3).double() * 4
    pre = x @ W_enc.double() + state["b_enc"]
    acts = pre.relu() * (pre > state["activation_function.threshold"]) if jump else pre.relu()
    assert (
        d.reads == "normed"
        and torch.allclose(d.encode(x), acts)
        and torch.allclose(
            reconstruct(d, x), acts @ W_dec.double() + state["b_dec"] + x @ state["W_skip"].double().T
        )
    )


def checkpoint(folder, kind, state, **trainer):
    folder.mkdir(parents=True)
    torch.save(state, folder / "ae.pt")
    (folder / "config.json").write_text(
        json.dumps(
            {
                "trainer": {"dict_class": kind, "layer": 1, "submodule_name": "resid_post_layer_1", "k": 5}
                | trainer
            }
        )
    )


def expected(kind, s, x):
    """What `dictionary_learning` computes for each class, written from its definition."""
    norm = s["decoder.weight"].norm(dim=0) if "decoder.weight" in s else None
    if kind == "AutoEncoder":  # its loader makes directions unit vectors
        acts = F.relu(F.linear(x - s["bias"], s["encoder.weight"], s["encoder.bias"])) * norm
        return acts, F.linear(acts / norm, s["decoder.weight"]) + s["bias"]
    if kind == "AutoEncoderNew":
        acts = F.relu(F.linear(x, s["encoder.weight"], s["encoder.bias"]))
        return acts, F.linear(acts, s["decoder.weight"], s["decoder.bias"])
    if kind == "GatedAutoEncoder":
        pre = F.linear(x - s["decoder_bias"], s["encoder.weight"])
        acts = (pre + s["gate_bias"] > 0) * F.relu(pre * s["r_mag"].exp() + s["mag_bias"])
        return acts, F.linear(acts, s["decoder.weight"]) + s["decoder_bias"]
    if kind == "JumpReluAutoEncoder":
        pre = x @ s["W_enc"] + s["b_enc"]
        acts = F.relu(pre * (pre > s["threshold"]))
        return acts, acts @ s["W_dec"] + s["b_dec"]
    pre = (
        F.relu((x - s["b_dec"]) @ s["W_enc"] + s["b_enc"])
        if "W_enc" in s
        else F.relu(F.linear(x - s["b_dec"], s["encoder.weight"], s["encoder.bias"]))
    )
    if kind == "AutoEncoderTopK":
        top = pre.topk(int(s["k"]))
        acts = torch.zeros_like(pre).scatter(-1, top.indices, top.values)
    else:
        acts = pre * (pre > s["threshold"])
    return acts, (acts @ s["W_dec"] if "W_dec" in s else F.linear(acts, s["decoder.weight"])) + s["b_dec"]


@pytest.mark.parametrize(
    "kind",
    [
        "AutoEncoder",
        "AutoEncoderNew",
        "GatedAutoEncoder",
        "AutoEncoderTopK",
        "BatchTopKSAE",
        "MatryoshkaBatchTopKSAE",
        "JumpReluAutoEncoder",
    ],
)
def test_checkpoints_of_dictionary_learning(tmp_path, kind):
    n = TINY.d_model
    module = nn.ModuleDict(
        {
            "encoder": nn.Linear(n, K, bias=kind != "GatedAutoEncoder"),
            "decoder": nn.Linear(K, n, bias=kind == "AutoEncoderNew"),
        }
    )
    for i, p in enumerate(module.parameters()):
        p.data = draw(*p.shape, seed=i)
    state = (
        {"W_enc": draw(n, K), "W_dec": draw(K, n, seed=1), "b_enc": draw(K)}
        if kind in ("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder")
        else dict(module.state_dict())
    )
    state |= {
        "AutoEncoder": {"bias": draw(n)},
        "GatedAutoEncoder": {
            "decoder_bias": draw(n),
            "r_mag": draw(K),
            "gate_bias": draw(K, seed=1),
            "mag_bias": draw(K, seed=2),
        },
        "AutoEncoderNew": {},
        "JumpReluAutoEncoder": {"b_dec": draw(n), "threshold": draw(K).abs()},
    }.get(kind, {"b_dec": draw(n), "k": torch.tensor(5, dtype=torch.int), "threshold": torch.tensor(0.1)})
    checkpoint(tmp_path / "run" / "trainer_0", kind, state)
    d, x = load_dictionaries(tmp_path, TINY)["b1"], draw(30, n, seed=3).double() * 3
    acts, recon = expected(kind, {k: v.double() if v.is_floating_point() else v for k, v in state.items()}, x)
    assert (
        d.reads == "stream"
        and torch.allclose(d.encode(x), acts, atol=1e-6)
        and torch.allclose(d.decode(acts), recon, atol=1e-6)
        and (acts != 0).any()
    )


def test_checkpoints_that_do_not_say_where_they_belong(tmp_path):
    n = TINY.d_model
    checkpoint(
        tmp_path / "x",
        "AutoEncoderNew",
        nn.ModuleDict({"encoder": nn.Linear(n, K), "decoder": nn.Linear(K, n)}).state_dict(),
        submodule_name="somewhere",
    )
    with pytest.raises(ValueError, match="does not say which module .* name it in places"):
        load_dictionaries(tmp_path, TINY)
    assert list(load_dictionaries(tmp_path, TINY, places={"x": ("a0", "output")})) == ["a0"]
    (tmp_path / "x" / "ae.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="ae.pt can't be read"):
        load_dictionaries(tmp_path, TINY, places={"x": ("a0", "output")})


# Places and splices on every architecture.


@pytest.mark.parametrize("name", TINY_MODELS)
def test_places_are_what_the_modules_read_and_write(name):
    model = tiny_model(name)
    tokens, mlps = random_tokens(model), [i for i, layer in enumerate(model.layers) if layer.mlp is not None]
    places = (
        [(f"a{i}", p) for i in range(model.n_layers) for p in ("output", "stream", "input", "z")]
        + [(f"m{i}", p) for i in mlps for p in ("output", "input", "normed")]
        + [(f"b{i}", p) for i in range(model.n_layers) for p in ("output", "stream", "input")]
        + [("a1.h1", "output")]
    )
    with torch.no_grad():
        found, trace, heads = (
            read_places(model, tokens, places),
            trace_modules(model, tokens, "layer"),
            writes_by_hand(model, "head", tokens),
        )
    for i, layer in enumerate(model.layers):
        b_O, b_out = (
            torch.zeros(model.d_model) if b is None else b
            for b in (layer.attn.b_O, layer.mlp and layer.mlp.b_out)
        )
        wrote = sum(heads[f"a{i}.h{h}"] for h in range(model.n_heads)) + b_O
        assert torch.allclose(found[f"a{i}", "output"], wrote, atol=1e-8) and torch.allclose(
            found[f"a{i}", "input"], trace.reads[f"a{i}"], atol=1e-8
        )
        after = trace.reads[f"a{i + 1}" if i + 1 < model.n_layers else "logits"]
        assert torch.allclose(found[f"b{i}", "stream"], after, atol=1e-8) and torch.allclose(
            found[f"b{i}", "output"], after - trace.reads[f"a{i}"], atol=1e-8
        )
        if i in mlps:
            assert torch.allclose(
                found[f"m{i}", "output"], heads[f"m{i}"] + b_out, atol=1e-8
            ) and torch.allclose(found[f"m{i}", "input"], trace.reads[f"m{i}"], atol=1e-8)
    assert torch.allclose(found["a1.h1", "output"], heads["a1.h1"], atol=1e-8)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_errors_kept_are_the_model_and_dropped_are_not(name):
    model = tiny_model(name)
    tokens, n = random_tokens(model), model.d_model

    def make(module, reads="output"):
        matrices = (draw(n, K), draw(K, n, seed=1), draw(K), draw(n, seed=2))
        return fit_dictionary(model, LinearDictionary(module, reads, *matrices, Gate("topk", k=4)))

    mlp = [make(f"m{i}", "normed") for i, layer in enumerate(model.layers) if layer.mlp is not None]
    cuts = [
        [make(f"a{i}") for i in range(model.n_layers)] + mlp,
        [make(f"a1.h{h}") for h in range(model.n_heads)],
        [make(f"b{i}", "stream") for i in range(model.n_layers)],
        [make("a0", "stream")],
    ]
    with torch.no_grad():
        own = run_spliced(model, tokens, {})
        assert torch.allclose(own, model(tokens).to(own), atol=1e-5)
        for cut in cuts:
            dictionaries = {d.module: d for d in cut}
            assert torch.allclose(run_spliced(model, tokens, dictionaries, error=True), own, atol=1e-9)
            assert (run_spliced(model, tokens, dictionaries) - own).abs().max() > 1e-3
        assert torch.allclose(
            run_spliced(
                model, tokens, {f"a{i}": identity_dictionary(model, f"a{i}") for i in range(model.n_layers)}
            ),
            own,
            atol=1e-9,
        )


def test_a_splice_is_the_module_run_on_the_reconstruction():
    tokens, d = (
        random_tokens(TINY),
        fit_dictionary(
            TINY,
            replace(
                linear(Gate("topk", k=4)),
                W_enc=draw(TINY.d_model, K),
                W_dec=draw(K, TINY.d_model),
                b_dec=draw(TINY.d_model),
                module="m1",
            ),
        ),
    )
    with torch.no_grad():
        trace = trace_modules(TINY, tokens, "layer")
        places = read_places(TINY, tokens, [("m1", "output"), ("b1", "stream")])
        last = places["b1", "stream"] - places["m1", "output"] + reconstruct(d, places["m1", "output"])
        assert TINY.n_layers == 2 and trace.reads["logits"].shape == last.shape
        assert torch.allclose(run_spliced(TINY, tokens, {"m1": d}), run_logits(TINY, last), atol=1e-9)


def test_every_part_of_a_pursuit_is_saelens():
    import sae_lens

    for options in (
        {},
        {"max_iterations": 3},
        {"stop_on_duplicate_support": False, "max_iterations": 20},
        {"residual_threshold": 0.9},
    ):
        sae = sae_lens.registry.get_sae_class("matching_pursuit")[0](
            sae_lens.registry.get_sae_class("matching_pursuit")[1](d_in=D, d_sae=K, **options)
        )
        sae.W_dec.data, sae.b_dec.data = F.normalize(draw(K, D), dim=1), draw(D)
        d, x = from_saelens(sae, "m0", "output"), (draw(4, 9, D, seed=3) * 2).requires_grad_()
        assert torch.allclose(d.encode(x), sae.encode(x), atol=1e-6)
        ours, theirs = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (d.encode, sae.encode))
        assert torch.allclose(ours, theirs, atol=1e-4)


# Refusals.


def test_what_does_not_fit_is_refused(tmp_path):
    n = TINY.d_model
    good = LinearDictionary("m1", "output", draw(n, K), draw(K, n), draw(K), draw(n), Gate("topk", k=4))
    for words, make in {
        "kind of a gate must be one of": lambda: Gate("softplus"),
        "gate 'topk' takes k, got nothing": lambda: Gate("topk"),
        "gate 'relu' takes nothing else, got k": lambda: Gate(k=3),
        "k must be at least 1, got 0": lambda: Gate("topk", k=0),
        "k must be at most d_dict, 80, got 81": lambda: replace(good, gate=Gate("topk", k=81)),
        r"b_enc must have the shape \(80,\)": lambda: replace(good, b_enc=draw(n)),
        "W_dec must hold finite numbers, but 1 are not": lambda: replace(
            good, W_dec=good.W_dec.index_put((torch.tensor([0]), torch.tensor([0])), torch.tensor(torch.nan))
        ),
        r"module must be named like 'a3', 'a3.h5'": lambda: fit_dictionary(
            TINY, replace(good, module="mlp.3")
        ),
        "so there is no 'm9'": lambda: fit_dictionary(TINY, replace(good, module="m9")),
        "reads of 'm1' must be one of output, .* got 'z'": lambda: fit_dictionary(
            TINY, replace(good, reads="z")
        ),
        "reads of 'a1.h0' must be one of output, got 'input'": lambda: fit_dictionary(
            TINY, replace(good, module="a1.h0", reads="input")
        ),
        f"must read {n} numbers .* got one that reads {n + 1}": lambda: fit_dictionary(
            TINY, replace(good, W_enc=draw(n + 1, K))
        ),
        f"must write {n} numbers .* got {n - 1}": lambda: fit_dictionary(
            TINY, replace(good, W_dec=draw(K, n - 1), b_dec=draw(n - 1))
        ),
        "'a1.h0' is within 'a1'": lambda: run_spliced(
            TINY,
            random_tokens(TINY),
            {"a1": replace(good, module="a1"), "a1.h0": replace(good, module="a1.h0")},
        ),
        "'m1' is within 'b1'": lambda: run_spliced(
            TINY, random_tokens(TINY), {"b1": replace(good, module="b1"), "m1": good}
        ),
        "'m1' stands under 'm0'": lambda: run_spliced(TINY, random_tokens(TINY), {"m0": good}),
        "neurons are those of an MLP": lambda: neuron_basis(TINY, "a1"),
        "decode of .* must be acts @ W_dec": lambda: find_structure(
            replace(KINDS["functions, linear decoder"], W_dec=draw(K, D))
        ),
        "must give 80 numbers a position": lambda: fit_dictionary(
            TINY, FunctionDictionary("m1", "output", 80, lambda x: x, lambda a: a)
        ),
        r"d_dict must lie in \[1, 32\]": lambda: principal_components(draw(50, D), 33, "m1"),
        "NaN or infinite": lambda: principal_components(torch.full((50, D), torch.nan), 3, "m1"),
        "d_in must be given": lambda: save_dictionary(KINDS["functions"], tmp_path / "f"),
        "give other numbers once they are traced": lambda: save_dictionary(
            FunctionDictionary("m1", "output", K, wave, lambda a: a @ draw(K, D)), tmp_path / "f", D
        ),
        "can't be traced by torch.export": lambda: save_dictionary(
            FunctionDictionary("m1", "output", K, lambda x: x if float(x.sum()) > 0 else -x, bend),
            tmp_path / "f",
            D,
        ),
    }.items():
        with pytest.raises(ValueError, match=words):
            make()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="the model is attention-only"):
        neuron_basis(replace(TINY, layers=tuple(replace(layer, mlp=None) for layer in TINY.layers)), "m0")


def test_sources_that_do_not_fit_are_refused(tmp_path):
    n = TINY.d_model
    good = LinearDictionary("m1", "output", draw(n, K), draw(K, n), draw(K), draw(n), Gate("topk", k=4))
    save_dictionary(good, tmp_path / "s" / "one", weights_hash=TINY.weights_hash)
    with pytest.raises(ValueError, match="has no dictionary for a0, m0; it has m1"):
        load_dictionaries(tmp_path / "s", TINY, modules=["m0", "m1", "a0"])
    with pytest.raises(ValueError, match="so there is no 'm7'"):
        load_dictionaries(tmp_path / "s", TINY, modules=["m7"])
    with pytest.raises(ValueError, match="is a dictionary of another model"):
        load_dictionaries(tmp_path / "s", replace(TINY, weights_hash="0" * 64))
    save_dictionary(good, tmp_path / "s" / "two")
    with pytest.raises(ValueError, match="one and two are both of 'm1'"):
        load_dictionaries(tmp_path / "s", TINY)
    shutil.rmtree(tmp_path / "s" / "two")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no dictionaries"):
        load_dictionaries(tmp_path / "empty", TINY)
    with pytest.raises(ValueError, match="holds no cfg.json"):
        load_dictionary(tmp_path / "empty")


def test_damaged_files_are_refused(tmp_path):
    n = TINY.d_model
    good = LinearDictionary("m1", "output", draw(n, K), draw(K, n), draw(K), draw(n), Gate("topk", k=4))
    save_dictionary(good, tmp_path / "s" / "one", weights_hash=TINY.weights_hash)
    weights = tmp_path / "s" / "one" / "sae_weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="sae_weights.safetensors can't be read"):
        load_dictionaries(tmp_path / "s", TINY)
    save_file({"W_enc": good.W_enc, "b_dec": good.b_dec}, weights)
    with pytest.raises(ValueError, match="lacks 'W_dec'"):
        load_dictionaries(tmp_path / "s", TINY)
    weights.unlink()
    with pytest.raises(ValueError, match="can't be read"):
        load_dictionaries(tmp_path / "s", TINY)
    cfg = tmp_path / "s" / "one" / "cfg.json"
    settings = json.loads(cfg.read_text())
    weights.write_bytes(whole)
    for change, words in [
        ({"architecture": "temporal"}, "encodes a position from others"),
        ({"architecture": "crosscoder"}, "architecture must be one of standard"),
        ({"normalize_activations": "layer_norm"}, "no pair of encode and decode"),
        (
            {"architecture": "standard", "metadata": {"hook_name": "blocks.0.hook_resid_pre"}},
            "is the embedding",
        ),
        ({"metadata": {"hook_name": "decoder.3"}}, "no place that is known"),
    ]:
        cfg.write_text(json.dumps(settings | change))
        with pytest.raises(ValueError, match=words):
            load_dictionaries(tmp_path / "s", TINY)
    cfg.write_text("{")
    with pytest.raises(ValueError, match="cfg.json can't be read"):
        load_dictionaries(tmp_path / "s", TINY)


def test_tensors_keep_their_values_when_a_dictionary_moves():
    moved = fit_dictionary(
        TINY,
        replace(
            linear(GATED), W_enc=draw(TINY.d_model, K), W_dec=draw(K, TINY.d_model), b_dec=draw(TINY.d_model)
        ),
    )
    tensors = [
        getattr(part, f.name)
        for part in (moved, moved.gate)
        for f in fields(part)
        if isinstance(getattr(part, f.name), Tensor)
    ]
    assert len(tensors) == 7 and all(t.dtype == TINY.dtype for t in tensors)


def test_an_encoder_needs_what_it_reads():
    norm, x = TINY.layers[0].ln1, draw(3, TINY.d_model).double()
    assert encoder_input(norm, "stream", x, 2 * x).equal(3 * x) and encoder_input(norm, "z", z=x) is x
    frozen = encoder_input(norm, "scaled", x, scale=torch.ones(3, 1))
    assert torch.equal(frozen, x)  # an RMS norm at the scale 1
    for reads, given in {"output": {"x": x}, "stream": {"x": x}, "normed": {"z": x}, "z": {}}.items():
        with pytest.raises(ValueError, match=f"an encoder that reads '{reads}' needs more"):
            encoder_input(norm, reads, **given)


# Views.


def test_top_text_is_shaded_by_activation():
    model = load_model("smollm2-135m")
    words = model.tokenizer.encode("if a < b: print(a) else: print(b)")
    ids = torch.tensor([words, words[::-1]])
    acts = read_features(model, neuron_basis(model, "m3"), ids, run=Run(progress=False))
    shown, best = show_top(model, ids, acts, 7, n=5).data, top_activations(acts, ids, [7], 1).iloc[0]
    assert shown.count("<tr>") == shown.count("outline") == 5 and f"{best.activation:.2f}" in shown
    token = model.tokenizer.decode([int(best.token)]).replace("<", "&lt;")
    assert f'rgba(204, 121, 167, 0.85)">{token}</span>' in shown  # the largest has the deepest shade
    assert "&lt;" in shown and "< b" not in shown  # text is escaped


def test_views_refuse():
    ids = random_tokens(TINY, 4, 8)
    acts = read_features(TINY, neuron_basis(TINY, "m1"), ids, run=Run(progress=False))
    last = acts.shape[1] - 1
    for words, view in {
        "acts must have a row for each of the 32": lambda: top_activations(acts[:5], ids),
        rf"features must lie in \[0, {last}\], got {last + 1}": lambda: show_top(TINY, ids, acts, last + 1),
        "n must be at least 1": lambda: top_activations(acts, ids, n=0),
        "got -1": lambda: plot_activations(acts, [-1]),
    }.items():
        with pytest.raises(ValueError, match=words):
            view()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_affine_pair_of_functions_is_found_to_be_affine(dtype):
    """By trying; and its graph is then that of the dictionary with these matrices."""
    model = tiny_model("llama", dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    W_enc, W_dec, b_enc, b_dec = (
        torch.randn(*shape, generator=generator, dtype=dtype) / 4 for shape in ((16, 9), (9, 16), (9,), (16,))
    )
    linear = LinearDictionary("m1", "output", W_enc, W_dec, b_enc, b_dec, Gate("none"))
    pair = FunctionDictionary("m1", "output", 9, linear.encode, linear.decode)
    found = find_structure(pair)
    assert found.gate.kind == "none" and found.W_enc.dtype == dtype
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert torch.allclose(getattr(found, name), getattr(linear, name), atol=1e-5)
    tokens = torch.randint(50, (2, 8), generator=generator)
    graphs = [build_graph(model, tokens, {"m1": one}, run=Run(progress=False)) for one in (pair, linear)]
    weights = [graph.edges["weight"].to_numpy() for graph in graphs]
    assert np.allclose(*weights, atol=1e-5)


@pytest.mark.parametrize(
    ("encode", "decode"),
    [
        (torch.relu, torch.asinh),
        (lambda x: x.clamp(-9, 9), lambda acts: acts.clamp(-9, 9)),
        (lambda x: x.abs(), lambda acts: acts.abs()),
        (lambda x: x * x.norm(dim=-1, keepdim=True), lambda acts: acts * acts.sum(-1, keepdim=True)),
    ],
    ids=["relu", "clamped", "absolute", "squared"],
)
def test_functions_that_bend_are_not_taken_for_affine(encode, decode):
    found = find_structure(FunctionDictionary("m1", "output", 16, encode, decode))
    assert found.W_enc is None and found.W_dec is None


def test_an_encoder_that_bends_leaves_the_decoder_affine():
    found = find_structure(FunctionDictionary("m1", "output", 16, torch.relu, lambda acts: 2 * acts + 1))
    assert found.W_enc is None and found.gate is None
    assert torch.equal(found.W_dec, 2 * torch.eye(16)) and torch.equal(found.b_dec, torch.ones(16))
