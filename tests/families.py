"""Models of Hugging Face with random weights, one of each supported architecture."""

import torch
import transformers
from torch import nn

N_POS = 40  # beyond every window below
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
TWO = {"num_attention_heads": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 1e4,
}
ALTERNATING = ["sliding_attention", "full_attention"]
BY_LAYER = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
}
GEMMA = {**GROUPED, "head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8}
FAMILIES = {
    "gpt2": ("GPT2", {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 64}),
    "gpt-neox": ("GPTNeoX", {**TWO, "rotary_pct": 0.5}),
    "llama": ("Llama", GROUPED),
    "llama3": ("Llama", {**GROUPED, "rope_parameters": LLAMA3}),
    "qwen2": ("Qwen2", GROUPED),
    "qwen2-window": (
        "Qwen2",
        {**GROUPED, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "gemma": ("Gemma", {**GROUPED, "head_dim": 8}),
    "gemma2": ("Gemma2", {**GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3", {**GEMMA, "layer_types": ALTERNATING, "rope_parameters": BY_LAYER}),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": 7}),
    "phi3": ("Phi3", {**GROUPED, "sliding_window": 9}),
    "starcoder2": ("Starcoder2", {**GROUPED, "sliding_window": 5}),
    "qwen3": ("Qwen3", {**GROUPED, "head_dim": 8}),
    "olmo": ("Olmo", GROUPED),
    "olmo2": ("Olmo2", GROUPED),
    "olmo3": ("Olmo3", {**GROUPED, "sliding_window": 5, "layer_types": ALTERNATING}),
    "gpt-j": ("GPTJ", {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 64, "rotary_dim": 4}),
    "gpt-neo": (
        "GPTNeo",
        {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 5},
    ),
    "falcon": ("Falcon", {"num_attention_heads": 4, "multi_query": True, "parallel_attn": True}),
    "opt": ("OPT", {**TWO, "ffn_dim": 32, "word_embed_proj_dim": 16}),
    "phi": ("Phi", {**TWO, "partial_rotary_factor": 0.5}),
    "smollm3": ("SmolLM3", GROUPED),
    "stablelm": ("StableLm", {**GROUPED, "partial_rotary_factor": 0.5}),
}
OWN_NAMES = {
    "GPT2": {},
    "GPTJ": {},
    "Bloom": {"hidden_size": 16},
    "GPTNeo": {"hidden_size": 16, "max_position_embeddings": 64},
}
SHAPE = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 64}
SPECIAL = {
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "vocab_size": 50,
    "tie_word_embeddings": False,
}


def hugging_face(family, options, seed=0):
    "Hugging Face's model in double precision, every weight drawn: no norm weight is one, no bias zero."
    config_class = getattr(transformers, "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config")
    model_class = getattr(
        transformers, f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    )
    config = config_class(**OWN_NAMES.get(family, SHAPE), **SPECIAL, **options)
    config._attn_implementation = "eager"
    model, draw = model_class(config).double().eval(), torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=draw, dtype=torch.double)
        is_norm_weight = p.ndim == 1 and name.endswith("weight")
        scale = 0.3 if p.ndim == 1 else 1.0 if "emb" in name or "wte" in name else p.shape[-1] ** -0.5
        p.data.copy_(scale * noise + is_norm_weight)
    return model


class DoubleRMS(nn.Module):
    "An RMSNorm in the precision of its input; Hugging Face's own rounds to single precision."

    def __init__(self, norm):
        super().__init__()
        self.weight = norm.weight.data + ("Gemma" in type(norm).__name__)
        self.eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))

    def forward(self, x):
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight


def exact(model):
    "The model with norms in double precision."
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if "RMSNorm" in type(child).__name__:
                setattr(parent, name, DoubleRMS(child))
            if type(child).__name__ == "OlmoLayerNorm":
                setattr(parent, name, nn.LayerNorm(child.normalized_shape, elementwise_affine=False).double())
    return model


REFUSED = {  # what the library can't write as modules that add to a residual stream
    "mixtral": ("Mixtral", {**GROUPED, "num_local_experts": 2}),
    "mamba": ("Mamba", {"state_size": 4}),
    "bloom": ("Bloom", {"n_layer": 2, "n_head": 2}),
    "falcon with ALiBi": ("Falcon", {"num_attention_heads": 4, "alibi": True}),
    "olmo with clipping": ("Olmo", {**GROUPED, "clip_qkv": 0.5}),
    "phi with LayerNorms on queries": ("Phi", {**TWO, "qk_layernorm": True}),
    "cohere": ("Cohere", GROUPED),
}
