"""Graphs of models of the same and of increasing size: the tables of nbs/991_exp_ladder.ipynb.

    make family
    python scripts/exp_ladder.py

Each graph of heads weighs 3,072 tokens that no model was trained on. Pairs of graphs climb a ladder, from a
copy of a model with its heads in another order, over other text, other seeds and other sizes, to a model that
has learned nothing. Writes to nbs/results:

- ladder.csv: a row for each pair, with the figures of `compare_graphs` and their nulls;
- ladder_behaviours.csv: a row for each pair, which says whether matched nodes do the same when they are cut;
- ladder_graphs.csv: a row for each trained model, which says how alike the nodes of its communities are;
- ladder_neurons.csv: a row for each pair of graphs of neurons, of which 1,024 tokens are weighed: their
  distance, whether matched communities do the same when they are cut, and what a joint search finds;
- ladder_communities.csv: a row for each pair of matched communities of neurons.

Pairs whose models are not there are left out. A second run goes on after the rows that are there. CPU time on
one core: 6 seconds a pair of graphs of heads of the two small sizes, with its graphs, and 15 of 4x128; 45
seconds a pair of graphs of neurons.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import combinations, pairwise, product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from circuitgraph.attribution.method import Attribution
from circuitgraph.build.build import build_feature_graph, build_graph
from circuitgraph.community.behaviour import ablation_losses, check_behaviours, class_behaviours
from circuitgraph.community.links import leave_out
from circuitgraph.community.patterns import compare_patterns, read_patterns
from circuitgraph.community.search import find_communities
from circuitgraph.compare.effects import compare_profiles, correlate_rows, count_verdicts, describe_sizes
from circuitgraph.compare.effects import form_strata, measure_cuts, profile_classes, remove_sizes
from circuitgraph.compare.isomorphism import class_distance, permute_weights, shuffle_within
from circuitgraph.compare.joint import JointCommunities, find_joint
from circuitgraph.compare.match import judge_match, match_communities, match_nodes
from circuitgraph.compare.match import read_words, split_passages, verify_edges
from circuitgraph.compare.quotients import inequitability, match_classes, quotient_distance
from circuitgraph.cut import cut_model
from circuitgraph.dictionary.places import neuron_basis
from circuitgraph.dictionary.protocol import Dictionary
from circuitgraph.graph.graph import Graph, end_codes
from circuitgraph.model.blocks import Model
from circuitgraph.model.loading import load_model
from circuitgraph.options import Pruning, Run
from exp_labels import keep_or_build
from exp_small_features import add_row, has_row
from make_family import D_HEAD, FOLDER, N_SEEDS, cut_sequences, encode, read_documents

ROOT = Path(__file__).resolve().parent.parent
QUIET = Run(progress=False)
N_NULL = 99
N_GRAPH, N_MATCH, N_CUT = 48, 96, 96  # sequences
N_NEURONS = 16  # sequences that a graph of neurons weighs
RESOLUTION = 2.0  # of communities of neurons
SHIFTS = 19  # of joint searches
WITHIN = ("kind", "layer")


# Text that no model was trained on


@dataclass(frozen=True)
class HeldOut:
    "Disjoint parts of the text, in tokens of the family."

    graphs: dict[str, Tensor]  # a half, the other half, and registers
    passages: list[str]  # of 20 words, to match nodes on
    tokens: Tensor  # to cut nodes on
    registers: list[str]  # of the sequences of `tokens`


def read_held_out(folder: Path) -> HeldOut:
    "Draw the parts."
    tokenizer = AutoTokenizer.from_pretrained(folder)
    _, documents = read_documents([])
    sequences, registers = [], []
    for document, tokens in zip(documents, encode(tokenizer, documents), strict=True):
        pieces = cut_sequences([tokens])
        sequences.append(pieces)
        registers += [document.register] * len(pieces)
    order = np.random.default_rng(0).permutation(len(registers))
    mixed = torch.cat(sequences)[torch.from_numpy(order)]
    register = np.array(registers)[order]
    ends = np.cumsum([N_GRAPH, N_GRAPH, N_MATCH, N_CUT])
    one, other, match, cut = (
        slice(end - n, end) for end, n in zip(ends, np.diff(ends, prepend=0), strict=True)
    )
    graphs = {"text": mixed[one], "other half": mixed[other]}
    rest = mixed[ends[-1] :]
    for name in ("code", "literature"):
        of_register = torch.from_numpy(register[ends[-1] :] == name)
        graphs[name] = rest[of_register][:N_GRAPH]
    text = "\n".join(tokenizer.batch_decode(mixed[match]))
    return HeldOut(graphs, split_passages(text, 20), mixed[cut], register[cut].tolist())


# Models and their graphs


def permute_heads(model: LlamaForCausalLM, seed: int) -> LlamaForCausalLM:
    "The same function, with the heads of each layer in another order."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            order = torch.randperm(model.config.num_attention_heads, generator=generator)
            rows = (order[:, None] * D_HEAD + torch.arange(D_HEAD)).flatten()
            for part in (attention.q_proj, attention.k_proj, attention.v_proj):
                part.weight.copy_(part.weight[rows].clone())
            attention.o_proj.weight.copy_(attention.o_proj.weight[:, rows].clone())
    return model


class Subject:
    "A model with its graphs, its activity on words and the effects of its nodes, each made once."

    def __init__(self, name: str, args: argparse.Namespace, held_out: HeldOut):
        self.name, self.folder, self.held_out = name, args.folder, held_out
        self.family = args.family
        self.grouped: dict[str, Graph] = {}
        self.cuts: dict[bytes, np.ndarray] = {}

    @cached_property
    def model(self) -> Model:
        stem, _, change = self.name.partition("+")
        folder = self.family / stem
        if not change:
            return load_model(folder)
        permuted = permute_heads(LlamaForCausalLM.from_pretrained(folder), seed=0)
        return load_model(permuted, tokenizer=AutoTokenizer.from_pretrained(folder))

    def graph(self, text: str = "text") -> Graph:
        "The graph of heads over a part of the text, with communities."
        folder = self.folder / f"{self.name}-{text.replace(' ', '-')}"
        tokens = self.held_out.graphs[text]
        made = keep_or_build(folder, lambda: build_graph(self.model, tokens, nodes="head", run=QUIET))
        return find_communities(made, "leiden", seed=0)

    @cached_property
    def words(self):
        "Activity of nodes on words."
        return read_words(self.model, self.graph(), self.held_out.passages, run=QUIET)

    @cached_property
    def neurons(self) -> dict[str, Dictionary]:
        "The neurons of all MLPs, as dictionaries."
        modules = [f"m{layer}" for layer in range(self.model.n_layers)]
        return {module: neuron_basis(self.model, module) for module in modules}

    def neuron_graph(self, text: str = "text") -> Graph:
        "The graph of neurons over a part of the text, with communities of neurons that are active together."
        if text not in self.grouped:
            graph, tokens = self.weigh_neurons(text), self.held_out.graphs[text]
            activity = read_patterns(self.model, graph, tokens, self.neurons, run=QUIET)
            similarity = compare_patterns(abs(activity), "correlation", least=0.2)
            options = {"similarity": similarity, "resolution": RESOLUTION, "seed": 0}
            self.grouped[text] = find_communities(graph, "activation", **options)
        return self.grouped[text]

    def weigh_neurons(self, text: str) -> Graph:
        "The edges between neurons."

        def build() -> Graph:
            cut = cut_model(self.model, self.neurons)
            tokens = self.held_out.graphs[text][:N_NEURONS]
            return build_feature_graph(cut, tokens, Attribution("gradient"), Pruning(n_edges=30), QUIET)

        made = keep_or_build(self.folder / f"{self.name}-neurons-{text.replace(' ', '-')}", build)
        others = sorted(set(made.nodes["kind"]) - {"feature"})
        return leave_out(made, others)

    @cached_property
    def neuron_words(self):
        "How strongly neurons are active on words; their signs say nothing, since training can swap them."
        words = read_words(self.model, self.neuron_graph(), self.held_out.passages, self.neurons, run=QUIET)
        return abs(words).astype(np.float32)

    def cut_communities(self, graph: Graph) -> np.ndarray:
        "How much each behaviour's loss rises when a community of neurons is cut, [community behaviour]."
        classes = graph.nodes["community"].to_numpy(dtype=int)
        key = classes.tobytes()
        if key not in self.cuts:
            self.cuts[key] = self.cut_classes(graph, classes)
        return self.cuts[key]

    def cut_classes(self, graph: Graph, classes: np.ndarray) -> np.ndarray:
        "How much each behaviour's loss rises when the neurons of a class are cut, [class behaviour]."
        names = graph.nodes["name"].to_numpy()
        sets = [names[classes == number].tolist() for number in range(classes.max() + 1)]
        run = Run(batch_size=32, progress=False)
        rise = measure_cuts(self.model, self.held_out.tokens, sets, self.neurons, run=run)
        return self.average_behaviours(rise)

    def average_behaviours(self, rise: np.ndarray) -> np.ndarray:
        "The mean rise of the loss at the positions of each behaviour."
        text = self.held_out.tokens
        masks = check_behaviours(list_behaviours(self.model, self.held_out), text, skip_first=1)
        counted = masks.reshape(len(masks), -1).astype(float)
        flat = np.nan_to_num(rise.reshape(len(rise), -1))
        return flat @ counted.T / counted.sum(1)

    @cached_property
    def effects(self) -> np.ndarray:
        "How much each behaviour's loss rises when all edges of a node are cut, [node behaviour]."
        graph = self.graph()
        source, target = end_codes(graph)
        node = np.arange(len(graph.nodes))[:, None]
        touches = (source == node) | (target == node)
        rise = ablation_losses(self.model, graph, self.held_out.tokens, touches, run=QUIET)
        return self.average_behaviours(rise)


# Behaviours


def list_behaviours(model: Model, held_out: HeldOut) -> dict[str, Tensor]:
    "Positions by what the next token is; they are the same for all models, and no match has seen them."
    tokens = held_out.tokens
    classes = class_behaviours(model, tokens)
    found = dict(classes)
    for name in sorted(set(held_out.registers)):
        rows = torch.tensor([register == name for register in held_out.registers])[:, None]
        of_register = rows.expand_as(tokens)
        found[name] = of_register
        found |= {f"{kind} in {name}": mask & of_register for kind, mask in classes.items()}
    following = torch.roll(tokens, -1, dims=1)
    count = torch.bincount(tokens.flatten())[following]
    bounds = torch.quantile(count.float(), torch.linspace(0, 1, 9)[1:-1])
    octile = torch.bucketize(count.float(), bounds)
    found |= {f"frequency {i}": octile == i for i in range(8)}
    position = torch.arange(tokens.shape[1]).expand_as(tokens) * 4 // tokens.shape[1]
    found |= {f"position {i}": position == i for i in range(4)}
    is_seen = seen_before(tokens)
    found |= {"seen before": is_seen, "new": ~is_seen, "seen after this token": follows_again(tokens)}
    return {name: mask for name, mask in found.items() if mask[:, 1:-1].sum() >= 20}


def seen_before(tokens: Tensor) -> Tensor:
    "Whether the next token has occurred in the sequence."
    following = torch.roll(tokens, -1, dims=1)
    same = following[:, :, None] == tokens[:, None, :]
    return (same & torch.ones_like(same[0]).tril()).any(-1)


def follows_again(tokens: Tensor) -> Tensor:
    "Whether the next token has followed the current one before."
    following = torch.roll(tokens, -1, dims=1)
    same = (tokens[:, :, None] == tokens[:, None, :]) & (following[:, :, None] == following[:, None, :])
    return (same & torch.ones_like(same[0]).tril(-1)).any(-1)


# The rungs


Side = tuple[Subject, Graph]


@dataclass(frozen=True)
class Pair:
    "Two graphs that are compared."

    rung: str
    size: str
    a: str
    b: str
    text: str = "text"  # of the second graph
    seed: int | None = None  # with which the weights of the second graph are permuted


def open_pair(pair: Pair, subject: Callable[[str], Subject]) -> tuple[Side, Side]:
    "The models and graphs of a pair."
    one, other = subject(pair.a), subject(pair.b)
    graph = other.graph(pair.text)
    if pair.seed is not None:
        permuted = permute_weights(graph, WITHIN, seed=pair.seed)
        graph = find_communities(permuted, "leiden", seed=0)
    return (one, one.graph()), (other, graph)


def list_within(size: str) -> Iterator[Pair]:
    "The pairs of one size, rung by rung."
    names = [f"{size}-{seed}" for seed in range(N_SEEDS[size])]
    for i, name in enumerate(names):
        after = names[(i + 1) % len(names)]
        yield Pair("heads in another order", size, name, f"{name}+permuted")
        for text in ("other half", "code", "literature"):
            yield Pair(text, size, name, name, text)
        yield Pair("shuffled text", size, name, f"{size}-shuffled")
        yield Pair("own start", size, name, f"{name}-untrained")
        yield Pair("untrained", size, name, f"{after}-untrained")
        yield Pair("weights permuted", size, name, name, seed=i)
    for name, other in combinations(names, 2):
        yield Pair("other seed", size, name, other)


def list_pairs(family: Path) -> Iterator[Pair]:
    "All pairs of models that are there."
    sizes = list(N_SEEDS)
    pairs = [pair for size in sizes for pair in list_within(size)]
    for small, large in pairwise(sizes):
        for i, j in product(range(N_SEEDS[small]), range(N_SEEDS[large])):
            pairs.append(Pair("other size", f"{small} to {large}", f"{small}-{i}", f"{large}-{j}"))
    for pair in pairs:
        names = [name.removesuffix("+permuted") for name in (pair.a, pair.b)]
        if all((family / name).exists() for name in names):
            yield pair


# Figures, each beside its null


def beside(name: str, found: float, null: np.ndarray, is_small_better: bool = False) -> dict[str, float]:
    "A figure, the mean of its null, z and p."
    sign = -1 if is_small_better else 1
    n_beyond = int((sign * null >= sign * found).sum())
    sd = null.std()
    z = (found - null.mean()) / sd if sd > 1e-9 else float("nan")
    return {
        name: found,
        f"{name}_null": float(null.mean()),
        f"{name}_z": float(z),
        f"{name}_p": (n_beyond + 1) / (len(null) + 1),
    }


def compare_nodes(a: Side, b: Side) -> tuple[dict[str, float], pd.DataFrame]:
    "Figures of matched nodes, and the match."
    (one, graph), (other, other_graph) = a, b
    activity = one.words, other.words
    matches = match_nodes(graph, other_graph, activity, n_null=20)
    judged = judge_match(graph, other_graph, activity, n_null=N_NULL)
    row = {"n_nodes": len(graph.nodes), "n_matched": len(matches), "sure": (matches["p"] < 0.05).mean()}
    for name, found in (("nodes", judged.loc["all nodes"]), ("layer", judged.loc["best layer"])):
        row |= {name: found["correlation"], f"{name}_null": found["null_mean"]}
        row |= {f"{name}_z": found["z"], f"{name}_p": found["p"]}
    return row, matches


def compare_edges(a: Side, b: Side, matches: pd.DataFrame) -> dict[str, float]:
    "Whether edges between matched nodes agree, under both nulls."
    row = {}
    for null in ("match", "weights"):
        found = verify_edges(a[1], b[1], matches, null=null, n_null=N_NULL)
        row["edges"] = found["correlation"]
        row |= {f"edges_{null}_{key}": found[key] for key in ("null_mean", "z", "p")}
    return row


def compare_distance(a: Side, b: Side) -> dict[str, float]:
    "The distance of few and of many classes; the null permutes the second graph's weights between layers."
    n_nodes = min(len(a[1].nodes), len(b[1].nodes))
    permuted = [permute_weights(b[1], WITHIN, seed=100 + i) for i in range(N_NULL // 3)]
    row = {}
    for name, n_classes in (("coarse", n_nodes // 3), ("fine", 2 * n_nodes // 3)):
        measure = partial(class_distance, a[1], n_classes=min(40, n_classes))
        null = np.array([measure(one) for one in permuted])
        row |= {f"n_{name}": min(40, n_classes)}
        row |= beside(f"distance_{name}", measure(b[1]), null, is_small_better=True)
    return row


def compare_communities(a: Side, b: Side) -> dict[str, float]:
    "Matched communities, and the distance of their quotient graphs."
    (one, graph), (other, other_graph) = a, b
    matches = match_communities(graph, other_graph, (one.words, other.words), n_null=N_NULL)
    own, others = (g.nodes["community"].to_numpy() for g in (graph, other_graph))
    classes = match_classes(own, others, matches)
    null = []
    for i in range(N_NULL // 3):
        moved = permute_weights(other_graph, WITHIN, seed=100 + i)
        null.append(quotient_distance(graph, moved, classes))
    row = {"n_communities": len(matches), "communities": matches["correlation"].median()}
    row |= {"communities_sure": (matches["p"] < 0.05).mean()}
    quotient = quotient_distance(graph, other_graph, classes)
    return row | beside("quotient", quotient, np.array(null), is_small_better=True)


def describe_graph(graph: Graph) -> dict[str, float]:
    "How inequitable communities are, and kind and depth; the null draws classes of the same sizes."
    nodes = graph.nodes
    kind_and_depth = nodes["kind"].astype(str) + nodes["layer"].astype(str)
    row = {"n_nodes": len(nodes), "n_edges": len(graph)}
    for name, classes in (("communities", nodes["community"]), ("depth", pd.factorize(kind_and_depth)[0])):
        found = np.asarray(classes)
        draws = [np.random.default_rng(i).permutation(found) for i in range(N_NULL)]
        drawn = np.array([inequitability(graph, one) for one in draws])
        row |= {f"n_{name}": len(set(found))}
        row |= beside(name, inequitability(graph, found), drawn, is_small_better=True)
    return row


def compare_effects(a: Side, b: Side, matches: pd.DataFrame) -> dict[str, float]:
    "The correlation of what matched nodes do; the nulls permute the match within kinds, and within layers."
    (one, graph), (other, other_graph) = a, b
    rows = pd.Index(graph.nodes["name"]).get_indexer(matches["a"])
    columns = pd.Index(other_graph.nodes["name"]).get_indexer(matches["b"])
    kind = pd.factorize(matches["kind"].astype(str))[0]
    own, others = centre(one.effects[rows], kind), centre(other.effects[columns], kind)
    layer = graph.nodes["layer"].fillna(-1).to_numpy(dtype=int)[rows]
    alike = correlate_rows(own, others)
    row = {"n_behaviours": own.shape[1]}
    for name, group in (("kind", kind), ("layer", kind * (layer.max() + 2) + layer + 1)):
        is_compared = np.bincount(group)[group] > 1  # a node alone in its group can't be permuted
        x, group = np.flatnonzero(is_compared), group[is_compared]
        orders = [x[shuffle_within(group, seed)] for seed in range(1000)]
        null = np.array([np.median(alike[x, order]) for order in orders])
        found = float(np.median(alike[x, x]))
        row |= {f"n_{name}": len(x)} | beside(f"effects_{name}", found, null)
    return row


def centre(effects: np.ndarray, kind: np.ndarray) -> np.ndarray:
    "Effects without what the nodes of a kind have in common."
    table = pd.DataFrame(effects)
    return (table - table.groupby(kind).transform("mean")).to_numpy()


# Graphs of neurons

OF_NEURONS = ("other half", "other seed", "other size", "shuffled text", "untrained", "weights permuted")


def open_neurons(pair: Pair, subject: Callable[[str], Subject]) -> tuple[Side, Side]:
    "The models and graphs of neurons of a pair."
    one, other = subject(pair.a), subject(pair.b)
    graph = other.neuron_graph(pair.text)
    if pair.seed is not None:
        graph = permute_weights(graph, WITHIN, seed=pair.seed)
    return (one, one.neuron_graph()), (other, graph)


def match_sure(a: Side, b: Side) -> tuple[dict[str, float], pd.DataFrame]:
    "Figures of matched communities, and the matches that shifted words hardly reach."
    (one, graph), (other, other_graph) = a, b
    activity = one.neuron_words, other.neuron_words
    matches = match_communities(graph, other_graph, activity, n_null=N_NULL)
    sure = matches[matches["p"] < 0.05].reset_index(drop=True)
    row = {"n_neurons": int((graph.nodes["kind"] == "feature").sum()), "n_matched": len(matches)}
    row |= {"n_sure": len(sure), "communities": matches["correlation"].median()}
    return row, sure


def compare_behaviour(a: Side, b: Side, sure: pd.DataFrame) -> tuple[dict[str, float], pd.DataFrame]:
    "Whether matched communities do the same and are alike in structure, and a row for each of them."
    graphs = a[1], b[1]
    numbers = [graph.nodes["community"].to_numpy(dtype=int) for graph in graphs]
    places = [sure[end].to_numpy() for end in "ab"]
    classes = match_classes(*numbers, sure)
    n_classes = int(max(classes[0].max(), classes[1].max())) + 1
    effects, structure, sizes = [], [], []
    for (subject, graph), number, place, renamed in zip((a, b), numbers, places, classes, strict=True):
        size = describe_sizes(graph, number)
        effects.append(remove_sizes(subject.cut_communities(graph), size)[place])
        structure.append(profile_classes(graph, renamed, n_classes)[: len(sure)])
        sizes.append(size[place])
    stratum = form_strata(sizes[1])
    same, does = compare_profiles(*effects, stratum)
    alike, looks = compare_profiles(*structure, stratum)
    row = {"n_behaviours": effects[0].shape[1]}
    for name, found in (("effects", does), ("structure", looks)):
        row |= {name: found["correlation"], f"{name}_null": found["null_mean"]}
        row |= {f"{name}_z": found["z"], f"{name}_p": found["p"]}
    table = sure.assign(effects=same["similarity"], effects_p=same["p"])
    table = table.assign(structure=alike["similarity"], structure_p=alike["p"])
    return row | count_verdicts(alike, same), table


def search_jointly(a: Side, b: Side, is_shuffled: bool = False) -> tuple[dict[str, float], JointCommunities]:
    "What a joint search finds; of the second model the words may be shuffled."
    words = b[0].neuron_words
    if is_shuffled:
        words = words[np.random.default_rng(0).permutation(words.shape[0])]
    found = find_joint(a[0].neuron_words, words, n_null=SHIFTS)
    sure = found.mixed[found.mixed["p"] <= 0.05]
    row = {"n_mixed": len(found.mixed), "n_mixed_sure": len(sure)}
    row |= {"in_mixed": sure[["n_a", "n_b"]].to_numpy().sum() / sum(map(len, found.member))}
    return row | {"mixed": sure["score"].median(), "mixed_null": found.null_scores.max()}, found


def compare_mixed(a: Side, b: Side, found: JointCommunities) -> dict[str, float]:
    "Whether the two parts of sure mixed communities do the same."
    sure = found.mixed.loc[found.mixed["p"] <= 0.05, "community"].to_numpy()
    if len(sure) < 4:
        return {}
    number = pd.Series(np.arange(len(sure)), index=sure)
    effects, sizes = [], []
    for (subject, graph), member in zip((a, b), found.member, strict=True):
        classes = number.reindex(member).fillna(-1).to_numpy(dtype=int)
        size = describe_sizes(graph, classes)
        effects.append(remove_sizes(subject.cut_classes(graph, classes), size))
        sizes.append(size)
    does = compare_profiles(*effects, form_strata(sizes[1]))[1]
    keys = {"mixed_effects": "correlation", "mixed_effects_null": "null_mean", "mixed_effects_p": "p"}
    return {name: does[key] for name, key in keys.items()}


def add_neurons(pair: Pair, subject: Callable[[str], Subject], out: Path) -> None:
    "A row of a pair of graphs of neurons, and a row for each matched community, unless they are there."
    key = {"rung": pair.rung, "size": pair.size, "a": pair.a, "b": pair.b}
    files = out / "ladder_neurons.csv", out / "ladder_communities.csv"
    if has_row(files[0], **key):
        return
    a, b = open_neurons(pair, subject)
    row = {"distance": class_distance(a[1], b[1])}
    if pair.seed is None:
        matched, sure = match_sure(a, b)
        row |= matched
        if len(sure) > 1:
            compared, table = compare_behaviour(a, b, sure)
            row |= compared
            renamed = table.rename(columns={"a": "community_a", "b": "community_b"})
            add_row(files[1], renamed.assign(**key)[[*key, *renamed]].round(4))
    if pair.a != pair.b:  # a model's activity is its own
        searched, found = search_jointly(a, b)
        row |= searched | compare_mixed(a, b, found)
    add_row(files[0], pd.DataFrame([key | row]).round(4))
    print("neurons:", *key.values(), flush=True)


def add_shuffled(name: str, subject: Callable[[str], Subject], out: Path) -> None:
    "A row for a model and its own words in random order, of which only the joint search is told."
    file, key = out / "ladder_neurons.csv", {"rung": "shuffled words", "a": name, "b": name}
    if not has_row(file, **key):
        one = subject(name)
        side = one, one.neuron_graph()
        row = {"size": name.partition("-")[0]} | search_jointly(side, side, is_shuffled=True)[0]
        add_row(file, pd.DataFrame([key | row]).round(4))


# The tables


def add_pair(pair: Pair, subject: Callable[[str], Subject], out: Path) -> None:
    "A row of each table, unless it is there."
    key = {"rung": pair.rung, "size": pair.size, "a": pair.a, "b": pair.b}
    files = out / "ladder.csv", out / "ladder_behaviours.csv"
    missing = [file for file in files if not has_row(file, **key)]
    if not missing:
        return
    a, b = open_pair(pair, subject)
    row, matches = compare_nodes(a, b)
    if files[0] in missing:
        row |= compare_edges(a, b, matches) | compare_distance(a, b) | compare_communities(a, b)
        add_row(files[0], pd.DataFrame([key | row]).round(4))
    if files[1] in missing:
        effects = compare_effects(a, b, matches)
        add_row(files[1], pd.DataFrame([key | effects]).round(4))
    print(*key.values(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", type=Path, default=FOLDER, help="the models of `make family`")
    parser.add_argument("--folder", type=Path, default=ROOT / "graphs/ladder")
    parser.add_argument("--out", type=Path, default=ROOT / "nbs/results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pairs = list(list_pairs(args.family))
    if not pairs:
        raise SystemExit(f"{args.family} holds no models: make family trains them")
    held_out = read_held_out(args.family / pairs[0].a)
    subjects: dict[str, Subject] = {}

    def subject(name: str) -> Subject:
        return subjects.setdefault(name, Subject(name, args, held_out))

    for pair in pairs:
        file = args.out / "ladder_graphs.csv"
        if not has_row(file, name=pair.a):
            row = {"name": pair.a} | describe_graph(subject(pair.a).graph())
            add_row(file, pd.DataFrame([row]).round(4))
        add_pair(pair, subject, args.out)
        if pair.rung in OF_NEURONS:
            add_neurons(pair, subject, args.out)
            add_shuffled(pair.a, subject, args.out)


if __name__ == "__main__":
    main()
