"""Slow, direct definitions that the fast code is held against: values of readers, gradients by automatic differentiation, exact ablation of one edge."""

import torch
from torch import Tensor

from circuitgraph.build import Rule
from circuitgraph.model import Model, Reader, Trace, freeze_block, norm_scale, run_attention, run_block, run_logits, run_mlp, write_heads


def random_tokens(model: Model, n_seq: int = 2, n_pos: int = 10, seed: int = 1) -> Tensor:
    return torch.randint(model.d_vocab, (n_seq, n_pos), generator=torch.Generator().manual_seed(seed))


def reader_values(model: Model, reader: Reader, trace: Trace, tokens: Tensor, rule: Rule, x: Tensor | list[Tensor]) -> Tensor:
    """The value of each reader `[batch pos name]` by its definition, as a function of what it reads: `x`, or one tensor `[batch pos head d_model]` for each of q, k, v."""
    clean, i = trace.reads[reader.module], reader.layer
    frozen = rule.norm == "frozen"
    keep = (torch.arange(tokens.shape[1]) >= rule.skip_first)[None, :, None]
    if reader.kind == "logits":
        logits = run_logits(model, x, scale=norm_scale(model.ln_final, clean) if frozen else None)
        value = torch.zeros(*tokens.shape, 1, dtype=clean.dtype)
        value[:, :-1, 0] = logits[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0] - logits[:, :-1].mean(-1)
        return value * keep
    y = trace.writes[:, :, reader.row : reader.row + len(reader.names)]
    if reader.kind == "block":
        held = freeze_block(model, i, clean)
        held = {k: v for k, v in held.items() if (k == "pattern" and rule.pattern == "frozen") or (k != "pattern" and frozen)}
        out = run_block(model, i, x, frozen=held)[:, :, None]
    elif reader.kind == "mlp":
        out = run_mlp(model, i, x, scale=norm_scale(model.layers[i].ln2, clean) if frozen else None, post_scale=trace.post_scale[f"m{i}"] if frozen else None)[0][:, :, None]
    else:
        scale = norm_scale(model.layers[i].ln1, clean) if frozen else None
        xs = list(x) if isinstance(x, list | tuple) else [x] * 3
        if scale is not None and xs[0].ndim == 4: scale = scale[:, :, None]
        pattern = freeze_block(model, i, clean)["pattern"] if rule.pattern == "frozen" else None
        z = run_attention(model, i, *xs, scale=scale, pattern=pattern)
        if model.layers[i].ln1_post.kind != "none" and not frozen and len(reader.names) > 1:
            z_clean = run_attention(model, i, clean, clean, clean)
            heads = []
            for h in range(model.n_heads):
                mixed = z_clean.clone()
                mixed[:, h] = z[:, h]
                heads.append(write_heads(model, i, mixed)[0][:, :, h])
            out = torch.stack(heads, 2)
        else:
            out = write_heads(model, i, z, post_scale=trace.post_scale[f"a{i}"] if frozen else None)[0]
        if len(reader.names) == 1: out = out.sum(2, keepdim=True)
    norm2 = y.square().sum(-1)
    return (y * out).sum(-1) / norm2.where(norm2 > 0, torch.ones_like(norm2)) * (norm2 > 0) * keep


def autograd_weights(model: Model, reader: Reader, trace: Trace, tokens: Tensor, rule: Rule, x0: Tensor, contributions: Tensor) -> Tensor:
    """Weights `[name_port writer]`, summed over positions, with every gradient taken by automatic differentiation, one reader at a time."""
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
                if d is not None: g += weight * d
        rows += [torch.einsum("bpd, bpwd -> w", g, contributions[:, :, : reader.n_before]) for g in grads]
    return torch.stack(rows)
