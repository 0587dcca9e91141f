"""Graphs compared: the tables of nbs/990_exp_compare.ipynb.

    make gemma       # Gemma 3 270M, whose terms of use apply; --no-gemma leaves it out
    make family      # for the largest of its models, which is left out where it is not there
    python scripts/exp_compare.py --held-out wikitext-2-test.txt

The graph of SmolLM2's heads on 2,048 tokens of documentation is compared with itself on other documentation,
on literature and on code, with permuted weights, with a model of shuffled weights, and with Gemma 3 270M.
Nodes are matched on the words of --held-out. Then graphs of features: transcoders of the MLPs of layers 8 to
11 from two seeds, and the first on other text. Writes nbs/results/compared.csv, a row for each pair, and
compared_features.csv. For Gemma and the largest of the family, compared_models.csv has the distances of a
graph of heads from that on other documentation, and from its copies with permuted weights.

A second run goes on after the rows and graphs that are there; --only names one table. CPU time on one core: 2
minutes a graph of heads, 5 for the transcoders of a seed, 2 for a graph of features, 2 minutes a comparison.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from circuitgraph.attribution.method import Attribution
from circuitgraph.build.build import build_feature_graph, build_graph
from circuitgraph.community.search import find_communities
from circuitgraph.compare.compare import Comparison, compare_graphs
from circuitgraph.compare.isomorphism import class_distance, permute_weights
from circuitgraph.cut import cut_model
from circuitgraph.data.corpus import load_corpus, read_corpus, register_mask
from circuitgraph.dictionary.protocol import Dictionary
from circuitgraph.dictionary.train import train_dictionaries
from circuitgraph.dictionary.trainer import TrainConfig
from circuitgraph.graph.graph import Graph
from circuitgraph.model.blocks import Model
from circuitgraph.model.loading import load_model
from circuitgraph.options import Pruning, Run
from exp_labels import keep_or_build
from exp_small_features import add_row, has_row
from exp_small_nulls import shuffle_weights

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path.home() / ".cache/circuitgraph/dictionaries"
MODULES = ["m8", "m9", "m10", "m11"]
# Folders of a model's graphs on two texts.
SAME = {"Gemma 3 270M": ("gemma", "gemma-other"), "4x192": ("4x192", "4x192-other")}
QUIET = Run(progress=False)
Pair = tuple[Model, Graph]


def draw_text(model: Model, register: str, seed: int, n: int = 16) -> torch.Tensor:
    "Sequences of 128 tokens of one register of the package's text."
    corpus = read_corpus("default", model, 60_000, seq_len=128, seed=seed)
    of_register = corpus.tokens[register_mask(corpus, register)[:, 0]]
    return of_register[:n]


def describe(pair: str, result: Comparison) -> pd.DataFrame:
    "A row of the table."
    nodes, edges = result.nodes, result.edges
    sure = nodes["p"] < 0.05
    row = {"pair": pair, "n_words": result.n_words, "n_matched": len(nodes), "n_sure": int(sure.sum())}
    row |= {"same_name": float((nodes["a"] == nodes["b"]).mean())}
    row |= {"correlation": nodes["correlation"].median(), "edges": edges["correlation"]}
    row |= {"edges_null": edges["null_mean"], "edges_z": edges["z"], "edges_p": edges["p"]}
    row |= {"distance": result.distance, "null_low": min(result.null_distances)}
    row |= {"null_high": max(result.null_distances)}
    if result.communities is not None:
        found = result.communities
        row |= {"n_communities": len(found), "n_communities_sure": int((found["p"] < 0.05).sum())}
        row |= {"communities": found["correlation"].median()}
    return pd.DataFrame([row]).round(4)


def compare_heads(args: argparse.Namespace, text: str) -> None:
    "Add the pairs of graphs of heads."
    model = load_model("smollm2-135m")

    def build(name: str, of: Model, register: str, seed: int) -> Graph:
        def make() -> Graph:
            return build_graph(of, draw_text(of, register, seed), nodes="head")

        graph = keep_or_build(args.folder / name, make)
        return find_communities(graph, "leiden", seed=0)

    own = build("own", model, "documentation", 0)
    pairs: dict[str, Callable[[], Pair]] = {
        "other documentation": lambda: (model, build("other", model, "documentation", 1)),
        "literature": lambda: (model, build("literature", model, "literature", 0)),
        "code": lambda: (model, build("code", model, "code", 0)),
        "weights permuted": lambda: (model, permute_weights(own, ("kind", "layer"))),
    }

    def add_shuffled() -> Pair:
        shuffled = shuffle_weights(0)
        return shuffled, build("shuffled", shuffled, "documentation", 0)

    def add_gemma() -> Pair:
        gemma = load_model("gemma3-270m")
        return gemma, build("gemma", gemma, "documentation", 0)

    pairs["shuffled weights"] = add_shuffled
    if not args.no_gemma:
        pairs["Gemma 3 270M"] = add_gemma
    for pair, open_pair in pairs.items():
        file = args.out / "compared.csv"
        if not has_row(file, pair=pair):
            other_model, other = open_pair()
            result = compare_graphs(own, other, text, models=(model, other_model), run=QUIET)
            add_row(file, describe(pair, result))
            print(pair, result, flush=True)


def train_seed(model: Model, seed: int) -> dict[str, Dictionary]:
    "Transcoders of four MLPs from one seed."
    text = load_corpus("default", model, 50_000, seq_len=128)
    config = TrainConfig(n_steps=600, transcode=True, seed=seed)
    end = f"-{seed}" if seed else ""
    return dict(
        train_dictionaries(model, text, MODULES, config, out=CACHE / f"smollm2-135m-transcoders{end}")
    )


def compare_features(args: argparse.Namespace, text: str) -> None:
    "Add the pairs of graphs of features."
    model = load_model("smollm2-135m")
    first, second = train_seed(model, 0), train_seed(model, 1)

    def build(name: str, dictionaries: dict[str, Dictionary], seed: int) -> Graph:
        def make() -> Graph:
            cut = cut_model(model, dictionaries)
            tokens = draw_text(model, "documentation", seed, n=8)
            return build_feature_graph(cut, tokens, Attribution(), Pruning(n_edges=30), Run())

        graph = keep_or_build(args.folder / name, make)
        return find_communities(graph, "leiden", seed=0, resolution=2.0)

    own = build("features", first, 0)
    pairs = {
        "other documentation": (first, lambda: build("features-other", first, 1)),
        "weights permuted": (first, lambda: permute_weights(own, ("kind", "layer"))),
        "other seed": (second, lambda: build("features-seed", second, 0)),
    }
    for pair, (dictionaries, make) in pairs.items():
        file = args.out / "compared_features.csv"
        if not has_row(file, pair=pair):
            options = {"dictionaries": (first, dictionaries), "models": (model, model)}
            result = compare_graphs(own, make(), text, run=QUIET, **options)
            add_row(file, describe(pair, result))
            print(pair, result, flush=True)


def compare_models(args: argparse.Namespace) -> None:
    "Add the distances within two more models."
    sources = {}
    if not args.no_gemma:
        sources["Gemma 3 270M"] = "gemma3-270m"
    largest = args.family / "4x192-0"
    if largest.exists():
        sources["4x192"] = str(largest)
    for title, source in sources.items():
        file = args.out / "compared_models.csv"
        if has_row(file, model=title):
            continue
        model = load_model(source)
        graphs = []
        for seed, name in enumerate(SAME[title]):
            text = draw_text(model, "documentation", seed)
            build = partial(build_graph, model, text, nodes="head")
            graphs.append(keep_or_build(args.folder / name, build))
        own, other = graphs
        row = {"model": title, "n_nodes": len(own.nodes), "n_edges": len(own)}
        row |= {"other_text": class_distance(own, other)}
        permuted = [permute_weights(own, ("kind", "layer"), seed=i) for i in range(5)]
        distances = [class_distance(own, one) for one in permuted]
        row |= {"permuted_least": min(distances), "permuted_most": max(distances)}
        add_row(file, pd.DataFrame([row]).round(4))
        print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--held-out", type=Path, required=True, help="a text file to match nodes on")
    parser.add_argument("--n-characters", type=int, default=40_000, help="of that text")
    parser.add_argument("--no-gemma", action="store_true", help="leave out the second model")
    parser.add_argument("--only", choices=["heads", "features", "models"], help="make one table alone")
    parser.add_argument("--family", type=Path, default=ROOT / "graphs/family", help="of `make family`")
    parser.add_argument("--folder", type=Path, default=ROOT / "graphs/compared")
    parser.add_argument("--out", type=Path, default=ROOT / "nbs/results")
    args = parser.parse_args()
    text = args.held_out.read_text(encoding="utf-8")[: args.n_characters]
    tables = {
        "heads": partial(compare_heads, args, text),
        "features": partial(compare_features, args, text),
        "models": partial(compare_models, args),
    }
    for name in tables if args.only is None else [args.only]:
        tables[name]()


if __name__ == "__main__":
    main()
