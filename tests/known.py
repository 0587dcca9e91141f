"""Models built by hand, whose graph is known: each solves its task through a few edges, among heads and
MLPs that read everything and write noise where nothing that matters reads."""

import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

from circuitgraph.build.build import complete_graph
from circuitgraph.graph.graph import Graph
from circuitgraph.model.blocks import Model
from circuitgraph.model.loading import load_model
from circuitgraph.data.task import Task

N_NOISE, CERTAIN = (
    8,
    10.0,
    # width of the directions for noise; logit of the answer, and scale of the scores of a head that looks for
    # something (others are 0)
)


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
    for name, width in widths.items():
        found[name], start = slice(start, start + width), start + width
    return found, start


def boot(
    n_layers: int,
    part: dict[str, slice],
    d_model: int,
    d_vocab: int,
    n_pos: int,
    n_heads: int,
    d_mlp: int,
    seed: int,
) -> tuple[TransformerBridge, dict[str, Tensor]]:
    """A causal transformer without norms whose heads and MLPs read everything at random and write into the
    part `noise` alone; and its weights by name. Biases are zero."""
    d_head, draw = max(d_vocab, n_pos), torch.Generator().manual_seed(seed)
    cfg = TransformerBridgeConfig(
        n_layers=n_layers,
        n_heads=n_heads,
        d_model=d_model,
        d_head=d_head,
        d_mlp=max(d_mlp, 1),
        n_ctx=n_pos,
        d_vocab=d_vocab,
        act_fn="relu",
        normalization_type=None,
        attn_only=d_mlp == 0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries, while they boot
        bridge = TransformerBridge.boot_native(cfg, dtype=torch.float64)
    weights = {
        name.replace("_original_component.", ""): p.data
        for name, p in bridge.original_model.named_parameters()
    }
    for name, w in weights.items():
        w.zero_()
        if name.endswith((".q.weight", ".k.weight", ".v.weight", "fc_in.weight")):
            w.copy_(torch.randn(w.shape, generator=draw, dtype=w.dtype) / d_model**0.5)
        if name.endswith((".o.weight", "fc_out.weight")):
            w[part["noise"]] = torch.randn(N_NOISE, w.shape[1], generator=draw, dtype=w.dtype)
    return bridge, weights


def set_head(
    weights: dict[str, Tensor],
    layer: int,
    head: int,
    d_head: int,
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
) -> None:
    """Write a head's four maps `[out in]`, padded with zeros; scores are multiplied so that a match of unit
    vectors makes three times CERTAIN (others get e**-30 of its weight)."""
    rows = slice(head * d_head, (head + 1) * d_head)
    for name, w in (("q", q * 3 * CERTAIN * d_head**0.5), ("k", k), ("v", v)):
        weights[f"layers.{layer}.attn.{name}.weight"][rows] = 0
        weights[f"layers.{layer}.attn.{name}.weight"][rows][: len(w)] = w
    weights[f"layers.{layer}.attn.o.weight"][:, rows] = 0
    weights[f"layers.{layer}.attn.o.weight"][:, rows][:, : o.shape[1]] = o


def part_of(part: slice, d_model: int, *, shift: int = 0) -> Tensor:
    """The map `[width d_model]` that reads a part of the stream; coordinate i gives unit vector i + shift."""
    width = part.stop - part.start
    out = torch.zeros(width, d_model, dtype=torch.float64)
    for i in range(max(0, -shift), min(width, width - shift)):
        out[i + shift, part.start + i] = 1
    return out


def directions_in(part: slice, d_model: int, inner: Tensor | None = None) -> Tensor:
    """Directions within one part of the stream: given there `[feature width]`, or its coordinates."""
    inner = torch.eye(part.stop - part.start, dtype=torch.float64) if inner is None else inner
    out = torch.zeros(len(inner), d_model, dtype=torch.float64)
    out[:, part] = inner
    return out


def set_mlp(
    weights: dict[str, Tensor], layer: int, reads: Tensor, writes: Tensor, bias: Tensor | None = None
) -> None:
    """Set the first neurons of an MLP: what each reads and what it writes `[neuron d_model]`; the others
    make noise."""
    n, name = len(reads), f"layers.{layer}.mlp"
    weights[f"{name}.fc_in.weight"][:n], weights[f"{name}.fc_out.weight"][:, :n] = reads, writes.mT
    if bias is not None:
        weights[f"{name}.fc_in.bias"][:n] = bias


def distinct_tokens(n: int, length: int, d_vocab: int, seed: int) -> Tensor:
    """Sequences of distinct tokens, none of them 0 `[seq pos]`."""
    draw = torch.Generator().manual_seed(seed)
    return torch.stack([1 + torch.randperm(d_vocab - 1, generator=draw)[:length] for _ in range(n)])


def in_pairs(clean: Tensor, answers: Tensor, name: str) -> Task:
    """A task whose prompts `[prompt pos]` are corrupted by one another: each by one with another answer."""
    order = answers.argsort(stable=True)
    clean, answers = clean[order], answers[order, None]
    half = len(clean) // 2
    assert (answers != answers.roll(half, 0)).all()  # as long as no answer is that of more than half
    return Task(clean, clean.roll(half, 0), answers=answers, wrong=answers.roll(half, 0), name=name)


def chain(*, n_layers: int = 3, d_vocab: int = 12, n_pos: int = 6, n: int = 24, seed: int = 0) -> Known:
    """A linear chain: each MLP renames the token by a permutation and reads only what the one before it
    wrote. A text follows the permutation that they make together, one cycle, so that every next token is
    certain."""
    part, d_model = slots(**{f"s{i}": d_vocab for i in range(n_layers + 1)}, noise=N_NOISE)
    bridge, weights = boot(
        n_layers, part, d_model, d_vocab, n_pos, n_heads=2, d_mlp=d_vocab + N_NOISE, seed=seed
    )
    draw, renamed, cycle = (
        torch.Generator().manual_seed(seed),
        torch.arange(d_vocab),
        torch.empty(d_vocab, dtype=torch.long),
    )
    order = torch.randperm(d_vocab, generator=draw)
    cycle[order] = order.roll(-1)
    weights["tok_embed.weight"][:, part["s0"]] = torch.eye(d_vocab, dtype=torch.float64)
    weights["pos.weight"][:, part["noise"]] = torch.randn(n_pos, N_NOISE, generator=draw, dtype=torch.float64)
    for i in range(n_layers):
        new = (
            torch.randperm(d_vocab, generator=draw) if i < n_layers - 1 else cycle[renamed.argsort()]
        )  # the inverse of those before, then the cycle
        renamed = new[renamed]
        weights[f"layers.{i}.mlp.fc_in.weight"][:d_vocab] = part_of(
            part[f"s{i}"], d_model
        )  # the other neurons make noise
        weights[f"layers.{i}.mlp.fc_out.weight"][:, :d_vocab] = 0
        weights[f"layers.{i}.mlp.fc_out.weight"][part[f"s{i + 1}"], :d_vocab] = torch.eye(
            d_vocab, dtype=torch.float64
        )[:, new]
    weights["head.weight"][:, part[f"s{n_layers}"]] = CERTAIN * torch.eye(d_vocab, dtype=torch.float64)
    clean = order[(torch.randint(d_vocab, (n, 1), generator=draw) + torch.arange(n_pos)) % d_vocab]
    corrupted = clean.roll(1, 1)
    task = Task(clean, corrupted, answers=cycle[clean[:, -1:]], wrong=cycle[corrupted[:, -1:]], name="chain")
    modules = ["embed", *(f"m{i}" for i in range(n_layers)), "logits"]
    return Known(
        replace(load_model(bridge), name="chain"),
        tuple(f"{a}->{b}" for a, b in zip(modules, modules[1:], strict=False)),
        task,
    )


def copy_previous(*, d_vocab: int = 12, n_pos: int = 8, n: int = 24, seed: int = 0) -> Known:
    """Attention alone: head a0.h1 looks one position back and copies the token it finds. The answer is the
    token before the last."""
    part, d_model = slots(token=d_vocab, found=d_vocab, position=n_pos, noise=N_NOISE)
    bridge, weights = boot(2, part, d_model, d_vocab, n_pos, n_heads=3, d_mlp=0, seed=seed)
    weights["tok_embed.weight"][:, part["token"]] = torch.eye(d_vocab, dtype=torch.float64)
    weights["pos.weight"][:, part["position"]] = torch.eye(n_pos, dtype=torch.float64)
    set_head(
        weights,
        0,
        1,
        max(d_vocab, n_pos),
        q=part_of(part["position"], d_model, shift=-1),
        k=part_of(part["position"], d_model),
        v=part_of(part["token"], d_model),
        o=part_of(part["found"], d_model).T,
    )
    weights["head.weight"][:, part["found"]] = CERTAIN * torch.eye(d_vocab, dtype=torch.float64)
    clean = distinct_tokens(n, n_pos, d_vocab, seed)
    corrupted = clean.roll(1, 1)
    task = Task(
        clean, corrupted, answers=clean[:, -2:-1], wrong=corrupted[:, -2:-1], name="copy the previous token"
    )
    return Known(
        replace(load_model(bridge), name="copy"),
        ("pos_embed->a0.h1<q>", "pos_embed->a0.h1<k>", "embed->a0.h1<v>", "a0.h1->logits"),
        task,
    )


def induction(*, d_vocab: int = 16, length: int = 8, n: int = 24, seed: int = 0) -> Known:
    """Two layers: a0.h0 writes the token before each position, a1.h0 looks for the position before which
    the present token stood and copies its token. Prompts are token 0, distinct tokens, and the beginning
    of the same again."""
    n_pos = 1 + 2 * length
    part, d_model = slots(token=d_vocab, previous=d_vocab, found=d_vocab, position=n_pos, noise=N_NOISE)
    bridge, weights = boot(2, part, d_model, d_vocab, n_pos, n_heads=3, d_mlp=2 * N_NOISE, seed=seed)
    d_head, token = max(d_vocab, n_pos), part_of(part["token"], d_model)
    weights["tok_embed.weight"][:, part["token"]] = torch.eye(d_vocab, dtype=torch.float64)
    weights["pos.weight"][:, part["position"]] = torch.eye(n_pos, dtype=torch.float64)
    set_head(
        weights,
        0,
        0,
        d_head,
        q=part_of(part["position"], d_model, shift=-1),
        k=part_of(part["position"], d_model),
        v=token,
        o=part_of(part["previous"], d_model).T,
    )
    set_head(
        weights,
        1,
        0,
        d_head,
        q=token,
        k=part_of(part["previous"], d_model),
        v=token,
        o=part_of(part["found"], d_model).T,
    )
    weights["head.weight"][:, part["found"]] = CERTAIN * torch.eye(d_vocab, dtype=torch.float64)
    words, seen = distinct_tokens(n, length, d_vocab, seed), length // 2
    first = torch.zeros(
        n, 1, dtype=torch.long
    )  # a first token that never comes again: at position 0 the first head finds only the token itself
    clean = torch.cat([first, words, words[:, :seen]], 1)
    corrupted = torch.cat([first, words, words[:, :seen].roll(1, 1)], 1)
    task = Task(
        clean, corrupted, answers=words[:, seen : seen + 1], wrong=words[:, seen - 1 : seen], name="induction"
    )
    return Known(
        replace(load_model(bridge), name="induction"),
        (
            "pos_embed->a0.h0<q>",
            "pos_embed->a0.h0<k>",
            "embed->a0.h0<v>",
            "embed->a1.h0<q>",
            "a0.h0->a1.h0<k>",
            "embed->a1.h0<v>",
            "a1.h0->logits",
        ),
        task,
    )


def reverse(*, d_vocab: int = 12, n_pos: int = 8, n: int = 24, seed: int = 0) -> Known:
    """Two layers that calculate with positions: a0.h0 finds where the separator (token 0) stands, m0
    mirrors the present position in it, and a1.h1 copies the token from there. Prompts are distinct
    words, the separator, and the beginning of the same words backwards."""
    part, d_model = slots(
        token=d_vocab, found=d_vocab, position=n_pos, middle=n_pos, mirrored=n_pos, noise=N_NOISE
    )
    pairs = [
        (s, p) for p in range(n_pos) for s in range(p + 1) if 2 * s > p
    ]  # the separator at s, and what follows p is what stands at 2 s - 1 - p
    bridge, weights = boot(2, part, d_model, d_vocab, n_pos, n_heads=2, d_mlp=len(pairs) + N_NOISE, seed=seed)
    d_head, token, position, middle, mirrored = (
        max(d_vocab, n_pos),
        *(directions_in(part[name], d_model) for name in ("token", "position", "middle", "mirrored")),
    )
    weights["tok_embed.weight"].copy_(token)
    weights["pos.weight"][:, part["position"]] = torch.eye(n_pos, dtype=torch.float64)
    set_head(weights, 0, 0, d_head, q=0 * token[:1], k=token[:1], v=position, o=middle.mT)
    weights["layers.0.attn.q.bias"][0] = 3 * CERTAIN * d_head**0.5  # it looks for the same from everywhere
    s, p = torch.tensor(pairs).mT
    set_mlp(
        weights,
        0,
        middle[s] + position[p],
        mirrored[2 * s - 1 - p],
        -torch.ones(len(pairs), dtype=torch.float64),
    )
    set_head(weights, 1, 1, d_head, q=mirrored, k=position, v=token, o=part_of(part["found"], d_model).T)
    weights["head.weight"].copy_(CERTAIN * directions_in(part["found"], d_model))
    at, last = n_pos // 2 + torch.arange(n) % (n_pos // 2), torch.arange(n_pos)
    mirror = torch.where(last < at[:, None], last, 2 * at[:, None] - last)
    clean = distinct_tokens(n, n_pos, d_vocab, seed).gather(1, mirror).masked_fill(last == at[:, None], 0)
    answers = clean.gather(1, 2 * at[:, None] - n_pos)[:, 0]
    return Known(
        replace(load_model(bridge), name="reverse"),
        (
            "embed->a0.h0<k>",
            "pos_embed->a0.h0<v>",
            "a0.h0->m0",
            "pos_embed->m0",
            "m0->a1.h1<q>",
            "pos_embed->a1.h1<k>",
            "embed->a1.h1<v>",
            "a1.h1->logits",
        ),
        in_pairs(clean, answers, "reverse"),
    )


def count(*, n_letters: int = 3, most: int = 4, n_pos: int = 7, n: int = 24, seed: int = 0) -> Known:
    """A histogram: a0.h1 looks at all places where the present letter stands and at token 0 at the
    beginning alike, so that c places leave 1 / (c + 1) of its attention to the beginning; m0 tells these
    shares apart. Tokens are 0, the letters, and the numbers from 1."""
    d_vocab, shares = 1 + n_letters + most, 1 / (2 + torch.arange(most + 1, dtype=torch.float64))
    part, d_model = slots(token=d_vocab, share=1, number=most, noise=N_NOISE)
    bridge, weights = boot(2, part, d_model, d_vocab, n_pos, n_heads=2, d_mlp=most + N_NOISE, seed=seed)
    token, share, number = (directions_in(part[name], d_model) for name in ("token", "share", "number"))
    weights["tok_embed.weight"].copy_(token)
    set_head(
        weights, 0, 1, max(d_vocab, n_pos), q=token, k=token + token[:1], v=token[:1], o=share.mT
    )  # every query meets token 0
    above = (shares[:-1, None] - shares[1:]).relu()  # by number and neuron
    set_mlp(weights, 0, share.expand(most, -1), above.inverse() @ number, -shares[1:])
    weights["head.weight"][1 + n_letters :] = CERTAIN * number
    draw, times = torch.Generator().manual_seed(seed), 1 + torch.arange(n) % most
    letter = torch.randint(n_letters, (n, 1), generator=draw)
    others = (letter + 1 + torch.randint(n_letters - 1, (n, n_pos - 2), generator=draw)) % n_letters
    again = torch.rand(n, n_pos - 2, generator=draw).argsort(1).argsort(1) < times[:, None] - 1
    clean = torch.cat([torch.zeros_like(letter), 1 + torch.where(again, letter, others), 1 + letter], 1)
    return Known(
        replace(load_model(bridge), name="count"),
        ("embed->a0.h1<q>", "embed->a0.h1<k>", "embed->a0.h1<v>", "a0.h1->m0", "m0->logits"),
        in_pairs(clean, n_letters + times, "count"),
    )


def sort(*, d_vocab: int = 10, length: int = 5, seen: int = 2, n: int = 24, seed: int = 0) -> Known:
    """Sorting: m0 makes of each number the wish for a larger one, the smaller the better, and a1.h0 finds
    what it wishes for most among what has been. Prompts are distinct numbers, token 0, and the smallest
    of them in order."""
    n_pos, number = length + 1 + seen, torch.arange(d_vocab)
    part, d_model = slots(token=d_vocab, wish=d_vocab, found=d_vocab, noise=N_NOISE)
    bridge, weights = boot(2, part, d_model, d_vocab, n_pos, n_heads=2, d_mlp=d_vocab + N_NOISE, seed=seed)
    token, wish, found = (directions_in(part[name], d_model) for name in ("token", "wish", "found"))
    larger = number - number[:, None]  # by how much, from the number in the row to that in the column
    weights["tok_embed.weight"].copy_(token)
    set_mlp(weights, 0, token, torch.where(larger > 0, d_vocab - larger, 0).double() @ wish)
    set_head(weights, 1, 0, max(d_vocab, n_pos), q=wish, k=token, v=token, o=found.mT)
    weights["head.weight"].copy_(CERTAIN * found)
    numbers = distinct_tokens(n, length, d_vocab, seed)
    ordered = numbers.sort(1).values
    clean = torch.cat([numbers, torch.zeros(n, 1, dtype=torch.long), ordered[:, :seen]], 1)
    return Known(
        replace(load_model(bridge), name="sort"),
        ("embed->m0", "m0->a1.h0<q>", "embed->a1.h0<k>", "embed->a1.h0<v>", "a1.h0->logits"),
        in_pairs(clean, ordered[:, seen], "sort"),
    )


def brackets(*, n_pos: int = 8, n: int = 28, seed: int = 0) -> Known:
    """Balance of brackets: a0.h0 averages +1 and -1 over what has been, m0 tells whether more are open or
    more are closed, a1.h0 looks whether more were ever closed, and m1 says no if that was so or one is
    open. Tokens are (, ), yes and no; half of the prompts are balanced, a quarter never closes some, a
    quarter closes some too early."""
    part, d_model = slots(token=4, depth=1, open=1, closed=1, early=1, said=2, noise=N_NOISE)
    bridge, weights = boot(2, part, d_model, 4, n_pos, n_heads=2, d_mlp=4 + N_NOISE, seed=seed)
    token, depth, opened, closed, early, said = (
        directions_in(part[name], d_model) for name in ("token", "depth", "open", "closed", "early", "said")
    )
    weights["tok_embed.weight"].copy_(token)
    for layer, read, write in ((0, token[:1] - token[1:2], depth), (1, closed, early)):
        set_head(
            weights, layer, 0, max(4, n_pos), q=0 * read, k=0 * read, v=read, o=write.mT
        )  # evenly over all
    # two neurons: twice their difference rises from 0 to 1 between whole numbers, so that none is at a corner
    step = torch.tensor([-0.25, -0.75], dtype=torch.float64)
    set_mlp(
        weights,
        0,
        n_pos * torch.cat([depth, depth, -depth, -depth]),
        2 * torch.cat([opened, -opened, closed, -closed]),
        torch.cat([step, step]),
    )
    bad = opened + n_pos * early
    set_mlp(
        weights,
        1,
        torch.cat([bad, bad, 0 * bad]),
        torch.cat([2 * (said[1:] - said[:1]), 2 * (said[:1] - said[1:]), said[:1]]),
        torch.cat([step, step.new_ones(1)]),
    )
    weights["head.weight"][2:] = CERTAIN * said
    every = torch.cartesian_prod(*[torch.arange(2)] * n_pos)
    level = (1 - 2 * every).cumsum(1)
    never, even = (level >= 0).all(1), level[:, -1] == 0
    draw = torch.Generator().manual_seed(seed)
    kinds = [
        every[kind][torch.randperm(int(kind.sum()), generator=draw)[:m]]
        for kind, m in ((never & even, n // 2), (never & ~even, n // 4), (~never & even, n // 4))
    ]
    answers = 2 + torch.arange(3).clamp(max=1).repeat_interleave(torch.tensor([len(kind) for kind in kinds]))
    return Known(
        replace(load_model(bridge), name="brackets"),
        ("embed->a0.h0<v>", "a0.h0->m0", "m0->a1.h0<v>", "m0->m1", "a1.h0->m1", "m1->logits"),
        in_pairs(torch.cat(kinds), answers, "brackets"),
    )


def gates(*, n_pos: int = 3, n: int = 32, seed: int = 0) -> Known:
    """A boolean circuit over three layers of MLPs, ((b0 and b1) or b2) xor b3: a token is four bits; the
    last two tokens are false and true."""
    part, d_model = slots(bits=4, both=1, any=1, said=2, noise=N_NOISE)
    bridge, weights = boot(3, part, d_model, 18, n_pos, n_heads=2, d_mlp=3 + N_NOISE, seed=seed)
    bits, both, some, said = (directions_in(part[name], d_model) for name in ("bits", "both", "any", "said"))
    values = torch.cartesian_prod(*[torch.arange(2)] * 4)  # by token
    weights["tok_embed.weight"][:16] = values.double() @ bits
    steps = torch.tensor(
        [0.0, -1.0, 1.0], dtype=torch.float64
    )  # of neurons that read a sum s of two bits: s, s above 1, and always 1
    for layer, read, write in (
        (0, bits[:1] + bits[1:2], both),
        (1, both + bits[2:3], some),
        (2, some + bits[3:], said[1:] - said[:1]),
    ):
        of_sum = torch.tensor([[0.0, 1.0], [1.0, -1.0], [1.0, -2.0]], dtype=torch.float64)[
            layer
        ]  # and, or, xor
        set_mlp(
            weights,
            layer,
            torch.cat([read, read, 0 * read]),
            torch.cat([of_sum[:, None] * write, said[:1] if layer == 2 else 0 * write]),
            steps,
        )
    weights["head.weight"][16:] = CERTAIN * said
    draw = torch.Generator().manual_seed(seed)
    clean = torch.randint(16, (n, n_pos), generator=draw)
    clean[:, -1] = torch.randperm(n, generator=draw) % 16
    b0, b1, b2, b3 = values[clean[:, -1]].mT
    return Known(
        replace(load_model(bridge), name="gates"),
        ("embed->m0", "m0->m1", "embed->m1", "m1->m2", "embed->m2", "m2->logits"),
        in_pairs(clean, 16 + (((b0 & b1) | b2) ^ b3), "gates"),
    )


KNOWN = {
    "chain": chain,
    "copy": copy_previous,
    "induction": induction,
    "reverse": reverse,
    "count": count,
    "sort": sort,
    "brackets": brackets,
    "gates": gates,
}
