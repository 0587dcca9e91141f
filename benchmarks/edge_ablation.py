"""What judging a graph edge by edge costs, against a plain forward pass over the same tokens, in one run on one machine.

    python benchmarks/edge_ablation.py            # prints a table and writes benchmarks/edge_ablation.csv

A ratio is of CPU time. The plain pass is the model's own, to logits. Each measurement runs once to warm up and is then the best of three; the graphs are chosen by random weights, greedily, so that edges of all layers are kept.
"Values at hand" leaves out the run that gives the ablated values, which all graphs on the same text share; zero needs none.
"""

import argparse
import datetime
import platform
import resource
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from module_graph import best

from circuitgraph.ablate import ablation_curve, list_budgets, mask_edges, run_ablated, run_masks, set_ablation
from circuitgraph.build import complete_graph
from circuitgraph.data import load_corpus
from circuitgraph.graph import Graph, select_edges
from circuitgraph.model import load_model, run_logits


def random_graph(graph: Graph) -> Graph:
    draw = torch.rand(len(graph), generator=torch.Generator().manual_seed(0)).numpy()
    return Graph(graph.nodes, graph.edges.assign(weight=draw), graph.meta)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-tokens", type=int, default=512, help="tokens in the one batch")
    parser.add_argument("--seq-len", type=int, default=128)
    args = parser.parse_args()
    model = load_model("smollm2-135m")
    tokens = load_corpus("default", model, args.n_tokens, seq_len=args.seq_len)
    rows, options = {}, {"batch_size": len(tokens)}

    def measure(name: str, n_edges: int | None, run: Callable[[], object]) -> None:
        seconds = best(run, 3)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        rows[name] = {"edges kept": n_edges, "CPU seconds": round(seconds, 2), "peak memory so far, MB": round(peak)}
        print(name, rows[name], flush=True)

    measure("plain forward", None, lambda: model(tokens))
    for grain in ("block", "layer", "head"):
        graph = random_graph(complete_graph(model, grain))
        half = select_edges(graph, len(graph) // 2, "greedy")
        measure(f"{grain} grain, zero", len(half), lambda g=half: run_ablated(model, g, tokens, value="zero", **options))
    for n in (len(graph), len(graph) // 10, len(graph) // 100):
        small = select_edges(graph, n, "greedy")
        measure(f"head grain, zero, {n:,} edges", len(small), lambda g=small: run_ablated(model, g, tokens, value="zero", **options))
    for value in ("mean", "resample"):
        values = set_ablation(model, "head", tokens, value, **options)
        if values.other is None: measure(f"head grain, {value}, values at hand", len(half), lambda v=values: run_logits(model, next(run_masks(model, "head", [mask_edges(model, half)], tokens, v))))
        measure(f"head grain, {value}", len(half), lambda v=value: run_ablated(model, half, tokens, value=v, **options))
    budgets = list_budgets(graph)
    measure(f"head grain, mean, curve of {len(budgets)} budgets", None, lambda: ablation_curve(model, graph, tokens, ablation="edge", progress=False, **options))
    table = pd.DataFrame(rows).T
    table.insert(2, "ratio to plain forward", (table["CPU seconds"] / table.loc["plain forward", "CPU seconds"]).round(2))
    table.insert(3, "ratio to values at hand", (table["CPU seconds"] / table.loc["head grain, mean, values at hand", "CPU seconds"]).round(2))
    table["batch"] = f"{tokens.shape[0]} x {tokens.shape[1]}"
    table["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {datetime.date.today()}"
    path = Path(__file__).with_suffix(".csv")
    table.to_csv(path)
    print(table.drop(columns="machine").to_string(), f"\n{table['machine'].iloc[0]}\nwrote {path.name}")


if __name__ == "__main__":
    main()
