"""Edge and node ablation of the graph of features, beside that of whole layers: the numbers at the feature grain of nbs/20_exp_faithfulness.ipynb.

    make graph                          # the dictionaries of layers 8 to 11, and the graph that is judged
    python scripts/exp_features.py      # writes nbs/results/faithfulness_features.csv

Edges are ranked by the share of the reader's absolute incoming weight that they hold, times how often the reader is active, so that a feature's activation, a module's share and a logit are on one scale. Each setting is written when it is done; a second run does what is missing."""

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from circuitgraph.ablate import ablation_curve
from circuitgraph.attribution import Rule
from circuitgraph.build import build_graph
from circuitgraph.community import share_weights
from circuitgraph.data import load_corpus
from circuitgraph.dictionary import Dictionary, load_dictionaries
from circuitgraph.feature_edges import cut_model, part_ports
from circuitgraph.graph import Graph, load_graph
from circuitgraph.model import Model, load_model

ROOT = Path(__file__).resolve().parent.parent
BUDGETS = {"feature": (300, 1_000, 3_000, 10_000, 30_000, 100_000, 300_000), "layer": (10, 30, 100, 300, 1_000, 3_000)}

LARGEST = {("zero", "top"): 300_000, ("zero", "greedy"): 100_000, ("mean", "top"): 10_000, ("mean", "greedy"): 10_000}  # budget of features: minutes each beyond


def rank_by_share(graph: Graph) -> Graph:
    "The same edges, each weighed by its share of what its reader reads, times how often the reader is active."
    share = share_weights(graph)
    return Graph(graph.nodes, graph.edges.assign(weight=np.sign(graph.edges["weight"].to_numpy()) * share, abs_weight=share), graph.meta)


def count_possible(model: Model, dictionaries: dict[str, Dictionary]) -> int:
    "Edges that the architecture allows between features, errors and whole modules."
    parts, nodes = cut_model(model, dictionaries)
    return len(nodes) - 1 + sum(part.n_nodes * part.n_before * len(part_ports(part, Rule())) for part in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graph", type=Path, default=ROOT / "graphs/smollm2-features")
    parser.add_argument("--dictionaries", type=Path, default=Path.home() / ".cache/circuitgraph/dictionaries/smollm2-135m-layers-8-11")
    parser.add_argument("--out", type=Path, default=ROOT / "nbs/results/faithfulness_features.csv")
    parser.add_argument("--n-text", type=int, default=4, help="sequences of 64 tokens")
    args = parser.parse_args()
    if not args.graph.exists(): parser.error(f"no graph at {args.graph}: run `make graph` first, or name one with --graph")
    torch.set_grad_enabled(False)
    model = load_model("smollm2-135m")
    dictionaries, text = load_dictionaries(args.dictionaries, model), load_corpus("default", model, args.n_text * 64, seq_len=64, seed=1)
    fine = rank_by_share(load_graph(args.graph))
    coarse = rank_by_share(build_graph(model, load_corpus("default", model, 1024), "layer"))
    possible = {"layer": len(coarse), "feature": count_possible(model, dictionaries)}
    done = set(map(tuple, pd.read_csv(args.out)[["grain", "value", "method", "n_edges"]].to_numpy())) if args.out.exists() else set()
    for value, method in (("zero", "top"), ("zero", "greedy"), ("mean", "top"), ("mean", "greedy")):
        for grain, graph in (("layer", coarse), ("feature", fine)):
            for n in (*[n for n in BUDGETS[grain] if n < len(graph) and (grain == "layer" or n <= LARGEST[value, method])], *([len(graph)] if grain == "layer" else [])):
                if (grain, value, method, n) in done: continue
                start = time.time()
                curve = ablation_curve(model, graph, text, [n], value=value, method=method, progress=False, **({"dictionaries": dictionaries} if grain == "feature" else {}))
                curve.assign(grain=grain, value=value, method=method, n_possible=possible[grain], seconds=time.time() - start).round(5).to_csv(args.out, mode="a", header=not args.out.exists(), index=False)
                print(grain, value, method, n, curve[["ablation", "n_kept", "n_nodes", "faithfulness"]].to_dict("records"), f"{time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
