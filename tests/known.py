"""Models built by hand, whose graph is known: each solves its task through a few edges, among heads and MLPs that read everything and write noise where nothing that matters reads."""

import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

from circuitgraph.build import complete_graph
from circuitgraph.graph import Graph
from circuitgraph.model import Model, load_model
from circuitgraph.task import Task

N_NOISE, CERTAIN = 8, 10.0  # width of the directions for noise; logit of the answer, and scale of the scores of a head that looks for something (others are 0)


@dataclass(frozen=True, eq=False)
class Known:
    """A model, the edges that its behaviour rests on, and a task that it solves with certainty."""
    model: Model
    edges: tuple[str, ...]
    task: Task

    @property
    def every(self) -> Graph:
        """Each edge that the architecture allows."""
        return complete_graph(self.model)

    @property
    def graph(self) -> Graph:
        """The edges that it rests on."""
        return self.every.keep(list(self.edges))


def slots(**widths: int) -> tuple[dict[str, slice], int]:
    """Orthogonal parts of the residual stream, by name, and its width."""
    found, start = {}, 0
    for name, width in widths.items(): found[name], start = slice(start, start + width), start + width
    return found, start


def boot(n_layers: int, part: dict[str, slice], d_model: int, d_vocab: int, n_pos: int, n_heads: int, d_mlp: int, seed: int) -> tuple[TransformerBridge, dict[str, Tensor]]:
    """A causal transformer without norms whose heads and MLPs read everything at random and write into the part `noise` alone; and its weights by name. Biases are zero."""
    d_head, draw = max(d_vocab, n_pos), torch.Generator().manual_seed(seed)
    cfg = TransformerBridgeConfig(n_layers=n_layers, n_heads=n_heads, d_model=d_model, d_head=d_head, d_mlp=max(d_mlp, 1), n_ctx=n_pos, d_vocab=d_vocab,
                                  act_fn="relu", normalization_type=None, attn_only=d_mlp == 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries, while they boot
        bridge = TransformerBridge.boot_native(cfg, dtype=torch.float64)
    weights = {name.replace("_original_component.", ""): p.data for name, p in bridge.original_model.named_parameters()}
    for name, w in weights.items():
        w.zero_()
        if name.endswith((".q.weight", ".k.weight", ".v.weight", "fc_in.weight")): w.copy_(torch.randn(w.shape, generator=draw, dtype=w.dtype) / d_model**0.5)
        if name.endswith((".o.weight", "fc_out.weight")): w[part["noise"]] = torch.randn(N_NOISE, w.shape[1], generator=draw, dtype=w.dtype)
    return bridge, weights


def set_head(weights: dict[str, Tensor], layer: int, head: int, d_head: int, *, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> None:
    """Write a head's four maps `[out in]`, padded with zeros; scores are multiplied so that a match of unit vectors makes three times CERTAIN (others get e**-30 of its weight)."""
    rows = slice(head * d_head, (head + 1) * d_head)
    for name, w in (("q", q * 3 * CERTAIN * d_head**0.5), ("k", k), ("v", v)):
        weights[f"layers.{layer}.attn.{name}.weight"][rows] = 0
        weights[f"layers.{layer}.attn.{name}.weight"][rows][: len(w)] = w
    weights[f"layers.{layer}.attn.o.weight"][:, rows] = 0
    weights[f"layers.{layer}.attn.o.weight"][:, rows][:, : o.shape[1]] = o


def part_of(part: slice, d_model: int, *, shift: int = 0) -> Tensor:
    """The map `[width d_model]` that reads a part of the stream; coordinate i yields unit vector i + shift."""
    width = part.stop - part.start
    out = torch.zeros(width, d_model, dtype=torch.float64)
    for i in range(max(0, -shift), min(width, width - shift)): out[i + shift, part.start + i] = 1
    return out


def distinct_tokens(n: int, length: int, d_vocab: int, seed: int) -> Tensor:
    """Sequences of distinct tokens, none of them 0 `[seq pos]`."""
    draw = torch.Generator().manual_seed(seed)
    return torch.stack([1 + torch.randperm(d_vocab - 1, generator=draw)[:length] for _ in range(n)])


def chain(*, n_layers: int = 3, d_vocab: int = 12, n_pos: int = 6, n: int = 24, seed: int = 0) -> Known:
    """A linear chain: each MLP renames the token by a permutation and reads only what the one before it wrote. A text follows the permutation that they make together, one cycle, so that every next token is certain."""
    part, d_model = slots(**{f"s{i}": d_vocab for i in range(n_layers + 1)}, noise=N_NOISE)
    bridge, weights = boot(n_layers, part, d_model, d_vocab, n_pos, n_heads=2, d_mlp=d_vocab + N_NOISE, seed=seed)
    draw, renamed, cycle = torch.Generator().manual_seed(seed), torch.arange(d_vocab), torch.empty(d_vocab, dtype=torch.long)
    order = torch.randperm(d_vocab, generator=draw)
    cycle[order] = order.roll(-1)
    weights["tok_embed.weight"][:, part["s0"]] = torch.eye(d_vocab, dtype=torch.float64)
    weights["pos.weight"][:, part["noise"]] = torch.randn(n_pos, N_NOISE, generator=draw, dtype=torch.float64)
    for i in range(n_layers):
        new = torch.randperm(d_vocab, generator=draw) if i < n_layers - 1 else cycle[renamed.argsort()]  # the inverse of those before, then the cycle
        renamed = new[renamed]
        weights[f"layers.{i}.mlp.fc_in.weight"][:d_vocab] = part_of(part[f"s{i}"], d_model)  # the other neurons make noise
        weights[f"layers.{i}.mlp.fc_out.weight"][:, :d_vocab] = 0
        weights[f"layers.{i}.mlp.fc_out.weight"][part[f"s{i + 1}"], :d_vocab] = torch.eye(d_vocab, dtype=torch.float64)[:, new]
    weights["head.weight"][:, part[f"s{n_layers}"]] = CERTAIN * torch.eye(d_vocab, dtype=torch.float64)
    clean = order[(torch.randint(d_vocab, (n, 1), generator=draw) + torch.arange(n_pos)) % d_vocab]
    corrupted = clean.roll(1, 1)
    task = Task(clean, corrupted, answers=cycle[clean[:, -1:]], wrong=cycle[corrupted[:, -1:]], name="chain")
    modules = ["embed", *(f"m{i}" for i in range(n_layers)), "logits"]
    return Known(replace(load_model(bridge), name="chain"), tuple(f"{a}->{b}" for a, b in zip(modules, modules[1:], strict=False)), task)


def copy_previous(*, d_vocab: int = 12, n_pos: int = 8, n: int = 24, seed: int = 0) -> Known:
    """Attention alone: head a0.h1 looks one position back and copies the token it finds. The answer is the token before the last."""
    part, d_model = slots(token=d_vocab, found=d_vocab, position=n_pos, noise=N_NOISE)
    bridge, weights = boot(2, part, d_model, d_vocab, n_pos, n_heads=3, d_mlp=0, seed=seed)
    weights["tok_embed.weight"][:, part["token"]] = torch.eye(d_vocab, dtype=torch.float64)
    weights["pos.weight"][:, part["position"]] = torch.eye(n_pos, dtype=torch.float64)
    set_head(weights, 0, 1, max(d_vocab, n_pos), q=part_of(part["position"], d_model, shift=-1), k=part_of(part["position"], d_model), v=part_of(part["token"], d_model), o=part_of(part["found"], d_model).T)
    weights["head.weight"][:, part["found"]] = CERTAIN * torch.eye(d_vocab, dtype=torch.float64)
    clean = distinct_tokens(n, n_pos, d_vocab, seed)
    corrupted = clean.roll(1, 1)
    task = Task(clean, corrupted, answers=clean[:, -2:-1], wrong=corrupted[:, -2:-1], name="copy the previous token")
    return Known(replace(load_model(bridge), name="copy"), ("pos_embed->a0.h1<q>", "pos_embed->a0.h1<k>", "embed->a0.h1<v>", "a0.h1->logits"), task)


def induction(*, d_vocab: int = 16, length: int = 8, n: int = 24, seed: int = 0) -> Known:
    """Two layers: a0.h0 writes the token before each position, a1.h0 looks for the position before which the present token stood and copies its token. Prompts are token 0, distinct tokens, and the beginning of the same again."""
    n_pos = 1 + 2 * length
    part, d_model = slots(token=d_vocab, previous=d_vocab, found=d_vocab, position=n_pos, noise=N_NOISE)
    bridge, weights = boot(2, part, d_model, d_vocab, n_pos, n_heads=3, d_mlp=2 * N_NOISE, seed=seed)
    d_head, token = max(d_vocab, n_pos), part_of(part["token"], d_model)
    weights["tok_embed.weight"][:, part["token"]] = torch.eye(d_vocab, dtype=torch.float64)
    weights["pos.weight"][:, part["position"]] = torch.eye(n_pos, dtype=torch.float64)
    set_head(weights, 0, 0, d_head, q=part_of(part["position"], d_model, shift=-1), k=part_of(part["position"], d_model), v=token, o=part_of(part["previous"], d_model).T)
    set_head(weights, 1, 0, d_head, q=token, k=part_of(part["previous"], d_model), v=token, o=part_of(part["found"], d_model).T)
    weights["head.weight"][:, part["found"]] = CERTAIN * torch.eye(d_vocab, dtype=torch.float64)
    words, seen = distinct_tokens(n, length, d_vocab, seed), length // 2
    first = torch.zeros(n, 1, dtype=torch.long)  # a first token that never comes again: at position 0 the first head finds only the token itself
    clean = torch.cat([first, words, words[:, :seen]], 1)
    corrupted = torch.cat([first, words, words[:, :seen].roll(1, 1)], 1)
    task = Task(clean, corrupted, answers=words[:, seen : seen + 1], wrong=words[:, seen - 1 : seen], name="induction")
    return Known(replace(load_model(bridge), name="induction"), ("pos_embed->a0.h0<q>", "pos_embed->a0.h0<k>", "embed->a0.h0<v>", "embed->a1.h0<q>", "a0.h0->a1.h0<k>", "embed->a1.h0<v>", "a1.h0->logits"), task)


KNOWN = {"chain": chain, "copy": copy_previous, "induction": induction}
