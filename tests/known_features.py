"""Models built by hand whose features are known, and the edges between them: dictionaries that hold just
these features, among heads and neurons that read everything and write noise, which falls to the error
nodes."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from circuitgraph.dictionary.protocol import Gate, LinearDictionary
from circuitgraph.graph.graph import Graph
from circuitgraph.graph.select import prune_dangling
from circuitgraph.model.blocks import Model
from circuitgraph.model.loading import load_model
from circuitgraph.data.task import Task
from known import CERTAIN, N_NOISE, boot, directions_in, part_of, set_head, set_mlp, slots

Edge = tuple[str, str, str]  # source, target, port


@dataclass(frozen=True, eq=False)
class KnownFeatures:
    """A model, dictionaries of its features, the edges that its behaviour rests on, and a text in which
    every next token is certain from position `skip_first` on."""

    model: Model
    dictionaries: dict[str, LinearDictionary]
    edges: frozenset[Edge]
    tokens: Tensor
    skip_first: int

    @property
    def task(self) -> Task:
        """Every token that is certain, by how far its logit is above the mean; a corrupted prompt is
        another one."""

        def metric(logits: Tensor) -> Tensor:
            logits, following = logits[:, self.skip_first : -1], self.tokens[:, self.skip_first + 1 :, None]
            return (logits.gather(-1, following)[..., 0] - logits.mean(-1)).mean(1)

        return Task(self.tokens, self.tokens.roll(1, 0), metric, name=self.model.name)

    def find(self, graph: Graph, share: float = 0.01) -> Graph:
        """Edges of at least a share of the largest weight, if they lead from an input to the logits.
        Largest means: among edges into readers of the same unit, since features count in activations,
        errors in norms, whole modules in shares of themselves and `logits` in logits."""
        kind = dict(zip(graph.nodes["name"], graph.nodes["kind"], strict=True))
        unit, size = graph.edges["target"].astype(str).map(kind), graph.edges["weight"].abs()
        return prune_dangling(graph.keep((size >= share * size.groupby(unit).transform("max")).to_numpy()))


def name_triples(graph: Graph) -> frozenset[Edge]:
    """The edges of a graph with the port of each."""
    return frozenset(
        zip(*(graph.edges[column].astype(str) for column in ("source", "target", "port")), strict=True)
    )


def exact_dictionary(module: str, directions: Tensor) -> LinearDictionary:
    """Features along unit directions `[feature d_model]`, active above one half: what others leak into them
    stays below it."""
    n, d_model = directions.shape
    return LinearDictionary(
        module,
        "output",
        directions.mT.contiguous(),
        directions,
        directions.new_zeros(n),
        directions.new_zeros(d_model),
        Gate("jumprelu", threshold=directions.new_full((n,), 0.5)),
    )


def superposed(n_pairs: int = 6) -> Tensor:
    """Twelve unit directions in nine dimensions `[pair 2 dimension]`. The sums of the pairs are orthogonal
    to each other and to all differences; the differences lie along the six axes of an icosahedron, so
    that features of two pairs overlap by 0.22."""
    golden = (1 + 5**0.5) / 2
    axes = torch.tensor(
        [[0, 1, golden], [0, 1, -golden], [1, golden, 0], [1, -golden, 0], [golden, 0, 1], [-golden, 0, 1]],
        dtype=torch.float64,
    )
    axes = axes / axes.norm(dim=1, keepdim=True)
    total, difference = (
        torch.cat([a, b], 1) / 2**0.5
        for a, b in (
            (torch.eye(n_pairs, dtype=torch.float64), 0 * axes),
            (0 * torch.eye(n_pairs, dtype=torch.float64), axes),
        )
    )
    return torch.stack([total + difference, total - difference], 1)


def logic(*, n_pairs: int = 6, n_pos: int = 4, seed: int = 0) -> KnownFeatures:
    """AND and OR of features in superposition. A token says which of the two features of one pair are there
    (3 k: the first, 3 k + 1: the second, 3 k + 2: both); m0 writes them, twelve features in nine
    dimensions, m1 the AND and OR of each pair. After one feature comes both of the next pair, after both
    the first of the next pair."""
    d_vocab, inner = 3 * n_pairs, superposed(n_pairs)
    part, d_model = slots(token=d_vocab, feature=inner.shape[2], found=2 * n_pairs, noise=N_NOISE)
    bridge, weights = boot(
        2, part, d_model, d_vocab, n_pos, n_heads=2, d_mlp=3 * n_pairs + N_NOISE, seed=seed
    )
    token, found = directions_in(part["token"], d_model), directions_in(part["found"], d_model)
    feature = directions_in(part["feature"], d_model, inner.flatten(0, 1))
    weights["tok_embed.weight"].copy_(token)
    has = torch.zeros(2 * n_pairs, d_vocab, dtype=torch.float64)  # which tokens have which features
    for k in range(n_pairs):
        has[2 * k, [3 * k, 3 * k + 2]] = has[2 * k + 1, [3 * k + 1, 3 * k + 2]] = 1
        both, first = (3 * (k + 1) + 2) % d_vocab, 3 * (k + 1) % d_vocab
        weights["head.weight"][both] += CERTAIN * (
            found[2 * k + 1] - found[2 * k]
        )  # OR says both of the next pair; AND says the first of it, and not both
        weights["head.weight"][first] += CERTAIN * found[2 * k]
    set_mlp(weights, 0, has @ token, feature)
    pair = feature.unflatten(0, (n_pairs, 2)).sum(1)
    ones = torch.ones(n_pairs, dtype=torch.float64)
    set_mlp(
        weights,
        1,
        torch.cat([pair, pair, pair]),
        torch.cat([found[0::2], 2 * found[1::2], -2 * found[1::2]]),
        torch.cat([-ones, -ones / 2, -ones]),
    )  # AND: s > 1; OR: 2 (s > 1/2) - 2 (s > 1)
    rows = [torch.arange(d_vocab)]
    for _ in range(n_pos - 1):
        rows.append((3 * (rows[-1] // 3 + 1) + torch.where(rows[-1] % 3 == 2, 0, 2)) % d_vocab)
    edges = (
        {("embed", f"m0/{f}", "mlp") for f in range(2 * n_pairs)}
        | {(f"m0/{f}", f"m1/{2 * (f // 2) + gate}", "mlp") for f in range(2 * n_pairs) for gate in (0, 1)}
        | {(f"m1/{f}", "logits", "logits") for f in range(2 * n_pairs)}
    )
    return KnownFeatures(
        replace(load_model(bridge), name="logic"),
        {"m0": exact_dictionary("m0", feature), "m1": exact_dictionary("m1", found)},
        frozenset(edges),
        torch.stack(rows, 1),
        0,
    )


def copied(*, d_vocab: int = 6, n_pos: int = 6, seed: int = 0) -> KnownFeatures:
    """m0 writes a feature for each token, head a1.h1 looks one position back and copies the feature that
    stood there. Texts alternate between two tokens."""
    part, d_model = slots(token=d_vocab, feature=d_vocab, found=d_vocab, position=n_pos, noise=N_NOISE)
    bridge, weights = boot(2, part, d_model, d_vocab, n_pos, n_heads=3, d_mlp=d_vocab + N_NOISE, seed=seed)
    token, feature, found = (directions_in(part[name], d_model) for name in ("token", "feature", "found"))
    weights["tok_embed.weight"].copy_(token)
    weights["pos.weight"][:, part["position"]] = torch.eye(n_pos, dtype=torch.float64)
    set_mlp(weights, 0, token, feature)
    set_head(
        weights,
        1,
        1,
        max(d_vocab, n_pos),
        q=part_of(part["position"], d_model, shift=-1),
        k=part_of(part["position"], d_model),
        v=feature,
        o=found.mT,
    )
    weights["head.weight"].copy_(CERTAIN * found)
    pairs = torch.combinations(torch.arange(d_vocab))
    tokens = torch.cat([pairs, pairs.flip(1)]).repeat(1, n_pos // 2)
    edges = (
        {("embed", f"m0/{f}", "mlp") for f in range(d_vocab)}
        | {(f"m0/{f}", f"a1/{f}", "v") for f in range(d_vocab)}
        | {("pos_embed", f"a1/{f}", port) for f in range(d_vocab) for port in "qk"}
        | {(f"a1/{f}", "logits", "logits") for f in range(d_vocab)}
    )
    return KnownFeatures(
        replace(load_model(bridge), name="copied"),
        {"m0": exact_dictionary("m0", feature), "a1": exact_dictionary("a1", found)},
        frozenset(edges),
        tokens,
        1,
    )


def renamed(*, d_vocab: int = 8, n_layers: int = 3, n_pos: int = 4, seed: int = 0) -> KnownFeatures:
    """A chain over three layers: m0 writes a feature for each token, and each later MLP writes, for each
    feature of the one before, another of its own. Together they lead once round all tokens."""
    part, d_model = slots(token=d_vocab, **{f"s{i}": d_vocab for i in range(n_layers)}, noise=N_NOISE)
    bridge, weights = boot(
        n_layers, part, d_model, d_vocab, n_pos, n_heads=2, d_mlp=d_vocab + N_NOISE, seed=seed
    )
    draw, before, at = (
        torch.Generator().manual_seed(seed),
        directions_in(part["token"], d_model),
        torch.arange(d_vocab),
    )
    weights["tok_embed.weight"].copy_(before)
    dictionaries, edges = {}, set()
    for i in range(n_layers):
        here, new = directions_in(part[f"s{i}"], d_model), torch.randperm(d_vocab, generator=draw)
        set_mlp(weights, i, before, here[new])  # feature f becomes new[f]
        dictionaries[f"m{i}"] = exact_dictionary(f"m{i}", here)
        edges |= {
            ("embed" if i == 0 else f"m{i - 1}/{f}", f"m{i}/{int(new[f])}", "mlp") for f in range(d_vocab)
        }
        before, at = here, new[at]
    weights["head.weight"][(torch.arange(d_vocab) + 1) % d_vocab] = (
        CERTAIN * before[at]
    )  # at: the last feature of each token
    edges |= {(f"m{n_layers - 1}/{f}", "logits", "logits") for f in range(d_vocab)}
    tokens = (torch.arange(d_vocab)[:, None] + torch.arange(n_pos)) % d_vocab
    return KnownFeatures(
        replace(load_model(bridge), name="renamed"), dictionaries, frozenset(edges), tokens, 0
    )


@dataclass(frozen=True, eq=False)
class KnownCircuits(KnownFeatures):
    """Two circuits in one model: the features of each, and the positions whose next token each makes
    certain."""

    circuits: dict[str, tuple[str, ...]]
    behaviours: dict[str, Tensor]


def two_circuits(*, n_pos: int = 9, n_rows: int = 30, scale: float = 5.0, seed: int = 0) -> KnownCircuits:
    """Copying and counting, side by side. Six letters have one of three shapes and one of two cases; texts
    of letters alternate between two, head a1.h1 copies shape and case of the letter before, and m2 puts
    them together. Texts of brackets begin with a token of their own and are at most two deep; head a1.h2
    looks at all positions alike and writes how deep a text is and how long (both divided by the length),
    and m2 compares them: at depth 0 an opening bracket must follow, at depth 2 a closing one, at depth 1
    either may. One edge is not among those named: a1/5->m2/7 keeps m2/7 ("must open") silent where the
    text is deep, and has no weight where m2/7 is active."""
    (start, opening, closing), d_vocab, letter = range(6, 9), 9, torch.arange(6)
    part, d_model = slots(token=d_vocab, feature=8, found=7, verdict=8, position=n_pos, noise=N_NOISE)
    bridge, weights = boot(3, part, d_model, d_vocab, n_pos, n_heads=3, d_mlp=12 + N_NOISE, seed=seed)
    token, feature, found, verdict = (
        directions_in(part[name], d_model) for name in ("token", "feature", "found", "verdict")
    )
    weights["tok_embed.weight"].copy_(token)
    weights["pos.weight"][:, part["position"]] = torch.eye(n_pos, dtype=torch.float64)
    has = torch.zeros(
        8, d_vocab, dtype=torch.float64
    )  # features of tokens: shape, case, and each bracket its own
    has[letter // 2, letter] = has[3 + letter % 2, letter] = has[[5, 6, 7], [start, opening, closing]] = 1
    set_mlp(weights, 0, has @ token, feature)
    d_head, nowhere = max(d_vocab, n_pos), torch.zeros(1, d_model, dtype=torch.float64)
    set_head(
        weights,
        1,
        1,
        d_head,
        q=part_of(part["position"], d_model, shift=-1),
        k=part_of(part["position"], d_model),
        v=feature[:5],
        o=found[:5].mT,
    )
    set_head(
        weights,
        1,
        2,
        d_head,
        q=nowhere,
        k=nowhere,
        v=scale * torch.stack([feature[6] - feature[7], feature[5]]),
        o=found[5:].mT,
    )
    both, (depth, length) = found[letter // 2] + found[3 + letter % 2], found[5:] * 2 * n_pos / scale
    full, empty = depth - 1.5 * length, 0.5 * length - depth  # where above zero, at least one
    set_mlp(
        weights,
        2,
        torch.cat([both, torch.stack([full, full, empty, empty])]),
        torch.cat([verdict[:6], torch.stack([verdict[6], -verdict[6], verdict[7], -verdict[7]])]),
        torch.tensor([-1.0] * 6 + [0, -1, 0, -1], dtype=torch.float64),
    )
    weights["head.weight"][torch.tensor([*range(6), closing, opening])] = CERTAIN * verdict
    pairs = torch.combinations(letter)
    letters = torch.cat([pairs, pairs.flip(1)]).repeat(1, n_pos // 2 + 1)[:, :n_pos]
    deep, draw = [torch.zeros(n_rows, dtype=torch.long)], torch.Generator().manual_seed(seed)
    for _ in range(1, n_pos):
        deep.append(torch.where(deep[-1] == 1, 2 * torch.randint(2, (n_rows,), generator=draw), 1))
    depths = torch.stack(deep, 1)
    brackets = torch.cat(
        [torch.full((n_rows, 1), start), torch.where(depths.diff(dim=1) > 0, opening, closing)], 1
    )
    copying, counting = (torch.zeros(len(letters) + n_rows, n_pos, dtype=torch.bool) for _ in range(2))
    copying[: len(letters), 1:-1], counting[len(letters) :, :-1] = True, depths[:, :-1] != 1
    name = lambda module, span: tuple(f"{module}/{i}" for i in span)  # noqa: E731
    circuits = {
        "copying": (*name("m0", range(5)), *name("a1", range(5)), *name("m2", range(6))),
        "counting": (*name("m0", (5, 6, 7)), *name("a1", (5, 6)), *name("m2", (6, 7))),
    }
    edges = (
        {("embed", f"m0/{i}", "mlp") for i in range(8)}
        | {(f"m0/{i}", f"a1/{i}", "v") for i in range(5)}
        | {("m0/5", "a1/6", "v"), ("m0/6", "a1/5", "v"), ("m0/7", "a1/5", "v")}
        | {("pos_embed", f"a1/{i}", port) for i in range(5) for port in "qk"}
    )
    edges |= (
        {(f"a1/{i}", f"m2/{j}", "mlp") for j in range(6) for i in (j // 2, 3 + j % 2)}
        | {("a1/5", "m2/6", "mlp"), ("a1/6", "m2/6", "mlp"), ("a1/6", "m2/7", "mlp")}
        | {(f"m2/{j}", "logits", "logits") for j in range(8)}
    )
    dictionaries = {
        module: exact_dictionary(module, rows)
        for module, rows in (("m0", feature), ("a1", found), ("m2", verdict))
    }
    return KnownCircuits(
        replace(load_model(bridge), name="copying and counting"),
        dictionaries,
        frozenset(edges),
        torch.cat([letters, brackets]),
        0,
        circuits,
        {"copying": copying, "counting": counting},
    )


KNOWN_FEATURES = {
    "AND and OR in superposition": logic,
    "copied from the previous position": copied,
    "renamed over three layers": renamed,
}
