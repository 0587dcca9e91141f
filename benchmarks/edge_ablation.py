"""What judging a graph edge by edge costs, against a plain forward pass over the same tokens, in one run.

    python benchmarks/edge_ablation.py            # prints a table and writes benchmarks/edge_ablation.csv

A ratio is of CPU time. The plain pass is the model's own, to logits. Each measurement runs once to warm up
and is then the best of three; the graphs are chosen by random weights, greedily, so that edges of all layers
are kept.
"Values at hand" leaves out the run that gives the ablated values, which all graphs on a text share; zero
needs none.
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

from circuitgraph.ablation.judge import ablation_curve, list_budgets, run_ablated
from circuitgraph.ablation.modules import run_module_selections
from circuitgraph.ablation.selection import select
from circuitgraph.ablation.values import AblatedText, read_value
from circuitgraph.build.build import complete_graph
from circuitgraph.cut import ModuleCut
from circuitgraph.data.corpus import load_corpus
from circuitgraph.graph.graph import Graph
from circuitgraph.graph.select import select_edges
from circuitgraph.model.blocks import run_logits
from circuitgraph.model.loading import load_model
from circuitgraph.options import Judging, Run


def random_graph(graph: Graph) -> Graph:
    draw = torch.rand(len(graph), generator=torch.Generator().manual_seed(0)).numpy()
    return Graph(graph.nodes, graph.edges.assign(weight=draw), graph.meta)


def measure(rows: dict[str, dict], name: str, n_edges: int | None, run: Callable[[], object]) -> None:
    """Add a row: the best CPU time of a run, and the memory so far."""
    seconds, peak = best(run, 3), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rows[name] = {"edges kept": n_edges, "CPU seconds": round(seconds, 2)}
    rows[name]["peak memory so far, MB"] = round(peak)
    print(name, rows[name], flush=True)


def add_ratios(table: pd.DataFrame) -> pd.DataFrame:
    """The table with ratios to a plain pass, and to a graph whose values are at hand."""
    seconds = table["CPU seconds"]
    for column, base in (
        ("plain forward", "plain forward"),
        ("values at hand", "head grain, mean, values at hand"),
    ):
        table[f"ratio to {column}"] = (seconds / seconds[base]).round(2)
    return table


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n-tokens", type=int, default=512, help="tokens in the one batch")
    parser.add_argument("--seq-len", type=int, default=128)
    args = parser.parse_args()
    model = load_model("smollm2-135m")
    tokens = load_corpus("default", model, args.n_tokens, seq_len=args.seq_len)
    rows, cut, run = {}, ModuleCut(model, "head"), Run(batch_size=len(tokens), progress=False)

    measure(rows, "plain forward", None, lambda: model(tokens))
    for grain in ("block", "layer", "head"):
        graph = random_graph(complete_graph(model, grain))
        half = select_edges(graph, len(graph) // 2, "greedy")
        measure(
            rows,
            f"{grain} grain, zero",
            len(half),
            lambda g=half: run_ablated(model, g, tokens, value="zero"),
        )
    for n in (len(graph), len(graph) // 10, len(graph) // 100):
        small = select_edges(graph, n, "greedy")
        measure(
            rows,
            f"head grain, zero, {n:,} edges",
            len(small),
            lambda g=small: run_ablated(model, g, tokens, value="zero"),
        )
    for value in ("mean", "resample"):
        fixed = read_value(value).fix(cut, AblatedText(tokens, run=run))
        if fixed.other is None:
            measure(
                rows,
                f"head grain, {value}, values at hand",
                len(half),
                lambda v=fixed: run_logits(
                    model, next(run_module_selections(cut, [select(cut, half)], tokens, v))
                ),
            )
        measure(
            rows,
            f"head grain, {value}",
            len(half),
            lambda v=value: run_ablated(model, half, tokens, value=v),
        )
    budgets = list_budgets(graph)
    measure(
        rows,
        f"head grain, mean, curve of {len(budgets)} budgets",
        None,
        lambda: ablation_curve(model, graph, tokens, ablation="edge", judging=Judging(run=run)),
    )
    table = pd.DataFrame(rows).T
    table = add_ratios(table)
    table["batch"] = f"{tokens.shape[0]} x {tokens.shape[1]}"
    threads, today = torch.get_num_threads(), datetime.date.today()
    table["machine"] = f"{platform.machine()}, {threads} threads, torch {torch.__version__}, {today}"
    path = Path(__file__).with_suffix(".csv")
    table.to_csv(path)
    print(table.drop(columns="machine").to_string(), f"\n{table['machine'].iloc[0]}\nwrote {path.name}")


if __name__ == "__main__":
    main()
