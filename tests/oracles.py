"""Slow, direct definitions that the fast code is compared with.

They are the forward pass in plain torch, values of readers, gradients by automatic differentiation, and exact
ablation edge by edge. Of the package they take weights, and the names of readers and writers, but neither its
forward functions nor what it read from a configuration: windows, angles, caps and scales stand in `SETTINGS`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from circuitgraph.attribution.method import Attribution
from circuitgraph.model.blocks import Model, Norm
from circuitgraph.model.modules import Reader


def random_tokens(model: Model, n_seq: int = 2, n_pos: int = 10, seed: int = 1) -> Tensor:
    return torch.randint(model.d_vocab, (n_seq, n_pos), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def written_tokens(model: Model, n_seq: int, n_pos: int, seed: int = 1) -> Tensor:
    "Sequences that the model itself would write, so that it predicts them better than anything ablated."
    tokens = random_tokens(model, n_seq, 1, seed)
    while tokens.shape[1] < n_pos:
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    return tokens


def with_act(model: Model, act: Callable[[Tensor], Tensor]) -> Model:
    "The model with another activation function in its MLPs."
    layers = tuple(replace(layer, mlp=replace(layer.mlp, act=act)) for layer in model.layers)
    return replace(model, layers=layers)


# The forward pass, written out. `held` is a stream at which the scales of norms are held; None: live norms.


@dataclass(frozen=True)
class Settings:
    """What a tiny model was configured with beside its weights, as `tiny_model` has it."""

    n_turned: int = 0  # coordinates of a query or a key that turn; without any, positions are embedded
    pairs: bool = False  # whether neighbours turn together, or else coordinates half of them apart
    bases: tuple[float, float] = (1e4, 1e4)  # of the angles, by layer
    stretch: tuple[float, float] = (1.0, 1.0)  # what positions are divided by, by layer
    windows: tuple[int | None, ...] = (None, None)  # keys that a query sees, by layer
    causal: bool = True
    softcap: float | None = None
    logit_softcap: float | None = None
    embed_scale: float = 1.0


LEARNED, WINDOWED = Settings(), {"n_turned": 8, "windows": (4, None), "embed_scale": 4.0}
SETTINGS = {
    "gpt2": LEARNED,
    "chain": Settings(windows=(None,) * 3),  # built by hand
    "gpt-neox": Settings(n_turned=4),
    "llama": Settings(n_turned=4),
    "qwen2": Settings(n_turned=4),
    "gemma2": Settings(**WINDOWED, softcap=5.0, logit_softcap=3.0),
    "attention-only": LEARNED,
    "no-norm": LEARNED,
    "no-norm-relu": LEARNED,
    "bidirectional": Settings(causal=False),
    "odd-heads": Settings(n_turned=4, pairs=True),
    "olmo2": Settings(n_turned=4),
    "gemma3": Settings(**WINDOWED, bases=(1e4, 1e6), stretch=(1.0, 8.0)),
}


def embed_by_hand(model: Model, tokens: Tensor) -> dict[str, Tensor]:
    """What the embeddings write."""
    settings = SETTINGS[model.name]
    writes = {"embed": model.bridge.embed.original_component.weight[tokens] * settings.embed_scale}
    if not settings.n_turned:
        positions = model.bridge.pos_embed.original_component.weight[: tokens.shape[1]]
        writes["pos_embed"] = positions.expand(len(tokens), -1, -1)
    return writes


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
    """Queries or keys of one head `[batch pos d_head]`, turned pair by pair.

    Angles are computed in single precision, as in the original libraries.
    """
    settings, out = SETTINGS[model.name], x.clone()
    half, position = settings.n_turned // 2, torch.arange(x.shape[1], dtype=torch.float32)
    for i in range(half):
        share = torch.tensor(i, dtype=torch.float32) / half
        angle = position / settings.stretch[layer] * (1 / settings.bases[layer] ** share)
        cos, sin = angle.cos().to(x), angle.sin().to(x)
        a, b = (2 * i, 2 * i + 1) if settings.pairs else (i, i + half)
        out[..., a] = x[..., a] * cos - x[..., b] * sin
        out[..., b] = x[..., b] * cos + x[..., a] * sin
    return out


def seen_by_hand(model: Model, layer: int, n_pos: int) -> Tensor:
    """Whether each query (row) sees each key (column)."""
    settings = SETTINGS[model.name]
    window = settings.windows[layer]
    rows = []
    for query in range(n_pos):
        last = query if settings.causal else n_pos - 1
        first = 0 if window is None else query - window + 1
        rows.append([first <= key <= last for key in range(n_pos)])
    return torch.tensor(rows)


def project_by_hand(
    model: Model, layer: int, port: str, head: int, x: Tensor, held: Tensor | None = None
) -> Tensor:
    """Queries, keys or values of one head, with the original's own norm of queries and keys."""
    attn, ln1 = model.layers[layer].attn, model.layers[layer].ln1
    h = norm_by_hand(ln1, x, held)
    W, b = {"q": (attn.W_Q, attn.b_Q), "k": (attn.W_K, attn.b_K), "v": (attn.W_V, attn.b_V)}[port]
    if port == "v" or attn.q_norm is None:
        return h @ W[head].T + (0 if b is None else b[head])
    original = model.bridge.blocks[layer].attn
    W = getattr(original, port).original_component.weight
    norm = getattr(original, f"{port}_norm").original_component
    weight = norm.weight + (model.name == "gemma3")
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    own = slice(head * model.d_head, (head + 1) * model.d_head)
    projected = h @ W.T
    scaled = projected if held is None else norm_by_hand(ln1, held) @ W.T
    if weight.numel() == model.d_head:  # a norm for each head, and not one for all heads
        projected, scaled, own = projected[..., own], scaled[..., own], slice(None)
    return (projected / (scaled.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight)[..., own]


def head_by_hand(
    model: Model,
    layer: int,
    head: int,
    x_q: Tensor,
    x_k: Tensor,
    x_v: Tensor,
    pattern: Tensor | None = None,
    held: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What one head writes before any norm after it, and its pattern over the keys that a query sees."""
    shared, cap = head // (model.n_heads // model.n_kv_heads), SETTINGS[model.name].softcap
    v = project_by_hand(model, layer, "v", shared, x_v, held)
    if pattern is None:
        q = turn_by_hand(model, layer, project_by_hand(model, layer, "q", head, x_q, held))
        k = turn_by_hand(model, layer, project_by_hand(model, layer, "k", shared, x_k, held))
        scores = torch.einsum("bqe, bke -> bqk", q, k) / model.d_head**0.5
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        seen = seen_by_hand(model, layer, x_v.shape[1])
        pattern = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return pattern @ v @ model.layers[layer].attn.W_O[:, head].T, pattern


def mlp_by_hand(model: Model, layer: int, x: Tensor, held: Tensor | None = None) -> Tensor:
    """What the MLP of a layer writes, its output bias excepted."""
    mlp, ln2 = model.layers[layer].mlp, model.layers[layer].ln2

    def before_post_norm(x: Tensor) -> Tensor:
        h = norm_by_hand(ln2, x, held)
        up = h @ mlp.W_in.T + (0 if mlp.b_in is None else mlp.b_in)
        gate = up if mlp.W_gate is None else h @ mlp.W_gate.T + (0 if mlp.b_gate is None else mlp.b_gate)
        hidden = mlp.act(gate) if mlp.W_gate is None else mlp.act(gate) * up
        return hidden @ mlp.W_out.T

    whole = None if held is None else before_post_norm(held)
    return norm_by_hand(model.layers[layer].ln2_post, before_post_norm(x), whole)


def logits_by_hand(model: Model, x: Tensor, held: Tensor | None = None) -> Tensor:
    """Logits as a function of the final stream."""
    cap = SETTINGS[model.name].logit_softcap
    logits = norm_by_hand(model.ln_final, x, held) @ model.W_U.T + (0 if model.b_U is None else model.b_U)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def walk_by_hand(
    model: Model, grain: str, tokens: Tensor, read: Callable[..., Tensor], patterns: dict | None = None
) -> tuple[Tensor, dict[str, Tensor], dict]:
    """Logits, writes and patterns, where `read(reader, port, writes, bias)` is what a port reads."""
    writes, bias, seen = embed_by_hand(model, tokens), torch.zeros(model.d_model, dtype=model.dtype), {}
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
    return logits_by_hand(model, read("logits", "logits", writes, bias)), writes, seen


def read_all(_reader: str, _port: str, writes: dict[str, Tensor], bias: Tensor) -> Tensor:
    """What the model itself reads: the sum of all that was written."""
    return sum(writes.values()) + bias


# Values of readers and their gradients.


@dataclass(frozen=True)
class HandRun:
    """What everything read and wrote in one run by hand."""

    reads: dict[str, Tensor]  # by the reader's module
    biases: dict[str, Tensor]  # the sum of those written before, by the reader's module
    writes: dict[str, Tensor]  # by writer, without biases
    patterns: dict[tuple[int, int], Tensor]  # by layer and head

    def mean(self) -> "HandRun":
        """The means over sequences: of the first position by itself, and of all others together."""

        def average(t: Tensor) -> Tensor:
            first, others = t[:, :1].mean(0, keepdim=True), t[:, 1:].mean((0, 1), keepdim=True)
            return torch.cat([first, others.expand(-1, t.shape[1] - 1, -1)], 1)

        reads = {name: average(t) for name, t in self.reads.items()}
        return HandRun(reads, self.biases, {name: average(t) for name, t in self.writes.items()}, {})

    def contributions(self, names: list[str], module: str, base: "HandRun | None") -> Tensor:
        """What each writer brings to a reader `[batch pos writer d_model]`, minus that at the baseline."""
        rows, like = [], self.reads[module]
        for name in names:
            if name == "const":  # biases are the same in every run
                row = self.biases[module] if base is None else torch.zeros_like(self.biases[module])
            else:
                row = self.writes[name] - (0 if base is None else base.writes[name])
            rows.append(row.expand_as(like))
        return torch.stack(rows, 2)


@torch.no_grad()
def run_by_hand(model: Model, grain: str, tokens: Tensor) -> HandRun:
    """The model's own run."""
    reads, biases = {}, {}

    def read(reader: str, port: str, writes: dict[str, Tensor], bias: Tensor) -> Tensor:
        module = reader.split(".")[0]
        reads[module], biases[module] = read_all(reader, port, writes, bias), bias
        return reads[module]

    _, writes, patterns = walk_by_hand(model, grain, tokens, read)
    return HandRun(reads, biases, writes, patterns)


def reader_values(
    model: Model, reader: Reader, clean: HandRun, tokens: Tensor, rule: Attribution, x: Tensor | list[Tensor]
) -> Tensor:
    """The value of each reader `[batch pos name]` by its definition, as a function of what it reads.

    It reads `x`, or one tensor for each of q, k and v.
    """
    held = clean.reads[reader.module] if rule.norm == "frozen" else None
    keep = (torch.arange(tokens.shape[1]) >= rule.skip_first)[None, :, None]
    if reader.kind == "logits":
        logits, value = logits_by_hand(model, x, held), torch.zeros(*tokens.shape, 1, dtype=x.dtype)
        value[:, :-1, 0] = logits[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0] - logits[:, :-1].mean(-1)
        return value * keep
    patterns = {h: clean.patterns[reader.layer, h] for h in range(model.n_heads)}
    patterns = patterns if rule.pattern == "frozen" else {}
    if reader.kind == "mlp":
        outputs = [mlp_by_hand(model, reader.layer, x, held)]
    elif reader.kind == "block":
        outputs = [block_by_hand(model, reader.layer, x, held, patterns)]
    else:
        xs = x if isinstance(x, list) else [x] * 3
        outputs = attention_by_hand(model, reader, clean.reads[reader.module], xs, held, patterns)
    values = []
    for name, out in zip(reader.names, outputs, strict=True):
        y = clean.writes[name]
        norm2 = y.square().sum(-1)
        values.append((y * out).sum(-1) / norm2.where(norm2 > 0, torch.ones_like(norm2)) * (norm2 > 0))
    return torch.stack(values, -1) * keep


def heads_by_hand(
    model: Model, layer: int, xs: list[Tensor], held: Tensor | None, patterns: dict[int, Tensor]
) -> list[Tensor]:
    """What the heads of a layer write before any norm after them, all from the same three inputs."""
    return [head_by_hand(model, layer, h, *xs, patterns.get(h), held)[0] for h in range(model.n_heads)]


def attention_by_hand(
    model: Model,
    reader: Reader,
    clean: Tensor,
    xs: list[Tensor],
    held: Tensor | None,
    patterns: dict[int, Tensor],
) -> list[Tensor]:
    """What heads, or whole attention, write.

    Under a live norm after attention each head moves by itself, the other heads at their clean values.
    """
    layer, post = reader.layer, model.layers[reader.layer].ln1_post
    heads = heads_by_hand(model, layer, xs, held, patterns)
    if post.kind == "none":
        return [sum(heads)] if len(reader.names) == 1 else heads
    clean_heads = heads_by_hand(model, layer, [clean] * 3, held, {})
    if len(reader.names) == 1:
        return [norm_by_hand(post, sum(heads), None if held is None else sum(clean_heads))]
    outputs = []
    for y, clean_y in zip(heads, clean_heads, strict=True):
        whole = sum(clean_heads) + (y - clean_y if held is None else 0)
        outputs.append(norm_by_hand(post, y, whole))
    return outputs


def block_by_hand(
    model: Model, layer: int, x: Tensor, held: Tensor | None, patterns: dict[int, Tensor]
) -> Tensor:
    """What a whole block writes, its output biases excepted."""
    block = model.layers[layer]
    b_O = 0 if block.attn.b_O is None else block.attn.b_O
    attn = sum(heads_by_hand(model, layer, [x] * 3, held, patterns))
    clean = None if held is None else sum(heads_by_hand(model, layer, [held] * 3, held, patterns))
    attn = norm_by_hand(block.ln1_post, attn, clean)
    if block.mlp is None:
        return attn
    if held is None:
        return attn + mlp_by_hand(model, layer, x if block.parallel else x + attn + b_O)
    clean = norm_by_hand(block.ln1_post, clean)
    mid, held_mid = (x, held) if block.parallel else (x + attn + b_O, held + clean + b_O)
    return attn + mlp_by_hand(model, layer, mid, held_mid)


def autograd_weights(
    model: Model,
    reader: Reader,
    clean: HandRun,
    tokens: Tensor,
    rule: Attribution,
    x0: Tensor,
    contributions: Tensor,
) -> Tensor:
    """Weights `[name_port writer]`, summed over positions, by automatic differentiation, reader by reader."""
    x, n_ports = clean.reads[reader.module], 3 if reader.kind == "attn" else 1
    total = x.new_zeros(len(reader.names), n_ports, *x.shape)
    for alpha, weight in rule.steps:
        ports = [(x0 + alpha * (x - x0)).requires_grad_() for _ in range(n_ports)]
        values = reader_values(model, reader, clean, tokens, rule, ports[0] if n_ports == 1 else ports)
        for n, value in enumerate(values.sum((0, 1))):
            grads = torch.autograd.grad(
                value, ports, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            total[n] += weight * torch.stack(grads)
    return torch.einsum("npbsd, bswd -> npw", total, contributions).flatten(0, 1)


# Edge ablation by its definition (@eq-ablate): reader by reader, port by port, writer by writer.


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
