"""The model stage: every architecture decomposes, ports are independent, bad models are refused by name."""

import json
import shutil

import pytest
import torch
import transformers

from circuitgraph.model.blocks import apply_norm, run_attention
from circuitgraph.model.decompose import UnsupportedModel, check_decomposition, decompose
from circuitgraph.model.loading import _PACKAGES, TINY_MODELS, _packaged_folder, load_model, tiny_model
from circuitgraph.model.modules import (
    GRAINS,
    list_nodes,
    list_readers,
    norm_after,
    norm_before,
    trace_modules,
)
from families import GROUPED, hugging_face
from oracles import random_tokens

# transformers and TransformerLens warn while they boot a model; what this package causes is an error.
pytestmark = pytest.mark.filterwarnings("ignore", "error:::circuitgraph")


@pytest.mark.parametrize("name", TINY_MODELS)
def test_decomposition(name):
    model = tiny_model(name)
    assert max(check_decomposition(model, n_pos=20)) < 1e-6
    tokens = random_tokens(model)
    for grain in GRAINS:
        trace = trace_modules(model, tokens, grain)
        readers, writers = list_readers(model, grain)
        assert [*writers, "logits"] == list_nodes(model, grain)["name"].tolist()
        for reader in readers:
            assert torch.allclose(
                trace.writes[:, :, : reader.n_before].sum(2) + trace.biases[reader.module],
                trace.reads[reader.module],
            )


@pytest.mark.parametrize("name", ["llama", "gpt2", "odd-heads"])
def test_ports_may_differ_by_head(name):
    model = tiny_model(name)
    x = torch.randn(2, 6, 16, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    each = x[:, :, None].expand(-1, -1, model.n_heads, -1).clone()
    assert torch.allclose(run_attention(model, 0, x, x, x), run_attention(model, 0, each, each, each))
    each[:, :, 1] *= -1
    changed = (run_attention(model, 0, x, x, each) - run_attention(model, 0, x, x, x)).abs().amax((0, 2, 3))
    assert changed[1] > 1e-2 and changed[[h for h in range(model.n_heads) if h != 1]].max() < 1e-12


def test_reader_depends_on_its_input_alone():
    model = tiny_model("llama")
    tokens = random_tokens(model)
    trace = trace_modules(model, tokens)
    z = run_attention(model, 1, *[trace.reads["a1"]] * 3)
    written = torch.einsum("bhpe, dhe -> bphd", z, model.layers[1].attn.W_O)
    row = list_readers(model)[0][2].row
    assert torch.allclose(written, trace.writes[:, :, row : row + model.n_heads])


def test_parallel_mlp_does_not_read_its_attention():
    model = tiny_model("gpt-neox")
    readers = {r.module: r.n_before for r in list_readers(model)[0]}
    assert readers["m0"] == readers["a0"] and readers["a1"] > readers["m0"]


def test_norms_of_a_module():
    model = tiny_model("gemma2")
    layer = model.layers[1]
    assert norm_before(model, "a1") is norm_before(model, "a1.h3") is layer.ln1
    assert norm_before(model, "m1") is layer.ln2 and norm_before(model, "logits") is model.ln_final
    assert norm_after(model, "a1.h0") is layer.ln1_post and norm_after(model, "m1") is layer.ln2_post
    assert norm_after(tiny_model("llama"), "m0").kind == "none"
    for name in ("a2", "m2", "b0", "embed", "m1.h0", "a"):
        with pytest.raises(ValueError, match=f"layers 0 to 1.*got '{name}'"):
            norm_before(model, name)
    with pytest.raises(ValueError, match="got 'logits'"):
        norm_after(model, "logits")


def test_norm_none_is_identity():
    model = tiny_model("no-norm")
    x = torch.randn(3, 16, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    assert apply_norm(model.ln_final, x) is x


def test_folder_round_trip(tmp_path):
    hugging_face("Llama", GROUPED).float().save_pretrained(tmp_path)
    a, b = load_model(tmp_path), load_model(str(tmp_path))
    assert a.weights_hash == b.weights_hash and a.tokenizer is None and a.n_ctx == 64
    tokens = random_tokens(a)
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.allclose(a(tokens), hf(tokens).logits, atol=1e-6)


@pytest.mark.parametrize(
    "family, options, words",
    [
        ("Mixtral", {"num_local_experts": 2}, ["mixtures of experts"]),
        ("Mamba", {"state_size": 4}, ["state-space"]),
    ],
)
def test_unsupported_architectures_are_refused_by_name(tmp_path, family, options, words):
    shape = {"num_hidden_layers": 2, "hidden_size": 16, "vocab_size": 50}
    if family != "Mamba":
        shape |= {
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 32,
        }
    config = getattr(transformers, f"{family}Config")(
        **shape, **options, pad_token_id=0, bos_token_id=0, eos_token_id=0
    )
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel) as error:
        load_model(tmp_path)
    assert family in str(error.value) and all(w in str(error.value) for w in words), str(error.value)


def test_a_wrong_decomposition_is_refused():
    model = tiny_model("gpt2")
    model.bridge.cfg.parallel_attn_mlp = True  # what the configuration says is not what the model does
    with pytest.raises(UnsupportedModel, match="deviates"):
        load_model(model.bridge)


def test_weights_that_are_not_finite():
    model = tiny_model("llama")
    model.layers[1].attn.W_V[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN.*damaged"):
        decompose(model.bridge, "llama")


def test_unknown_sources(tmp_path):
    with pytest.raises(ValueError, match="smollm2-135m.*no-such-model"):
        load_model("no-such-model")
    with pytest.raises(ValueError, match="could not be loaded"):
        load_model(tmp_path)
    file = tmp_path / "weights.bin"
    file.write_bytes(b"x")
    with pytest.raises(ValueError, match="got the file"):
        load_model(file)
    with pytest.raises(ValueError, match="nodes must be one of block, layer, head"):
        list_nodes(tiny_model("llama"), "neuron")


@pytest.mark.parametrize("name", ["model.safetensors", "weights_hash.json", "edited"])
def test_a_damaged_cache_is_unpacked_anew(tmp_path, monkeypatch, name):
    good = _packaged_folder(_PACKAGES["smollm2-135m"])
    folder = tmp_path / "smollm2-135m"
    shutil.copytree(good, folder)
    path = folder / ("weights_hash.json" if name == "edited" else name)
    path.write_bytes(
        path.read_bytes().replace(b'"weights_hash": "', b'"weights_hash": "0')
        if name == "edited"
        else path.read_bytes()[:-10]
    )
    monkeypatch.setattr(
        "circuitgraph.model.loading._packaged_folder", lambda _package: folder if folder.exists() else good
    )  # unpacking itself takes half a minute
    with pytest.warns(UserWarning, match="unpacked anew"):
        model = load_model("smollm2-135m")
    assert (
        model.weights_hash == json.loads((good / "weights_hash.json").read_text())["weights_hash"]
        and not folder.exists()
    )
