"""200 random configurations of the supported families: each loads and is exact, or is refused by name."""

import random

import pytest
import torch
from transformers import GenerationMixin

import circuitgraph as cg
from circuitgraph.model.decompose import UnsupportedModel
from circuitgraph.model.loading import load_model
from families import LLAMA3, hugging_face

pytestmark = pytest.mark.filterwarnings("ignore", "error:::circuitgraph")

N_CONFIGS, N_POS = 200, 44
ROPES = [
    {"rope_type": "default", "rope_theta": 1e4},
    {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 24},
    {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16},
    LLAMA3,
]
ACTS = ["gelu", "gelu_new", "relu", "silu", "gelu_pytorch_tanh"]


def heads(pick, **options):
    "Query heads, and key-value heads that divide them."
    n = pick([1, 2, 4])
    return {
        "num_attention_heads": n,
        "num_key_value_heads": pick([k for k in (1, 2, 4) if n % k == 0]),
        **options,
    }


def windows(pick):
    kinds = [pick(["sliding_attention", "full_attention"]) for _ in range(2)]
    return {"sliding_window": pick([1, 3, 8, 20, 40, 63]), "layer_types": kinds}


def gemma(pick):
    caps = {"attn_logit_softcapping": pick([None, 5.0]), "final_logit_softcapping": pick([None, 3.0])}
    return {
        **heads(pick),
        **windows(pick),
        **caps,
        "head_dim": pick([4, 8]),
        "query_pre_attn_scalar": pick([4, 8, 30]),
    }


def qwen(pick):
    use = pick([True, False])
    window = {
        "use_sliding_window": use,
        "sliding_window": pick([3, 20, 40]),
        "max_window_layers": pick([0, 1, 2]),
    }
    return {**heads(pick), **window, "rope_parameters": pick(ROPES)}


def falcon(pick):
    new = pick([True, False])
    options = {
        "num_attention_heads": pick([2, 4]),
        "multi_query": pick([True, False]),
        "alibi": pick([True, False]),
    }
    options |= {"new_decoder_architecture": new, "num_kv_heads": 2, "bias": pick([True, False])}
    return options | {"parallel_attn": new or pick([True, False])}


FAMILIES = {
    "GPT2": lambda pick: {
        "n_layer": pick([1, 3]),
        "n_head": pick([1, 2, 4]),
        "n_embd": 16,
        "n_positions": 64,
        "activation_function": pick(ACTS),
        "scale_attn_by_inverse_layer_idx": pick([True, False]),
        "scale_attn_weights": pick([True, False]),
    },
    "GPTNeoX": lambda pick: {
        "num_attention_heads": pick([1, 2]),
        "rotary_pct": pick([0.25, 0.5, 1.0]),
        "use_parallel_residual": pick([True, False]),
        "attention_bias": pick([True, False]),
        "hidden_act": pick(ACTS),
    },
    "Llama": lambda pick: heads(
        pick,
        rope_parameters=pick(ROPES),
        attention_bias=pick([True, False]),
        mlp_bias=pick([True, False]),
        head_dim=pick([4, 8]),
        hidden_act=pick(ACTS),
    ),
    "Mistral": lambda pick: heads(
        pick, sliding_window=pick([None, 1, 7, 30, 63]), rope_parameters=pick(ROPES)
    ),
    "Qwen2": qwen,
    "Qwen3": lambda pick: {**qwen(pick), "head_dim": pick([4, 8]), "attention_bias": pick([True, False])},
    "Gemma": lambda pick: heads(pick, head_dim=pick([4, 8])),
    "Gemma2": gemma,
    "Gemma3": gemma,
    "Phi3": lambda pick: heads(
        pick, sliding_window=pick([None, 7, 40]), partial_rotary_factor=pick([0.5, 1.0])
    ),
    "Phi": lambda pick: heads(pick, partial_rotary_factor=pick([0.5, 1.0]), qk_layernorm=pick([True, False])),
    "Starcoder2": lambda pick: heads(
        pick, sliding_window=pick([None, 5, 40]), use_bias=pick([True, False]), hidden_act=pick(ACTS)
    ),
    "Olmo": lambda pick: heads(pick, clip_qkv=pick([None, 0.5, 30.0])),
    "Olmo2": lambda pick: heads(pick, attention_bias=pick([True, False]), rope_parameters=pick(ROPES)),
    "Olmo3": lambda pick: {**heads(pick), **windows(pick)},
    "GPTJ": lambda pick: {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 16,
        "n_positions": 64,
        "rotary_dim": pick([2, 4, 8]),
    },
    "GPTNeo": lambda pick: {
        "num_layers": 2,
        "num_heads": pick([1, 2]),
        "attention_types": [[[pick(["global", "local"]), "local"], 1]],
        "window_size": pick([3, 40]),
    },
    "Falcon": falcon,
    "OPT": lambda pick: {
        "num_attention_heads": pick([1, 2]),
        "ffn_dim": 32,
        "word_embed_proj_dim": pick([8, 16]),
        "do_layer_norm_before": pick([True, False]),
        "enable_bias": pick([True, False]),
    },
    "SmolLM3": lambda pick: heads(pick, no_rope_layers=[pick([0, 1]) for _ in range(2)]),
    "StableLm": lambda pick: heads(
        pick,
        partial_rotary_factor=pick([0.25, 0.5]),
        qk_layernorm=pick([True, False]),
        use_parallel_residual=pick([True, False]),
    ),
    "Cohere": lambda pick: heads(pick, logit_scale=pick([1.0, 0.0625]), use_qk_norm=pick([True, False])),
    "Granite": lambda pick: heads(
        pick,
        embedding_multiplier=pick([1.0, 12.0]),
        residual_multiplier=pick([1.0, 0.22]),
        logits_scaling=pick([1.0, 8.0]),
        attention_multiplier=pick([1.0, 0.1]),
    ),
}


@pytest.mark.parametrize("seed", range(N_CONFIGS))
def test_a_configuration_is_exact_or_refused(seed, tmp_path):
    draw = random.Random(seed)
    family = sorted(FAMILIES)[seed % len(FAMILIES)]
    options = FAMILIES[family](draw.choice)
    theirs = hugging_face(family, options, seed)
    assert isinstance(theirs, GenerationMixin)
    theirs.save_pretrained(tmp_path)
    tokens = torch.randint(50, (2, N_POS), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        logits = theirs(tokens).logits
    try:
        model = load_model(tmp_path, dtype=torch.float64)
    except UnsupportedModel as error:
        assert family.lower() in str(error).lower() and len(str(error)) < 600
        return
    for grain in ("block", "head"):
        kept = cg.run_ablated(model, cg.complete_graph(model, grain), tokens, value="zero")
        assert (kept - logits).abs().max() < 1e-5 * logits.abs().max(), (family, options)
