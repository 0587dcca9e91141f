"""Small graphs of features, and parents of features: the tables of 97_exp_small and 66_parents.

    make graph
    python scripts/exp_small_features.py --held-out wikitext-2-test.txt

First it writes nbs/results/parents.csv: in-degree curves of modules with an autoencoder and with a
transcoder, on another text than they were built on. The autoencoders are those of `make graph`; the
transcoders are trained here. Of each module and kind there are four curves: parents ranked by weights at the
positions where a feature is active, by weights at all positions, and by how far these spread, and as many
parents drawn at random.

Then it takes the feature graph of SmolLM2's layers 8 to 11 that `make graph` saves, and judges it on that
text: whole; with its coarse edges only (those at a node that is no feature); and with these and some edges
between features, in the order of influence or at random. It writes nbs/results/small_features.csv, a row for
each graph.

A second run goes on after the rows that are there. CPU time on one core: 4 minutes a transcoder, 1 to 5
minutes a curve, 5 minutes a graph.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from circuitgraph.ablation.judge import ablation_curve
from circuitgraph.ablation.parents import in_degree_curve
from circuitgraph.ablation.values import Mean
from circuitgraph.attribution.method import Attribution
from circuitgraph.build.build import build_feature_graph
from circuitgraph.cut import cut_model
from circuitgraph.data.corpus import load_corpus
from circuitgraph.dictionary.protocol import Dictionary
from circuitgraph.dictionary.store import load_dictionaries
from circuitgraph.dictionary.train import train_dictionaries
from circuitgraph.dictionary.trainer import TrainConfig
from circuitgraph.graph.graph import Graph
from circuitgraph.graph.influence import add_influence
from circuitgraph.files import hold_folder, replace_file
from circuitgraph.model.blocks import Model
from circuitgraph.model.loading import load_model
from circuitgraph.options import Budgets, Judging, Pruning, Run

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path.home() / ".cache/circuitgraph/dictionaries"
QUIET = Run(progress=False)
N_EDGES = (3, 10, 30, 100)
# curves of a module: silent features that read, what parents are ranked by, how they are chosen
CURVES = {
    "where active": (0, "abs_weight", "top"),
    "at all positions": (None, "abs_weight", "top"),
    "spread": (None, "spread", "top"),
    "random": (None, "abs_weight", "random"),
}


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
    "Append to a table, which is written whole. Of rows that two processes have made, one is kept."
    with hold_folder(file.parent):
        known = [pd.read_csv(file)] if file.exists() else []
        text = pd.concat([*known, row]).to_csv(index=False)
        lines = dict.fromkeys(text.splitlines())
        with replace_file(file) as partial:
            partial.write_text("\n".join(lines) + "\n")


def has_row(file: Path, **values: object) -> bool:
    "Whether a table has a row with these values."
    if not file.exists():
        return False
    table = pd.read_csv(file)
    return bool((table[list(values)] == pd.Series(values)).all(axis=1).any())


def list_dictionaries(
    model: Model, module: str, kind: str, options: argparse.Namespace
) -> dict[str, Dictionary]:
    "A dictionary of the module, and autoencoders of the modules from layer 8 on that it reads."
    every = [f"{place}{layer}" for layer in range(8, int(module[1:]) + 1) for place in "am"]
    before = every[: every.index(module)]
    found = dict(load_dictionaries(options.dictionaries, model, modules=before)) if before else {}
    if kind == "autoencoder":
        return found | dict(load_dictionaries(options.dictionaries, model, modules=[module]))
    text = load_corpus("default", model, 50_000, seq_len=128)
    config = TrainConfig(n_steps=600, transcode=True)
    trained = train_dictionaries(model, text, options.modules, config, out=options.transcoders)
    return found | {module: trained[module]}


def weigh_parents(
    model: Model, module: str, dictionaries: dict[str, Dictionary], n_silent: int | None, folder: Path
) -> Graph:
    "The largest edges into each feature of a module; kept in a folder."
    if folder.exists():
        return Graph.load(folder)
    cut = cut_model(model, dictionaries)
    text = load_corpus("default", model, 512, seq_len=128)
    rule, pruning = Attribution(n_silent=n_silent), Pruning(n_edges=max(N_EDGES))
    graph = build_feature_graph(cut, text, rule, pruning, QUIET, into=(module,))
    graph.save(folder)
    return graph


def add_parents(model: Model, module: str, kind: str, options: argparse.Namespace) -> None:
    "Add the curves of a module to the table of parents."
    file = options.out / "parents.csv"
    for name, (n_silent, by, method) in CURVES.items():
        if has_row(file, module=module, kind=kind, parents=name):
            continue
        dictionaries = list_dictionaries(model, module, kind, options)
        readers = "all" if n_silent is None else "active"
        folder = options.graphs / f"{module}-{kind}-{readers}"
        graph = weigh_parents(model, module, dictionaries, n_silent, folder)
        text = load_corpus(options.held_out, model, options.n_tokens, seq_len=32)
        settings = {
            "value": Mean(load_corpus("default", model, 1024, seq_len=128)),
            "dictionaries": dictionaries,
        }
        budgets = Budgets(N_EDGES, method, by)
        curve = in_degree_curve(model, graph, module, text, budgets, judging=Judging(run=QUIET), **settings)
        row = {"module": module, "kind": kind, "parents": name, "n_tokens": text.numel(), "n_seq": len(text)}
        add_row(file, curve.assign(**row))
        print(module, kind, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--held-out", required=True, help="a text file that nothing was built on")
    parser.add_argument("--graph", type=Path, default=ROOT / "graphs/smollm2-features")
    parser.add_argument("--dictionaries", type=Path, default=CACHE / "smollm2-135m-layers-8-11")
    parser.add_argument("--transcoders", type=Path, default=CACHE / "smollm2-135m-transcoders")
    parser.add_argument(
        "--graphs", type=Path, default=ROOT / "graphs/parents", help="folder of graphs of parents"
    )
    parser.add_argument("--n-tokens", type=int, default=256)
    parser.add_argument("--budgets", type=int, nargs="*", default=[10_000, 30_000])
    parser.add_argument("--modules", nargs="*", default=["m8", "m10"], help="MLPs of layers 8 to 11")
    parser.add_argument("--kinds", nargs="*", default=["transcoder", "autoencoder"])
    parser.add_argument("--parents-only", action="store_true", help="stop after the table of parents")
    parser.add_argument("--out", type=Path, default=ROOT / "nbs/results")
    options = parser.parse_args()
    model = load_model("smollm2-135m")
    for kind in options.kinds:
        for module in options.modules:
            add_parents(model, module, kind, options)
    if not options.parents_only:
        judge_graphs(model, options)


def judge_graphs(model: Model, options: argparse.Namespace) -> None:
    "Add the graphs of features to their table."
    graph = Graph.load(options.graph)
    dictionaries = load_dictionaries(options.dictionaries, model, modules=list(graph.meta["dictionaries"]))
    text = load_corpus(options.held_out, model, options.n_tokens, seq_len=64)
    mean = Mean(load_corpus("default", model, 4096, seq_len=128))
    settings = {"value": mean, "dictionaries": dictionaries, "judging": Judging(run=QUIET)}
    file = options.out / "small_features.csv"
    for (rule, n_fine), mask in list_graphs(graph, options.budgets).items():
        if not has_row(file, rule=rule, n_fine=n_fine):
            kept = graph.keep(mask)
            row = ablation_curve(model, kept, text, [len(kept)], ablation="edge", **settings)
            add_row(file, row.assign(rule=rule, n_fine=n_fine, n_inputs=len(text)))


if __name__ == "__main__":
    main()
