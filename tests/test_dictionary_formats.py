"""Files of other libraries: every tensor, hook and setting is placed right or refused; no file runs code."""

import json
import os
import pickle
import warnings
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file

from circuitgraph.dictionary.formats import find_site, from_circuit_tracer
from circuitgraph.dictionary.formats import from_dictionary_learning, from_gemma_scope, from_saelens_state
from circuitgraph.dictionary.formats import from_sparsify
from circuitgraph.dictionary.measure import check_dictionary
from circuitgraph.dictionary.places import fit_dictionary, identity_dictionary, neuron_basis
from circuitgraph.dictionary.places import principal_components
from circuitgraph.dictionary.places import read_places, run_spliced
from circuitgraph.dictionary.protocol import FunctionDictionary, Gate, LinearDictionary, PursuitDictionary
from circuitgraph.dictionary.protocol import reconstruct
from circuitgraph.dictionary.store import load_dictionaries, load_dictionary, save_dictionary
from circuitgraph.model.loading import tiny_model
from oracles import random_tokens

pytestmark = pytest.mark.filterwarnings(
    "ignore", "error:::circuitgraph"
)  # transformers and TransformerLens warn while they boot a model; what this package causes is an error
TINY = tiny_model("llama")
D, K = TINY.d_model, 24
SHAPES = {"W_enc": (D, K), "b_enc": (K,), "W_dec": (K, D), "b_dec": (D,), "threshold": (K,), "W_skip": (D, D)}
SHAPES |= {"b_gate": (K,), "r_mag": (K,), "b_mag": (K,)}
AFFINE = ("W_enc", "b_enc", "W_dec", "b_dec")
ARCHITECTURES = {  # by SAELens' classes
    "standard": AFFINE,
    "topk": AFFINE,
    "abstopk": AFFINE,
    "jumprelu": (*AFFINE, "threshold"),
    "gated": ("W_enc", "b_gate", "r_mag", "b_mag", "W_dec", "b_dec"),
    "transcoder": AFFINE,
    "skip_transcoder": (*AFFINE, "W_skip"),
    "jumprelu_transcoder": (*AFFINE, "threshold"),
    "jumprelu_skip_transcoder": (*AFFINE, "threshold", "W_skip"),
    "matching_pursuit": ("W_dec", "b_dec"),
}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / shape[0] ** 0.5


def tensors(names):
    state = {name: draw(*SHAPES[name], seed=i) for i, name in enumerate(names)}
    return state | ({"threshold": state["threshold"].abs()} if "threshold" in state else {})


def config(architecture, hook=None, **options):
    hook = hook or ("blocks.1.mlp.hook_in" if "transcoder" in architecture else "blocks.1.hook_mlp_out")
    meta = {"hook_name": hook} | options.pop("metadata", {})
    pursuit = {"residual_threshold": 0.1, "max_iterations": 5, "stop_on_duplicate_support": True}
    return {"architecture": architecture, "k": 3, "metadata": meta, **pursuit, **options}


# SAELens.


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tensor_of_an_architecture_is_needed(architecture):
    names = ARCHITECTURES[architecture]
    cfg, state = config(architecture), tensors(names)
    assert from_saelens_state(cfg, state).module == "m1"
    for name in names:
        with pytest.raises(ValueError, match=f"kind '{architecture}' lacks '{name}'"):
            from_saelens_state(cfg, {other: t for other, t in state.items() if other != name})
    with pytest.raises(ValueError, match="has no tensor 'bandwidth'"):
        from_saelens_state(cfg, state | {"bandwidth": draw(K)})


def test_a_threshold_in_training_is_one_for_each_feature():
    x = draw(20, D, seed=9) * 4
    state = tensors(AFFINE)
    pre = (x - state["b_dec"]) @ state["W_enc"] + state["b_enc"]
    for architecture, extra, threshold in [
        ("batchtopk", {"topk_threshold": torch.tensor(0.3)}, 0.3),
        ("matryoshka_batchtopk", {"topk_threshold": torch.tensor(0.3)}, 0.3),
        ("jumprelu", {"log_threshold": torch.full((K,), 0.3).log()}, 0.3),
        ("jumprelu", {"threshold": torch.full((K,), 0.3), "scaling_factor": torch.ones(D)}, 0.3),
    ]:
        acts = from_saelens_state(config(architecture), state | extra).encode(x)
        assert torch.allclose(acts, pre.relu() * (pre > threshold)) and (acts != 0).any()
    with pytest.raises(ValueError, match="lacks 'threshold'"):
        from_saelens_state(config("batchtopk"), state)
    with pytest.raises(ValueError, match="has no tensor 'scaling_factor'"):
        from_saelens_state(config("standard"), state | {"scaling_factor": torch.full((D,), 2.0)})
    with pytest.raises(ValueError, match="lacks 'k' in its config"):
        from_saelens_state(config("topk") | {"k": None}, state)


@pytest.mark.parametrize(
    "hooks, site",
    [
        (("blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out"), ("m3", "normed", {})),
        (("blocks.3.mlp.hook_in", "blocks.3.mlp.hook_out"), ("m3", "normed", {"before_post_norm": True})),
        (("blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out"), ("m3", "scaled", {})),
        (("blocks.3.hook_resid_mid", None), ("m3", "input", {})),
        (("blocks.3.hook_resid_pre", "blocks.3.hook_attn_out"), ("a3", "input", {})),
        (
            ("blocks.3.ln1.hook_normalized", "blocks.3.attn.hook_out"),
            ("a3", "scaled", {"before_post_norm": True}),
        ),
    ],
)
def test_transcoders_are_placed_by_both_hooks(hooks, site):
    assert tuple(find_site(*hooks, transcodes=True)) == site
    meta = {"hook_name_out": hooks[1]}
    d = from_saelens_state(config("transcoder", hooks[0], metadata=meta), tensors(AFFINE))
    assert (d.module, d.reads) == site[:2]
    assert d.meta.get("before_post_norm", False) == site[2].get("before_post_norm", False)
    old = {"hook_name": hooks[0], "hook_name_out": hooks[1], "activation_fn_str": "relu"}  # before SAELens 6
    d = from_saelens_state({"architecture": "transcoder", **old}, tensors(AFFINE))
    assert (d.module, d.reads) == site[:2]


@pytest.mark.parametrize(
    "architecture, hook, meta, words",
    [
        (
            "transcoder",
            "blocks.3.mlp.hook_in",
            {"hook_name_out": "blocks.4.hook_mlp_out"},
            "must write blocks.3.hook",
        ),
        (
            "transcoder",
            "blocks.3.mlp.hook_in",
            {"hook_name_out": "blocks.3.hook_resid_post"},
            "must write blocks.3.h",
        ),
        (
            "transcoder",
            "blocks.3.mlp.hook_in",
            {"hook_name_out": "blocks.3.hook_attn_out"},
            "must write blocks.3.h",
        ),
        (
            "transcoder",
            "blocks.3.hook_resid_pre",
            {"hook_name_out": "blocks.3.hook_mlp_out"},
            "must write blocks.3.",
        ),
        ("transcoder", "blocks.3.hook_resid_post", {}, "a transcoder must read the input"),
        ("transcoder", "blocks.3.hook_mlp_out", {}, "a transcoder must read the input"),
        ("transcoder", "blocks.3.attn.hook_z", {}, "a transcoder must read the input"),
        ("standard", "blocks.3.mlp.hook_in", {}, "an autoencoder at 'blocks.3.mlp.hook_in'"),
        ("standard", "blocks.3.ln2.hook_normalized", {}, "reconstructs the input of a module"),
        ("standard", "blocks.3.hook_mlp_in", {}, "reconstructs the input of a module"),
        (
            "standard",
            "blocks.3.hook_mlp_out",
            {"hook_name_out": "blocks.4.hook_mlp_out"},
            "must write the hook that",
        ),
        ("standard", "blocks.3.hook_mlp_out", {"hook_head_index": 2}, "of the single head 2 is no place"),
        ("standard", "blocks.3.attn.hook_z", {"hook_head_index": 2}, "of the single head 2 is no place"),
        ("standard", "blocks.3.attn.hook_result", {}, "needs the number of a head"),
        ("standard", "blocks.0.hook_resid_pre", {}, "is the embedding"),
        ("standard", "hook_embed", {}, "no place that is known"),
    ],
)
def test_hooks_without_a_place_are_refused(architecture, hook, meta, words):
    cfg = config(architecture, hook, metadata=meta)
    with pytest.raises(ValueError, match=words):
        from_saelens_state(cfg, tensors(AFFINE))
    assert from_saelens_state(cfg, tensors(AFFINE), "m1", "output").module == "m1"  # the user knows better


def test_a_factor_of_the_activations_is_folded_or_refused():
    state, x = tensors(ARCHITECTURES["jumprelu"]), draw(20, D, seed=9) * 4
    cfg = config("jumprelu", normalize_activations="expected_average_only_in")
    with pytest.raises(ValueError, match=r"not yet folded in .*fold_activation_norm_scaling_factor"):
        from_saelens_state(cfg, state)
    pre = (2.5 * x - state["b_dec"]) @ state["W_enc"] + state["b_enc"]
    acts = pre.relu() * (pre > state["threshold"])
    d = from_saelens_state(cfg | {"norm_scaling_factor": 2.5}, state)
    assert torch.allclose(d.encode(x), acts, atol=1e-5) and (acts != 0).any()
    assert torch.allclose(2.5 * d.decode(acts), acts @ state["W_dec"] + state["b_dec"], atol=1e-5)
    folded = from_saelens_state(config("jumprelu", normalize_activations="none"), state)
    assert torch.equal(folded.W_enc, state["W_enc"])
    for kind in ("transcoder", "matching_pursuit"):
        changed = config(kind, normalize_activations="expected_average_only_in", norm_scaling_factor=2.0)
        with pytest.raises(ValueError, match="can't be folded"):
            from_saelens_state(changed, tensors(ARCHITECTURES[kind]))


# A dictionary on a model.


def on(model, module="m1", reads="output", **meta):
    n = model.d_model
    matrices = (draw(n, K), draw(K, n, seed=1), draw(K, seed=2), draw(n, seed=3))
    return LinearDictionary(module, reads, *matrices, b_in=draw(n, seed=4), meta=meta)


@pytest.mark.parametrize("name", ["gemma2", "olmo2", "llama"])
def test_an_output_before_a_post_norm_has_no_place(name):
    model = tiny_model(name)
    tokens = random_tokens(model)
    _, cache = model.bridge.run_with_cache(tokens)
    places = read_places(model, tokens, [("m1", "output"), ("a1", "output")])
    for module, after, before in [
        ("m1", "blocks.1.hook_mlp_out", "blocks.1.mlp.hook_out"),
        ("a1", "blocks.1.hook_attn_out", "blocks.1.attn.hook_out"),
    ]:
        ours = places[module, "output"].float()
        assert torch.allclose(ours, cache[after].float(), atol=1e-4)
        is_same = torch.allclose(ours, cache[before].float(), atol=1e-4)
        assert is_same == (name == "llama")
        cfg = config("standard")
        state = {name: getattr(on(model), name) for name in AFFINE}
        cfg["metadata"]["hook_name"] = after
        assert fit_dictionary(model, from_saelens_state(cfg, state)).module == module
        cfg["metadata"]["hook_name"] = before
        d = from_saelens_state(cfg, state)
        if is_same:
            assert fit_dictionary(model, d).module == module
        else:
            with pytest.raises(ValueError, match="before the norm that .* has after this module"):
                fit_dictionary(model, d)


def test_centred_writing_weights_are_read_from_uncentred_ones():
    """TransformerLens' own processed model gives the activations that the dictionary was trained on."""
    model = tiny_model("gpt2")
    tokens = random_tokens(model)
    bridge = tiny_model("gpt2").bridge
    bridge.enable_compatibility_mode(
        disable_warnings=True,
        fold_ln=False,
        center_writing_weights=True,
        center_unembed=False,
        fold_value_biases=False,
    )
    _, cache = bridge.run_with_cache(tokens)
    kwargs = {"model_from_pretrained_kwargs": {"center_writing_weights": True, "fold_ln": False}}
    for hook, module, reads in [
        ("blocks.0.hook_resid_post", "b0", "stream"),
        ("blocks.1.hook_mlp_out", "m1", "output"),
        ("blocks.1.hook_attn_out", "a1", "output"),
    ]:
        state = {name: getattr(on(model), name) for name in AFFINE}
        cfg = config("standard", hook, metadata=kwargs)
        trained = from_saelens_state(cfg, state)
        d = fit_dictionary(model, trained)
        theirs = cache[hook].to(model.W_U)
        ours = read_places(model, tokens, [(module, reads)])[module, reads]
        assert (theirs - ours).abs().max() > 1e-3  # the mean
        x = theirs.float() - state["b_dec"]
        acts = F.relu(x @ state["W_enc"] + state["b_enc"])
        assert torch.allclose(d.encode(ours).float(), acts, atol=1e-4) and (acts != 0).any()
        again = fit_dictionary(model, d)
        assert torch.allclose(again.encode(ours), d.encode(ours))
        plain = fit_dictionary(
            tiny_model("llama"), from_saelens_state(cfg, state)
        )  # an RMS model is not centred
        assert torch.equal(plain.W_enc.float(), state["W_enc"])
    pursuit = PursuitDictionary(
        "m1", "output", draw(K, model.d_model), draw(model.d_model), meta=trained.meta
    )
    with pytest.raises(ValueError, match="its encoder is not affine"):
        fit_dictionary(model, pursuit)


def test_the_mean_that_centring_removes_changes_no_logits():
    model = tiny_model("gpt2")
    tokens = random_tokens(model)
    d = fit_dictionary(model, on(model, "b0", "stream", model_processing=["center_writing_weights"]))
    shifted = LinearDictionary(
        *("b0", "stream", d.W_enc, d.W_dec, d.b_enc, d.b_dec + 7.0, d.gate, d.b_in, None, d.meta)
    )
    assert torch.allclose(
        run_spliced(model, tokens, {"b0": d}), run_spliced(model, tokens, {"b0": shifted}), atol=1e-6
    )


def test_folded_norms_and_changed_values():
    model = tiny_model("gpt2")
    folded = fit_dictionary(model, on(model, "m1", "normed", model_processing=["fold_ln"]))
    assert folded.reads == "scaled"
    width = model.n_heads * model.d_head
    for processing, words in [
        ("fold_value_biases", "fold_value_biases had changed"),
        ("refactor_factored_attn_matrices", "refactor_factored_attn_matrices had changed"),
    ]:
        d = LinearDictionary(
            "a1",
            "z",
            draw(width, K),
            draw(K, width),
            draw(K),
            draw(width),
            meta={"model_processing": [processing]},
        )
        with pytest.raises(ValueError, match=words):
            fit_dictionary(model, d)


# circuit-tracer.


def transcoder(folder, settings, **extra):
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        "W_enc": draw(K, D),
        "W_dec": draw(K, D, seed=1),
        "b_enc": draw(K, seed=2),
        "b_dec": draw(D, seed=3),
    }
    save_file(state | extra, folder / "layer_1.safetensors")
    if settings is not None:
        hooks = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
        (folder / "config.yaml").write_text(
            yaml.safe_dump({"model_kind": "transcoder_set"} | hooks | settings)
        )
    return folder / "layer_1.safetensors", state


def test_activations_of_circuit_tracer(tmp_path):
    x = draw(30, D, seed=5) * 4
    threshold = draw(K, seed=6).abs()
    jump = {"activation_function.threshold": threshold}

    def kept(pre, k):
        top = pre.topk(k, -1)
        return torch.zeros_like(pre).scatter(-1, top.indices, top.values)

    for settings, extra, gate in [
        ({}, {}, torch.relu),
        ({"activation": "relu", "k": None}, {}, torch.relu),
        ({"activation": "topk", "k": 2}, {}, lambda pre: kept(pre, 2)),
        ({}, {"k": torch.tensor(3)}, lambda pre: kept(pre, 3)),
        ({}, jump, lambda pre: pre * (pre > threshold)),
        ({"activation": "jumprelu"}, jump, lambda pre: pre * (pre > threshold)),
        (None, jump, lambda pre: pre * (pre > threshold)),
    ]:
        path, s = transcoder(tmp_path, settings, **extra)
        (tmp_path / "config.yaml").unlink() if settings is None else None
        d = from_circuit_tracer(path, None if settings else "normed")
        acts = gate(x @ s["W_enc"].T + s["b_enc"])
        assert torch.allclose(d.encode(x), acts, atol=1e-6) and (d.module, d.reads) == ("m1", "normed")
        assert torch.allclose(reconstruct(d, x), acts @ s["W_dec"] + s["b_dec"], atol=1e-5)


@pytest.mark.parametrize(
    "settings, extra, words",
    [
        ({"activation": "topk"}, {}, "kind 'topk' lacks 'k'"),
        ({"activation": "jumprelu"}, {}, "kind 'jumprelu' lacks 'activation_function.threshold'"),
        (
            {"activation": "relu"},
            {"activation_function.threshold": draw(K).abs()},
            "kind 'relu' has no tensor",
        ),
        ({"activation": "softplus"}, {}, "activation must be one of relu, topk, jumprelu, got 'softplus'"),
        ({}, {"activation_function.threshold": -draw(K).abs()}, "must not be negative"),
        ({}, {"log_thresholds": draw(K)}, "has no tensor 'log_thresholds'"),
        ({"feature_output_hook": "hook_resid_post"}, {}, "must write blocks.1.hook_mlp_out"),
        ({"feature_output_hook": "hook_attn_out"}, {}, "must write blocks.1.hook_mlp_out"),
        ({"feature_input_hook": "hook_mlp_out"}, {}, "a transcoder must read the input"),
        ({"model_kind": "cross_layer_transcoder"}, {}, "holds cross-layer transcoders"),
        ({"model_kind": "crosscoder"}, {}, "model_kind .* must be transcoder_set"),
        ({}, {"W_dec": draw(K, 3, D)}, "writes several layers"),
    ],
)
def test_what_circuit_tracer_does_otherwise_is_refused(tmp_path, settings, extra, words):
    path, _ = transcoder(tmp_path, settings, **extra)
    with pytest.raises(ValueError, match=words):
        from_circuit_tracer(path)
    if "feature_input_hook" not in settings:
        with pytest.raises(ValueError, match=words):
            from_circuit_tracer(path, "normed")


def test_hooks_of_circuit_tracer(tmp_path):
    path, _ = transcoder(tmp_path, {"feature_output_hook": "mlp.hook_out"})
    assert from_circuit_tracer(path).meta["before_post_norm"]
    hooks = {"feature_input_hook": "hook_resid_pre", "feature_output_hook": "hook_attn_out"}
    path, _ = transcoder(tmp_path, hooks)
    assert (from_circuit_tracer(path).module, from_circuit_tracer(path).reads) == ("a1", "input")
    save_file({"W_enc": draw(K, D)}, path)
    with pytest.raises(ValueError, match="lacks 'W_dec', 'b_dec', 'b_enc'"):
        from_circuit_tracer(path)
    (tmp_path / "config.yaml").write_text("- a\n- b")
    with pytest.raises(ValueError, match="must hold settings by name, got list"):
        from_circuit_tracer(path)
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="config.yaml can't be read"):
        from_circuit_tracer(path)
    (tmp_path / "config.yaml").unlink()
    save_file({"W_enc": draw(K, D)}, tmp_path / "W_enc_1.safetensors")
    with pytest.raises(ValueError, match="holds cross-layer transcoders"):
        from_circuit_tracer(path, "normed")


# dictionary_learning.


def checkpoint(folder, kind="AutoEncoderNew", state=None, buffer=None, **trainer):
    folder.mkdir(parents=True, exist_ok=True)
    new = {
        "encoder.weight": draw(K, D),
        "encoder.bias": draw(K),
        "decoder.weight": draw(D, K),
        "decoder.bias": draw(D),
    }
    torch.save(new if state is None else state, folder / "ae.pt")
    settings = {"dict_class": kind, "layer": 1, "submodule_name": "mlp_layer_1"} | trainer
    written = {"trainer": settings} | ({} if buffer is None else {"buffer": buffer})
    (folder / "config.json").write_text(json.dumps(written))
    return folder


@pytest.mark.parametrize(
    "submodule, layer, io, site",
    [
        ("resid_post_layer_1", 1, "out", ("b1", "stream", False)),
        ("resid_post_layer_1", 1, None, ("b1", "stream", False)),
        ("resid_post_layer_1", 1, "in", ("b0", "stream", False)),
        ("mlp_layer_1", 1, "out", ("m1", "output", True)),
        ("attn_layer_1", 1, "out", ("a1", "output", True)),
        ("mlp_layer_1", 1, "in_and_out", ("m1", "normed", True)),
        ("attention_1", 1, "in_and_out", ("a1", "normed", True)),
        ("mlp_layer_1", 1, "in", "reconstructs the input of the MLP of layer 1"),
        ("attn_layer_1", 1, "in", "reconstructs the input of attention of layer 1"),
        ("resid_post_layer_0", 0, "in", "reconstructs the input of the block of layer 0"),
        ("resid_post_layer_1", 1, "in_and_out", "maps the stream before a block"),
        ("resid_post_layer_1", 1, "inside", "has io 'inside'"),
        ("resid_mlp_1", 1, "out", "does not say which module it is of"),
    ],
)
def test_the_buffer_says_what_was_read(tmp_path, submodule, layer, io, site):
    folder = checkpoint(
        tmp_path, buffer=None if io is None else {"io": io}, submodule_name=submodule, layer=layer
    )
    if isinstance(site, str):
        with pytest.raises(ValueError, match=site):
            from_dictionary_learning(folder)
        assert from_dictionary_learning(folder, "b1", "stream").module == "b1"
    else:
        d = from_dictionary_learning(folder)
        assert (d.module, d.reads, d.meta.get("before_post_norm", False)) == site


def test_checkpoints_that_are_not_whole_are_refused(tmp_path):
    batch = {
        "encoder.weight": draw(K, D),
        "encoder.bias": draw(K),
        "decoder.weight": draw(D, K),
        "b_dec": draw(D),
    }
    for kind, state, words in [
        ("BatchTopKSAE", batch, "lacks 'threshold'"),
        ("BatchTopKSAE", batch | {"threshold": torch.tensor(-1.0)}, "it was not yet estimated"),
        ("AutoEncoderTopK", batch, "lacks 'k'"),
        ("JumpReluAutoEncoder", tensors(AFFINE), "lacks 'threshold'"),
        ("AutoEncoderNew", batch, "lacks 'decoder.bias'"),
        ("AutoEncoder", batch | {"bias": draw(D)}, "has no tensor 'b_dec'"),
        ("CrossCoder", batch, "dict_class must be one of"),
    ]:
        with pytest.raises(ValueError, match=words):
            from_dictionary_learning(checkpoint(tmp_path, kind, state))
    checkpoint(tmp_path, buffer={"layer": 1, "ctx_len": 128})
    with pytest.raises(ValueError, match="does not say its io"):
        from_dictionary_learning(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json can't be read"):
        from_dictionary_learning(tmp_path, "b1", "stream")


# sparsify and Gemma Scope.


def sparse(folder, **cfg):
    folder.mkdir(parents=True)
    state = {"encoder.weight": draw(K, D), "encoder.bias": draw(K, seed=1), "W_dec": draw(K, D, seed=2)}
    state |= {"b_dec": draw(D, seed=3)} | (
        {"W_skip": draw(D, D, seed=4)} if cfg.get("skip_connection") else {}
    )
    save_file(state, folder / "sae.safetensors")
    settings = {"d_in": D, "activation": "topk", "k": 4, "num_latents": K, "normalize_decoder": True} | cfg
    (folder / "cfg.json").write_text(json.dumps(settings))
    return state


@pytest.mark.parametrize("activation", ["topk", "groupmax", "signed"])
@pytest.mark.parametrize("transcode", [False, True])
def test_dictionaries_of_sparsify(tmp_path, activation, transcode):
    """By its definition: a transcoder does not subtract b_dec, and the skip path reads x itself."""
    folder = tmp_path / "layers.1.mlp"
    options = {"signed": True} if activation == "signed" else {"activation": activation}
    s = sparse(folder, transcode=transcode, skip_connection=transcode, **options)
    x = draw(40, D, seed=7) * 4
    pre = F.linear(x if transcode else x - s["b_dec"], s["encoder.weight"], s["encoder.bias"])
    if activation == "topk":
        top = pre.relu().topk(4, -1)
        acts = torch.zeros_like(pre).scatter(-1, top.indices, top.values)
    elif activation == "signed":
        acts = torch.zeros_like(pre)
        for row, values in zip(acts, pre, strict=True):
            for i in values.abs().argsort(descending=True)[:4]:
                row[i] = values[i]
    else:
        acts = torch.zeros_like(pre)
        for row, values in zip(acts, pre.relu(), strict=True):
            for group in range(4):
                i = group * (K // 4) + int(values[group * (K // 4) : (group + 1) * (K // 4)].argmax())
                row[i] = values[i]
    recon = acts @ s["W_dec"] + s["b_dec"] + (x @ s["W_skip"].T if transcode else 0)
    d = from_sparsify(folder)
    assert torch.allclose(d.encode(x), acts, atol=1e-6) and torch.allclose(
        reconstruct(d, x), recon, atol=1e-5
    )
    assert (d.module, d.reads) == ("m1", "normed" if transcode else "output") and d.meta["before_post_norm"]


@pytest.mark.parametrize(
    "name, transcode, site",
    [
        ("layers.1", False, ("b1", "stream")),
        ("model.layers.1.mlp", False, ("m1", "output")),
        ("h.1.attn", False, ("a1", "output")),
        ("layers.1.self_attn/seed2", False, ("a1", "output")),
        ("gpt_neox.layers.1.attention", True, ("a1", "normed")),
        ("layers.1", True, "maps the stream before a block"),
        ("embed_tokens", False, "must be named by its hookpoint"),
        ("layers.1.mlp.act_fn", False, "must be named by its hookpoint"),
    ],
)
def test_hookpoints_of_sparsify(tmp_path, name, transcode, site):
    sparse(tmp_path / name, transcode=transcode)
    if isinstance(site, str):
        with pytest.raises(ValueError, match=site):
            from_sparsify(tmp_path / name)
        assert from_sparsify(tmp_path / name, "m1", "output").module == "m1"
    else:
        d = from_sparsify(tmp_path / name)
        assert (d.module, d.reads) == site


def test_files_of_sparsify_that_are_not_whole_are_refused(tmp_path):
    for i, (cfg, words) in enumerate(
        [
            ({"activation": "relu"}, "must be topk or groupmax, got 'relu'"),
            ({"k": None}, "lacks 'k'"),
            ({"activation": "groupmax", "k": 5}, "k must divide d_dict, 24, got 5"),
        ]
    ):
        sparse(folder := tmp_path / str(i) / "layers.1", **cfg)
        with pytest.raises(ValueError, match=words):
            from_sparsify(folder)
    state = sparse(folder := tmp_path / "layers.1")
    for changed, words in [
        (state | {"W_skip": draw(D, D)}, "has no tensor 'W_skip'"),
        ({"b_dec": draw(D)}, "lacks 'W_dec', 'encoder.bias', 'encoder.weight'"),
    ]:
        save_file(changed, folder / "sae.safetensors")
        with pytest.raises(ValueError, match=words):
            from_sparsify(folder)


SCOPE = "layer_1/width_16k/average_l0_82/params.npz"


@pytest.mark.parametrize(
    "release, site",
    [
        ("gemma-scope-2b-pt-res", ("b1", "stream")),
        ("gemma-scope-9b-it-res", ("b1", "stream")),
        ("models--google--gemma-scope-2b-pt-mlp/snapshots/0f", ("m1", "output")),
        ("gemma-scope-2b-pt-att", ("a1", "z")),
        ("gemma-scope-2b-pt-transcoders", ("m1", "scaled")),
    ],
)
def test_dictionaries_of_gemma_scope(tmp_path, release, site):
    path = tmp_path / release / SCOPE
    path.parent.mkdir(parents=True)
    state = tensors(ARCHITECTURES["jumprelu"])
    np.savez(path, **{name: t.numpy() for name, t in state.items()})
    d, x = from_gemma_scope(path), draw(30, D, seed=8) * 4
    pre = x @ state["W_enc"] + state["b_enc"]
    acts = (pre > state["threshold"]) * pre.relu()
    assert (d.module, d.reads) == site and torch.allclose(d.encode(x), acts) and (acts != 0).any()
    assert torch.allclose(reconstruct(d, x), acts @ state["W_dec"] + state["b_dec"], atol=1e-6)
    assert "before_post_norm" not in d.meta


def test_files_of_gemma_scope_that_are_not_whole_are_refused(tmp_path):
    state = {name: t.numpy() for name, t in tensors(ARCHITECTURES["jumprelu"]).items()}
    for name, words in [
        (SCOPE, "must name one release of Gemma Scope"),
        ("gemma-scope-2b-pt-res/gemma-scope-2b-pt-mlp/" + SCOPE, "must name one release of Gemma Scope"),
        ("gemma-scope-2b-pt-res/width_16k/params.npz", "and one layer"),
        ("gemma-scope-2b-pt-res/embedding/width_4k/params.npz", "is of the embedding"),
    ]:
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        np.savez(path, **state)
        with pytest.raises(ValueError, match=words):
            from_gemma_scope(path)
        assert from_gemma_scope(path, "m1", "output").module == "m1"
    np.savez(path, **{name: a for name, a in state.items() if name != "threshold"})
    with pytest.raises(ValueError, match="lacks 'threshold'"):
        from_gemma_scope(path, "m1", "output")
    path.write_bytes(b"PK no archive")
    with pytest.raises(ValueError, match="can't be read as arrays"):
        from_gemma_scope(path, "m1", "output")


# Files that could run code.


def plant(folder, marker, module="m1"):
    """Functions whose encoder touches `marker` when it is opened."""
    save_dictionary(FunctionDictionary(module, "output", D, torch.sinh, torch.asinh), folder, D)
    program = folder / "encoder.pt2"
    with zipfile.ZipFile(program) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    run = f"(__import__('pathlib').Path({str(marker)!r}).touch(), "
    for name in files:
        if name.endswith("models/model.json"):
            text = files[name].decode()
            start = text.index('"expr_str": "Symbol(') + len('"expr_str": "')
            end = text.index('"', start)
            files[name] = (text[:start] + run + text[start:end] + ")[1]" + text[end:]).encode()
    with zipfile.ZipFile(program, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def test_no_program_is_opened_without_trust(tmp_path):
    marker = tmp_path / "ran"
    source = tmp_path / "source"
    plant(source / "deep" / "inside", marker)
    save_dictionary(on(TINY, "m0"), source / "plain")
    with pytest.raises(ValueError, match=r"holds programs .* run any code .* trust=True"):
        load_dictionary(source / "deep" / "inside")
    with pytest.raises(ValueError, match="holds programs"):
        load_dictionaries(source, TINY)
    assert list(load_dictionaries(source, TINY, modules=["m0"])) == ["m0"]
    assert list(load_dictionaries(source, TINY, modules=["m0"], trust=True)) == ["m0"]  # not asked for
    assert not marker.exists()
    load_dictionary(source / "deep" / "inside", trust=True)
    assert marker.exists()  # so that the file would have run


class Touch:
    """A pickle that makes a file when it is opened."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_no_pickle_is_opened(tmp_path):
    marker = tmp_path / "ran"
    checkpoint(tmp_path / "learned", state={"encoder.weight": Touch(marker)})
    scope = tmp_path / "gemma-scope-2b-pt-mlp" / SCOPE
    scope.parent.mkdir(parents=True)
    payload = np.empty(1, dtype=object)
    payload[0] = Touch(marker)
    np.savez(scope, W_enc=payload)
    with pytest.raises(ValueError, match="ae.pt can't be read"):
        from_dictionary_learning(tmp_path / "learned")
    with pytest.raises(ValueError, match="ae.pt can't be read"):
        load_dictionary(tmp_path / "learned", trust=True)
    for trust in (False, True):
        with pytest.raises(ValueError, match="can't be read as arrays"):
            load_dictionary(scope, trust=trust)
    scope.write_bytes(pickle.dumps(Touch(marker)))
    with pytest.raises(ValueError, match="can't be read as arrays"):
        load_dictionary(scope)
    assert not marker.exists()
    np.load(scope, allow_pickle=True)
    assert marker.exists()  # so that the file would have run


# Sources.


def test_tensors_that_nobody_asks_for_stay_closed(tmp_path):
    """Damaged tensors of other modules are not even seen."""
    save_dictionary(on(TINY, "m0"), tmp_path / "ours")
    save_dictionary(on(TINY, "a0"), tmp_path / "damaged")
    (tmp_path / "damaged" / "sae_weights.safetensors").write_bytes(b"nothing")
    checkpoint(tmp_path / "learned", submodule_name="resid_post_layer_1")
    (tmp_path / "learned" / "ae.pt").write_bytes(b"nothing")
    sparse(tmp_path / "layers.0.self_attn")
    (tmp_path / "layers.0.self_attn" / "sae.safetensors").write_bytes(b"nothing")
    path, _ = transcoder(tmp_path / "traced", {})
    path.write_bytes(b"nothing")
    (scope := tmp_path / "gemma-scope-2b-pt-res" / SCOPE).parent.mkdir(parents=True)
    scope.write_bytes(b"nothing")
    (tmp_path / ".cache" / "broken").mkdir(parents=True)
    (tmp_path / ".cache" / "broken" / "cfg.json").write_text("{")
    assert list(load_dictionaries(tmp_path, TINY, modules=["m0"])) == ["m0"]
    for module in ("a0", "m1"):
        with pytest.raises(ValueError, match="can't be read"):
            load_dictionaries(tmp_path, TINY, modules=[module])
    with pytest.raises(ValueError, match="can't be read"):
        load_dictionaries(tmp_path, TINY)


def test_one_source_holds_all_forms(tmp_path):
    n = TINY.n_heads * TINY.d_head
    save_dictionary(on(TINY, "m0"), tmp_path / "ours")
    checkpoint(tmp_path / "learned", submodule_name="resid_post_layer_1", buffer={"io": "in"})
    sparse(tmp_path / "layers.0.self_attn")
    (tmp_path / "layers.0.self_attn").rename(tmp_path / "layers.1.self_attn")
    transcoder(tmp_path / "traced", {})
    (scope := tmp_path / "somewhere" / "params.npz").parent.mkdir()
    state = tensors(ARCHITECTURES["jumprelu"]) | {"W_enc": draw(n, K), "W_dec": draw(K, n), "b_dec": draw(n)}
    np.savez(scope, **{name: t.numpy() for name, t in state.items()})
    with pytest.raises(ValueError, match="must name one release of Gemma Scope"):
        load_dictionaries(tmp_path, TINY)
    found = load_dictionaries(tmp_path, TINY, places={"somewhere": ("a0", "z")})
    assert {name: d.reads for name, d in found.items()} == {
        "a0": "z",
        "m0": "output",
        "b0": "stream",
        "a1": "output",
        "m1": "normed",
    }
    assert load_dictionary(scope.parent, module="a0", reads="z").module == "a0"
    assert load_dictionary(tmp_path / "traced" / "layer_1.safetensors").module == "m1"
    for wrong in (tmp_path / "traced", tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="not a dictionary"):
            load_dictionary(wrong)
    save_file({"W_enc": draw(K, D)}, tmp_path / "traced" / "W_enc_0.safetensors")
    with pytest.raises(ValueError, match="cross-layer transcoders"):
        load_dictionaries(tmp_path, TINY, places={"somewhere": ("a0", "z")})


def test_a_factor_beside_the_config_is_folded(tmp_path):
    """SAELens' checkpoints hold unfolded weights, and the factor in a file of its own."""
    state = tensors(AFFINE)
    save_file(state, tmp_path / "sae_weights.safetensors")
    cfg = config("standard", normalize_activations="expected_average_only_in")
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(ValueError, match="not yet folded in"):
        load_dictionary(tmp_path)
    (tmp_path / "activation_scaler.json").write_text(
        json.dumps({"scaling_factor": 0.5, "has_whitening": False})
    )
    x = draw(20, D, seed=9) * 4
    acts = F.relu((x / 2 - state["b_dec"]) @ state["W_enc"] + state["b_enc"])
    assert torch.allclose(load_dictionary(tmp_path).encode(x), acts, atol=1e-5)


def test_what_a_file_says_survives_saving(tmp_path):
    model = tiny_model("gemma2")
    state = {name: getattr(on(model), name) for name in AFFINE}
    d = from_saelens_state(config("standard", "blocks.1.mlp.hook_out"), state)
    save_dictionary(d, tmp_path / "d")
    written = json.loads((tmp_path / "d" / "cfg.json").read_text())
    assert written["metadata"]["hook_name"] == "blocks.1.mlp.hook_out"
    with pytest.raises(ValueError, match="before the norm"):
        load_dictionaries(tmp_path, model)
    grouped = replace(on(TINY), gate=Gate("groupmax", k=6))
    save_dictionary(grouped, tmp_path / "g")
    x = draw(9, D)
    again = load_dictionary(tmp_path / "g")
    assert again.gate.kind == "groupmax" and torch.equal(again.encode(x), grouped.encode(x))


def test_gemma_scope_2_reads_behind_the_norm():
    """SAELens calls its input hook_mlp_in, and its own config pre_feedforward_layernorm.output."""
    meta = {"hook_name_out": "blocks.1.hook_mlp_out"}
    cfg = config("jumprelu_transcoder", "blocks.1.hook_mlp_in", metadata=meta)
    state = tensors(ARCHITECTURES["jumprelu_transcoder"])
    assert from_saelens_state(cfg, state).reads == "input"
    cfg["metadata"]["hf_hook_name"] = "model.layers.1.pre_feedforward_layernorm.output"
    assert from_saelens_state(cfg, state).reads == "normed"


# A dictionary on a text.


def cross_entropy(model, tokens, hooks=()):
    logits = model.bridge.run_with_hooks(tokens, fwd_hooks=list(hooks)).double()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()


def test_the_numbers_of_a_check_by_hand():
    """Against TransformerLens with the MLP's output replaced at its own hook."""
    model = tiny_model("llama")
    tokens = random_tokens(model)
    hook = "blocks.1.hook_mlp_out"
    d = fit_dictionary(model, replace(on(model), gate=Gate("topk", k=3)))
    _, cache = model.bridge.run_with_cache(tokens)
    y = cache[hook].double()

    def put(value):
        return [(hook, lambda y, **_: torch.cat([y[:, :1], value[:, 1:].to(y)], 1))]

    pre = ((y - d.b_in) @ d.W_enc + d.b_enc).relu()
    top = pre.topk(3, -1)
    acts = torch.zeros_like(pre).scatter(-1, top.indices, top.values)
    recon = acts @ d.W_dec + d.b_dec
    inner = y[:, 1:].flatten(0, 1)
    fvu = ((y - recon)[:, 1:].square().sum() / (inner - inner.mean(0)).square().sum()).item()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = check_dictionary(model, d, tokens)
    assert found.fvu == pytest.approx(fvu, rel=1e-4)
    assert found.l0 == pytest.approx((acts[:, 1:] != 0).sum(-1).double().mean().item())
    assert found.dead == pytest.approx(1 - (acts[:, 1:] != 0).flatten(0, 1).any(0).double().mean().item())
    assert found.ce == pytest.approx(cross_entropy(model, tokens), abs=1e-5)
    assert found.ce_spliced == pytest.approx(cross_entropy(model, tokens, put(recon)), abs=1e-5)
    assert found.ce_ablated == pytest.approx(cross_entropy(model, tokens, put(torch.zeros_like(y))), abs=1e-5)
    recovered = (found.ce_ablated - found.ce_spliced) / (found.ce_ablated - found.ce)
    assert found.recovered == pytest.approx(recovered)


def test_absurd_numbers_are_said_in_words():
    model = tiny_model("llama")
    tokens = random_tokens(model)
    for d in (identity_dictionary(model, "m1"), neuron_basis(model, "m1")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = check_dictionary(model, d, tokens)
        assert found.problems == () and found.fvu < 1e-9
        assert found.ce_spliced == pytest.approx(found.ce) and found.ce_ablated != pytest.approx(found.ce)
    outputs = read_places(model, tokens, [("b0", "stream")])["b0", "stream"].flatten(0, 1)
    elsewhere = fit_dictionary(model, replace(principal_components(outputs, 8, "b0", "stream"), module="m1"))
    n = model.d_model
    never = replace(on(model), gate=Gate("jumprelu", threshold=torch.full((K,), 1e9)))
    dense = replace(on(model), b_enc=torch.full((K,), 1e3), W_dec=torch.zeros(K, n), b_dec=torch.zeros(n))
    for d, words in [
        (
            replace(elsewhere, reads="output", b_dec=100 + elsewhere.b_dec),
            "'m1' reads 'output', and it misses more",
        ),
        (never, "none of its features is ever active"),
        (dense, "24 of its 24 features are active at a position"),
    ]:
        with pytest.warns(UserWarning, match=words):
            found = check_dictionary(model, fit_dictionary(model, d), tokens)
        assert found.problems
