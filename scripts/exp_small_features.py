"""Small graphs of features, and parents of features: the tables of 97_exp_small and 66_parents.

    make graph
    python scripts/exp_small_features.py --held-out wikitext-2-test.txt

Takes the feature graph of SmolLM2's layers 8 to 11 that `make graph` saves, and judges it on another text:
whole; with its coarse edges only (those at a node that is no feature); and with these and some edges between
features, in the order of influence or at random. Writes nbs/results/small_features.csv, a row for each graph,
and nbs/results/parents.csv, in-degree curves of some modules. A second run goes on after the rows that are
there. CPU time on one core: 5 minutes a row, 3 minutes a module.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from circuitgraph.ablation.judge import ablation_curve
from circuitgraph.ablation.parents import in_degree_curve
from circuitgraph.ablation.values import Mean
from circuitgraph.data.corpus import load_corpus
from circuitgraph.dictionary.store import load_dictionaries
from circuitgraph.graph.graph import Graph
from circuitgraph.graph.influence import add_influence
from circuitgraph.graph.tables import replace_file
from circuitgraph.model.loading import load_model
from circuitgraph.options import Judging, Run

ROOT = Path(__file__).resolve().parent.parent
DICTIONARIES = Path.home() / ".cache/circuitgraph/dictionaries/smollm2-135m-layers-8-11"


def is_fine(graph: Graph) -> np.ndarray:
    "Which edges lead from a feature to a feature."
    kind = graph.nodes.set_index("name")["kind"].astype(str)
    source, target = (graph.edges[end].astype(str).map(kind) == "feature" for end in ("source", "target"))
    return (source & target).to_numpy()


def list_graphs(graph: Graph, budgets: list[int], seed: int = 0) -> dict[tuple[str, int], np.ndarray]:
    "Masks over edges by rule and number of edges between features; the coarse edges are always kept."
    fine = is_fine(graph)
    orders = {
        "influence": add_influence(graph).edges["influence"].to_numpy(),
        "random": np.random.default_rng(seed).random(len(graph)),
    }
    masks = {("whole", int(fine.sum())): np.ones(len(graph), dtype=bool), ("coarse edges", 0): ~fine}
    for n in budgets:
        for rule, size in orders.items():
            largest = np.argsort(-np.where(fine, size, -np.inf), kind="stable")[:n]
            mask = ~fine
            mask[largest] = True
            masks[rule, n] = mask
    return masks


def add_row(file: Path, row: pd.DataFrame) -> None:
    "Append to a table, which is written whole."
    table = pd.concat([pd.read_csv(file), row]) if file.exists() else row
    with replace_file(file) as partial:
        table.to_csv(partial, index=False)


def has_row(file: Path, **values: object) -> bool:
    "Whether a table has a row with these values."
    if not file.exists():
        return False
    table = pd.read_csv(file)
    return bool((table[list(values)] == pd.Series(values)).all(axis=1).any())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--held-out", required=True, help="a text file that nothing was built on")
    parser.add_argument("--graph", type=Path, default=ROOT / "graphs/smollm2-features")
    parser.add_argument("--dictionaries", type=Path, default=DICTIONARIES)
    parser.add_argument("--n-tokens", type=int, default=256)
    parser.add_argument("--budgets", type=int, nargs="*", default=[10_000, 30_000])
    parser.add_argument("--modules", nargs="*", default=["m8", "a10", "m10"])
    parser.add_argument("--out", type=Path, default=ROOT / "nbs/results")
    options = parser.parse_args()
    model, graph = load_model("smollm2-135m"), Graph.load(options.graph)
    dictionaries = load_dictionaries(options.dictionaries, model, modules=graph.meta["dictionaries"])
    text = load_corpus(options.held_out, model, options.n_tokens, seq_len=64)
    mean = Mean(load_corpus("default", model, 4096, seq_len=128))
    settings = {"value": mean, "dictionaries": dictionaries, "judging": Judging(run=Run(progress=False))}
    file = options.out / "parents.csv"
    for module in options.modules:
        if not has_row(file, module=module):
            curve = in_degree_curve(model, graph, module, text, (3, 10, 30), **settings)
            add_row(file, curve.assign(module=module, n_tokens=text.numel()))
    file = options.out / "small_features.csv"
    for (rule, n_fine), mask in list_graphs(graph, options.budgets).items():
        if not has_row(file, rule=rule, n_fine=n_fine):
            kept = graph.keep(mask)
            row = ablation_curve(model, kept, text, [len(kept)], ablation="edge", **settings)
            add_row(file, row.assign(rule=rule, n_fine=n_fine, n_inputs=len(text)))


if __name__ == "__main__":
    main()
