"""Edge and node ablation of the graph of features, beside that of whole layers.

    make graph                          # the dictionaries of layers 8 to 11, and the graph that is judged
    python scripts/exp_features.py      # writes nbs/results/faithfulness_features.csv

which nbs/91_exp_faithfulness.ipynb reads. Edges are ranked by their share of the reader's absolute incoming
weight, times how often the reader is active, so that a feature's activation, a module's share and a logit are
on one scale. Each setting is written when it is done, and a second run does what is missing."""

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from circuitgraph.ablation.judge import ablation_curve
from circuitgraph.ablation.values import Mean
from circuitgraph.attribution.method import Attribution
from circuitgraph.build.build import build_graph
from circuitgraph.community.links import share_weights
from circuitgraph.cut import list_parts, part_ports
from circuitgraph.data.corpus import load_corpus
from circuitgraph.dictionary.protocol import Dictionary
from circuitgraph.dictionary.store import load_dictionaries
from circuitgraph.graph.graph import Graph
from circuitgraph.model.blocks import Model
from circuitgraph.model.loading import load_model
from circuitgraph.options import Budgets, Judging, Run

ROOT = Path(__file__).resolve().parent.parent
QUIET = Judging(run=Run(progress=False))
BUDGETS = {
    "feature": (300, 1_000, 3_000, 10_000, 30_000, 100_000, 300_000),
    "layer": (10, 30, 100, 300, 1_000, 3_000),
}

LARGEST = {  # budget of features: minutes each beyond
    ("zero", "top"): 300_000,
    ("zero", "greedy"): 100_000,
    ("mean", "top"): 10_000,
    ("mean", "greedy"): 10_000,
}
VALUES = {"zero": "zero", "mean": Mean(n_apart=0)}


def rank_by_share(graph: Graph) -> Graph:
    "The same edges, weighed by their shares of what the reader reads, times how often it is active."
    share, sign = share_weights(graph), np.sign(graph.edges["weight"].to_numpy())
    return Graph(graph.nodes, graph.edges.assign(weight=sign * share, abs_weight=share), graph.meta)


def count_possible(model: Model, dictionaries: dict[str, Dictionary]) -> int:
    "Edges that the architecture allows between features, errors and whole modules."
    parts, nodes = list_parts(model, dictionaries)
    by_part = [part.n_nodes * part.n_before * len(part_ports(part, Attribution())) for part in parts]
    return len(nodes) - 1 + sum(by_part)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--graph", type=Path, default=ROOT / "graphs/smollm2-features")
    parser.add_argument(
        "--dictionaries",
        type=Path,
        default=Path.home() / ".cache/circuitgraph/dictionaries/smollm2-135m-layers-8-11",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "nbs/results/faithfulness_features.csv")
    parser.add_argument("--n-text", type=int, default=4, help="sequences of 64 tokens")
    args = parser.parse_args()
    if not args.graph.exists():
        parser.error(f"no graph at {args.graph}: run `make graph` first, or name one with --graph")
    torch.set_grad_enabled(False)
    model = load_model("smollm2-135m")
    dictionaries = load_dictionaries(args.dictionaries, model)
    text = load_corpus("default", model, args.n_text * 64, seq_len=64, seed=1)
    fine = rank_by_share(Graph.load(args.graph))
    coarse = rank_by_share(build_graph(model, load_corpus("default", model, 1024), "layer"))
    possible = {"layer": len(coarse), "feature": count_possible(model, dictionaries)}
    done = set()
    if args.out.exists():
        table = pd.read_csv(args.out)[["grain", "value", "method", "n_edges"]]
        done = set(table.itertuples(index=False, name=None))
    for (value, method), largest in LARGEST.items():
        for grain, graph, more in (("layer", coarse, {}), ("feature", fine, {"dictionaries": dictionaries})):
            whole = [len(graph)] if grain == "layer" else []
            largest = len(graph) if grain == "layer" else largest
            for n in [*(n for n in BUDGETS[grain] if n < len(graph) and n <= largest), *whole]:
                if (grain, value, method, n) in done:
                    continue
                start, budgets = time.time(), Budgets([n], method=method)
                curve = ablation_curve(
                    model, graph, text, budgets, value=VALUES[value], judging=QUIET, **more
                )
                setting = {"grain": grain, "value": value, "method": method, "n_possible": possible[grain]}
                curve = curve.assign(**setting, seconds=time.time() - start)
                curve.round(5).to_csv(args.out, mode="a", header=not args.out.exists(), index=False)
                shown = curve[["ablation", "n_kept", "n_nodes", "faithfulness", "seconds"]]
                print(grain, value, method, n, shown.to_dict("records"), flush=True)


if __name__ == "__main__":
    main()
