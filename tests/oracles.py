"""Slow, direct definitions that the fast code is compared with.

They are values of readers, gradients by automatic differentiation, and exact ablation edge by edge.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from circuitgraph.attribution.method import Attribution
from circuitgraph.model.blocks import Model, Norm, apply_norm, freeze_block, head_scales, norm_scale
from circuitgraph.model.blocks import (
    rotary_tables,
    run_attention,
    run_block,
    run_logits,
    run_mlp,
    write_heads,
)
from circuitgraph.model.modules import Reader, Trace, embed_tokens


def random_tokens(model: Model, n_seq: int = 2, n_pos: int = 10, seed: int = 1) -> Tensor:
    return torch.randint(model.d_vocab, (n_seq, n_pos), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def written_tokens(model: Model, n_seq: int, n_pos: int, seed: int = 1) -> Tensor:
    "Sequences that the model itself would write, so that it predicts them better than anything ablated."
    tokens = random_tokens(model, n_seq, 1, seed)
    while tokens.shape[1] < n_pos:
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    return tokens


def reader_values(
    model: Model, reader: Reader, trace: Trace, tokens: Tensor, rule: Attribution, x: Tensor | list[Tensor]
) -> Tensor:
    """The value of each reader `[batch pos name]` by its definition, as a function of what it reads.

    It reads `x`, or one tensor `[batch pos head d_model]` for each of q, k and v.
    """
    clean = trace.reads[reader.module]
    keep = (torch.arange(tokens.shape[1]) >= rule.skip_first)[None, :, None]
    if reader.kind == "logits":
        scale = norm_scale(model.ln_final, clean) if rule.norm == "frozen" else None
        logits = run_logits(model, x, scale=scale)
        value = torch.zeros(*tokens.shape, 1, dtype=clean.dtype)
        value[:, :-1, 0] = logits[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0] - logits[:, :-1].mean(-1)
        return value * keep
    run = {"block": block_output, "mlp": mlp_output, "attn": attention_output}[reader.kind]
    out = run(model, reader, trace, rule, x)
    y = trace.writes[:, :, reader.row : reader.row + len(reader.names)]
    norm2 = y.square().sum(-1)
    return (y * out).sum(-1) / norm2.where(norm2 > 0, torch.ones_like(norm2)) * (norm2 > 0) * keep


def block_output(model: Model, reader: Reader, trace: Trace, rule: Attribution, x: Tensor) -> Tensor:
    """What a block writes, with the scales and the pattern that are frozen."""
    frozen = freeze_block(model, reader.layer, trace.reads[reader.module])
    if rule.pattern != "frozen":
        del frozen["pattern"]
    if rule.norm != "frozen":
        frozen = {name: value for name, value in frozen.items() if name == "pattern"}
    return run_block(model, reader.layer, x, frozen=frozen)[:, :, None]


def mlp_output(model: Model, reader: Reader, trace: Trace, rule: Attribution, x: Tensor) -> Tensor:
    """What an MLP writes, with frozen or live norms."""
    i, scales = reader.layer, {}
    if rule.norm == "frozen":
        scale = norm_scale(model.layers[i].ln2, trace.reads[reader.module])
        scales = {"scale": scale, "post_scale": trace.post_scale[f"m{i}"]}
    return run_mlp(model, i, x, **scales)[0][:, :, None]


def attention_output(
    model: Model, reader: Reader, trace: Trace, rule: Attribution, x: Tensor | list[Tensor]
) -> Tensor:
    """What heads, or whole attention, write, with frozen or live norms and patterns."""
    clean, i, frozen = trace.reads[reader.module], reader.layer, rule.norm == "frozen"
    xs = list(x) if isinstance(x, list | tuple) else [x] * 3
    scale = norm_scale(model.layers[i].ln1, clean) if frozen else None
    if scale is not None and xs[0].ndim == 4:
        scale = scale[:, :, None]
    pattern = freeze_block(model, i, clean)["pattern"] if rule.pattern == "frozen" else None
    scales = head_scales(model, i, apply_norm(model.layers[i].ln1, clean)) if frozen else (None, None)
    z = run_attention(model, i, *xs, scale=scale, pattern=pattern, head_scales=scales)
    if model.layers[i].ln1_post.kind != "none" and not frozen and len(reader.names) > 1:
        return heads_one_by_one(model, i, clean, z)
    out = write_heads(model, i, z, post_scale=trace.post_scale[f"a{i}"] if frozen else None)[0]
    return out.sum(2, keepdim=True) if len(reader.names) == 1 else out


def heads_one_by_one(model: Model, i: int, clean: Tensor, z: Tensor) -> Tensor:
    """What each head writes under a live norm after attention, the other heads at their clean values."""
    z_clean, heads = run_attention(model, i, clean, clean, clean), []
    for h in range(model.n_heads):
        mixed = z_clean.clone()
        mixed[:, h] = z[:, h]
        heads.append(write_heads(model, i, mixed)[0][:, :, h])
    return torch.stack(heads, 2)


def autograd_weights(
    model: Model,
    reader: Reader,
    trace: Trace,
    tokens: Tensor,
    rule: Attribution,
    x0: Tensor,
    contributions: Tensor,
) -> Tensor:
    """Weights `[name_port writer]`, summed over positions, by automatic differentiation, reader by reader."""
    x, rows = trace.reads[reader.module], []
    n_ports = 3 if reader.kind == "attn" else 1
    for n in range(len(reader.names)):
        grads = [torch.zeros_like(x) for _ in range(n_ports)]
        for alpha, weight in rule.steps:
            x_a = x0.expand_as(x) + alpha * (x - x0.expand_as(x))
            ports = [x_a.clone().requires_grad_() for _ in range(n_ports)]
            args = ports[0] if n_ports == 1 else ports
            value = reader_values(model, reader, trace, tokens, rule, args)[..., n].sum()
            for g, d in zip(grads, torch.autograd.grad(value, ports, allow_unused=True), strict=True):
                if d is not None:
                    g += weight * d
        rows += [torch.einsum("bpd, bpwd -> w", g, contributions[:, :, : reader.n_before]) for g in grads]
    return torch.stack(rows)


# Edge ablation by its definition (@eq-ablate): reader by reader, port by port, writer by writer.
# Only weights, rotary tables and embeddings are taken from the package.


def norm_by_hand(norm: Norm, x: Tensor, whole: Tensor | None = None) -> Tensor:
    """The norm of `x`; of a part of `whole`, at the scale of the whole."""
    if norm.kind == "none":
        return x
    whole = x if whole is None else whole
    if norm.kind == "layer":
        x, whole = x - x.mean(-1, keepdim=True), whole - whole.mean(-1, keepdim=True)
    y = x / (whole.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
    y = y if norm.weight is None else y * norm.weight
    return y if norm.bias is None else y + norm.bias


def turn_by_hand(model: Model, layer: int, x: Tensor) -> Tensor:
    """Queries or keys of one head `[batch pos d_head]`, turned pair by pair."""
    rotary, out = model.layers[layer].attn.rotary, x.clone()
    cos, sin = rotary_tables(model, x.shape[1], layer)
    half = cos.shape[-1] // 2
    for i in range(half):
        a, b = (i, i + half) if rotary == "halves" else (2 * i, 2 * i + 1)
        out[..., a] = x[..., a] * cos[:, a] - x[..., b] * sin[:, a]
        out[..., b] = x[..., b] * cos[:, b] + x[..., a] * sin[:, b]
    return out


WINDOWS = {"gemma2": (4, None), "gemma3": (4, None)}  # of the tiny models, by layer, as they were configured


def project_by_hand(model: Model, layer: int, port: str, head: int, x: Tensor) -> Tensor:
    """Queries, keys or values of one head, with the original's own norm of queries and keys."""
    attn = model.layers[layer].attn
    h = norm_by_hand(model.layers[layer].ln1, x)
    W, b = {"q": (attn.W_Q, attn.b_Q), "k": (attn.W_K, attn.b_K), "v": (attn.W_V, attn.b_V)}[port]
    if port == "v" or attn.q_norm is None:
        return h @ W[head].T + (0 if b is None else b[head])
    original = model.bridge.blocks[layer].attn
    projected = h @ getattr(original, port).original_component.weight.T
    norm = getattr(original, f"{port}_norm").original_component
    weight = norm.weight + (model.name == "gemma3")
    own = slice(head * model.d_head, (head + 1) * model.d_head)
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    if weight.numel() > model.d_head:  # one norm for all heads
        return (projected / (projected.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight)[..., own]
    projected = projected[..., own]
    return projected / (projected.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def head_by_hand(
    model: Model, layer: int, head: int, x_q: Tensor, x_k: Tensor, x_v: Tensor, pattern: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What one head writes before any norm after it, and its pattern, query by query over visible keys."""
    attn, shared, n_pos = model.layers[layer].attn, head // (model.n_heads // model.n_kv_heads), x_v.shape[1]
    window = WINDOWS[model.name][layer] if model.name in WINDOWS else None
    q = project_by_hand(model, layer, "q", head, x_q)
    k = project_by_hand(model, layer, "k", shared, x_k)
    v = project_by_hand(model, layer, "v", shared, x_v)
    if pattern is None:
        q, k = turn_by_hand(model, layer, q), turn_by_hand(model, layer, k)
        pattern = torch.zeros(len(v), n_pos, n_pos, dtype=v.dtype)
        for i in range(n_pos):
            last = i if attn.causal else n_pos - 1
            seen = [j for j in range(last + 1) if window is None or i - j < window]
            scores = (k[:, seen] * q[:, i : i + 1]).sum(-1) * attn.scale
            if attn.softcap is not None:
                scores = attn.softcap * torch.tanh(scores / attn.softcap)
            pattern[:, i, seen] = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return pattern @ v @ attn.W_O[:, head].T, pattern


def mlp_by_hand(model: Model, layer: int, x: Tensor) -> Tensor:
    """What the MLP of a layer writes, its output bias excepted."""
    mlp, h = model.layers[layer].mlp, norm_by_hand(model.layers[layer].ln2, x)
    up = h @ mlp.W_in.T + (0 if mlp.b_in is None else mlp.b_in)
    gate = up if mlp.W_gate is None else h @ mlp.W_gate.T + (0 if mlp.b_gate is None else mlp.b_gate)
    hidden = mlp.act(gate) if mlp.W_gate is None else mlp.act(gate) * up
    return norm_by_hand(model.layers[layer].ln2_post, hidden @ mlp.W_out.T)


def walk_by_hand(
    model: Model, grain: str, tokens: Tensor, read: Callable[..., Tensor], patterns: dict | None = None
) -> tuple[Tensor, dict[str, Tensor], dict]:
    """Logits, writes and patterns, where `read(reader, port, writes, bias)` is what a port reads."""
    writes, bias, seen = embed_tokens(model, tokens), torch.zeros(model.d_model, dtype=model.dtype), {}
    for i, layer in enumerate(model.layers):
        before, bias_before, heads = dict(writes), bias, []
        b_O = 0 if layer.attn.b_O is None else layer.attn.b_O
        for h in range(model.n_heads):
            name = {"block": f"b{i}", "layer": f"a{i}", "head": f"a{i}.h{h}"}[grain]
            xs = [read(name, "in" if grain == "block" else port, before, bias_before) for port in "qkv"]
            y, seen[i, h] = head_by_hand(model, i, h, *xs, (patterns or {}).get((i, h)))
            heads.append(y)
        heads = [norm_by_hand(layer.ln1_post, y, sum(heads)) for y in heads]
        if grain == "head":
            writes |= {f"a{i}.h{h}": y for h, y in enumerate(heads)}
        if grain == "layer":
            writes[f"a{i}"] = sum(heads)
        bias = bias + b_O
        if layer.mlp is not None:
            if grain == "block":
                x = xs[0] if layer.parallel else xs[0] + sum(heads) + b_O
            else:
                x = (
                    read(f"m{i}", "mlp", before, bias_before)
                    if layer.parallel
                    else read(f"m{i}", "mlp", writes, bias)
                )
            y = mlp_by_hand(model, i, x)
            if grain != "block":
                writes[f"m{i}"] = y
            bias = bias + (0 if layer.mlp.b_out is None else layer.mlp.b_out)
        if grain == "block":
            writes[f"b{i}"] = sum(heads) + (0 if layer.mlp is None else y)
    logits = norm_by_hand(model.ln_final, read("logits", "logits", writes, bias)) @ model.W_U.T + (
        0 if model.b_U is None else model.b_U
    )
    if model.logit_softcap is not None:
        logits = model.logit_softcap * torch.tanh(logits / model.logit_softcap)
    return logits, writes, seen


def read_all(_reader: str, _port: str, writes: dict[str, Tensor], bias: Tensor) -> Tensor:
    """What the model itself reads: the sum of all that was written."""
    return sum(writes.values()) + bias


@torch.no_grad()
def writes_by_hand(model: Model, grain: str, tokens: Tensor) -> dict[str, Tensor]:
    """What every writer writes in the model's own run: the ablated values that another run gives."""
    return walk_by_hand(model, grain, tokens, read_all)[1]


def mean_by_hand(
    model: Model, grain: str, text: Tensor, n_pos: int | None = None, lengths: list[int] | None = None
) -> dict[str, Tensor]:
    """Mean write of every writer over a text, one sequence after another, padding left out.

    The mean is over all positions, or at each of the first `n_pos` by itself.
    """
    lengths, total = lengths or [text.shape[1]] * len(text), {}
    for row, length in zip(text, lengths, strict=True):
        for name, y in writes_by_hand(model, grain, row[None, :length]).items():
            total[name] = total.get(name, 0) + (y[0].sum(0) if n_pos is None else y[0, :n_pos])
    return {name: y / (sum(lengths) if n_pos is None else len(text)) for name, y in total.items()}


@torch.no_grad()
def ablate_by_hand(
    model: Model,
    grain: str,
    kept: Iterable[str] | dict[str, float],
    tokens: Tensor,
    ablated: dict[str, Tensor] | None = None,
    *,
    pattern: str = "live",
) -> Tensor:
    """Logits with all edges ablated but those of `kept` (names, or a number for each name).

    An ablated edge carries the value of its writer in `ablated`. Without `ablated` it carries nothing, biases
    neither.
    """
    kept = kept if isinstance(kept, dict) else dict.fromkeys(kept, 1.0)

    def read(reader: str, port: str, writes: dict[str, Tensor], bias: Tensor) -> Tensor:
        end, x = f"->{reader}<{port}>" if port in ("q", "k", "v") else f"->{reader}", 0
        for writer, y in writes.items():
            m = kept.get(writer + end, 0.0)
            x = x + m * y + (0 if ablated is None else (1 - m) * ablated[writer])
        return (
            x + (kept.get("const" + end, 0.0) if ablated is None else 1.0) * bias
        )  # biases are the same in every run: only zero cuts them

    patterns = walk_by_hand(model, grain, tokens, read_all)[2] if pattern == "frozen" else None
    return walk_by_hand(model, grain, tokens, read, patterns)[0]
