"""The graph of all features of the embedded model: tables of nbs/94_exp_whole.ipynb, and its strongest edges.

    circuitgraph train --modules all --corpus wikitext-2-valid.txt --out dictionaries/smollm2
    circuitgraph build --nodes dictionaries/smollm2 --n-tokens 1024 --memory 8e9 --out graphs/smollm2-whole
    python scripts/exp_whole.py --graph graphs/smollm2-whole --dictionaries dictionaries/smollm2

writes nbs/results/whole_*."""

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from circuitgraph.ablation.judge import ablation_curve
from circuitgraph.data.corpus import load_corpus
from circuitgraph.dictionary.store import load_dictionaries
from circuitgraph.graph.graph import Graph
from circuitgraph.model.loading import load_model
from circuitgraph.options import Judging, Run
from exp_features import ROOT, count_possible, rank_by_share

N_SHOWN = 60_000  # edges of the graph that is kept with the notebook


def shares_of_readers(graph: Graph) -> pd.DataFrame:
    "A row for each kept edge: its modules, and its share of what its reader reads."
    edges, nodes = graph.edges, graph.nodes
    module, kind = nodes["module"].astype(str).to_numpy(), nodes["kind"].astype(str).to_numpy()
    source, target = edges["source"].cat.codes.to_numpy(), edges["target"].cat.codes.to_numpy()
    return pd.DataFrame(
        {
            "source": source,
            "target": target,
            "writer": module[source],
            "writer_kind": kind[source],
            "reader": module[target],
            "share": edges["abs_weight"].to_numpy(),
        }
    )


def tabulate_modules(graph: Graph, rows: pd.DataFrame) -> pd.DataFrame:
    "For each reader module: its live readers, and the mean share of kept edges, by kind of writer."
    nodes = graph.nodes
    readers = nodes[nodes["module"].isin(rows["reader"].unique()) & (nodes["frequency"] > 0)]
    modules = readers.groupby(readers["module"].astype(str), sort=False)
    weight = modules["frequency"].sum()
    table = pd.DataFrame(
        {
            "n_live": modules.size(),
            "n_edges": rows.groupby("reader").size(),
            "kept": modules[["kept", "frequency"]].apply(
                lambda x: np.average(x["kept"], weights=x["frequency"])
            ),
        }
    )
    by_kind = rows.pivot_table(
        index="reader", columns="writer_kind", values="share", aggfunc="sum", fill_value=0, observed=True
    )
    return table.join(by_kind.div(weight, axis=0)).rename_axis("module").reindex(weight.index)


def count_needed(graph: Graph, rows: pd.DataFrame) -> pd.DataFrame:
    "How many edges hold half, 80 and 90 % of a reader's input: quartiles, each reader as often as active."
    nodes = graph.nodes
    ordered = rows.sort_values(["target", "share"], ascending=[True, False], kind="stable")
    held = (
        ordered.groupby("target")["share"].cumsum().to_numpy()
        / nodes["frequency"].to_numpy()[ordered["target"]]
    )
    found = []
    for level in (0.5, 0.8, 0.9):
        below = pd.Series(held < level).groupby(ordered["target"].to_numpy()).agg(["sum", "size"])
        needed = np.where(below["sum"] < below["size"], below["sum"] + 1, np.inf)
        readers = nodes.iloc[below.index]
        for kind in ("attention", "MLP"):
            mine = (
                readers["module"].astype(str).str.startswith("a" if kind == "attention" else "m").to_numpy()
                & (readers["kind"].astype(str) == "feature").to_numpy()
            )
            if not mine.any():
                continue
            order = np.argsort(needed[mine])
            weight = np.cumsum(readers["frequency"].to_numpy()[mine][order])
            quartiles = {
                f"q{q}": needed[mine][order][np.searchsorted(weight, q / 100 * weight[-1])]
                for q in (25, 50, 75)
            }
            found.append(
                {
                    "readers": kind,
                    "share": level,
                    **quartiles,
                    "reached": readers["frequency"].to_numpy()[mine][np.isfinite(needed[mine])].sum()
                    / weight[-1],
                }
            )
    return pd.DataFrame(found)


def concentrate(graph: Graph, n_possible: int) -> pd.DataFrame:
    "The share of all input that the largest edges hold, and how many nodes they join."
    size = graph.edges["abs_weight"].to_numpy()
    order, total = (
        np.argsort(-size),
        graph.nodes["frequency"][~graph.nodes["kind"].isin(["embed", "pos_embed", "const"])].sum(),
    )  # of readers
    source, target = (
        graph.edges["source"].cat.codes.to_numpy()[order],
        graph.edges["target"].cat.codes.to_numpy()[order],
    )
    counts = [n for n in (100, 1_000, 10_000, 100_000, 1_000_000, 3_000_000) if n < len(order)] + [len(order)]
    return pd.DataFrame(
        [
            {
                "n_edges": n,
                "of_possible": n / n_possible,
                "n_nodes": len(np.union1d(source[:n], target[:n])),
                "share": size[order[:n]].sum() / total,
            }
            for n in counts
        ]
    )


def keep_strongest(graph: Graph, raw: Graph, n: int) -> Graph:
    "The `n` largest edges with their own weights, and the nodes that they join."
    chosen = np.sort(np.argsort(-graph.edges["abs_weight"].to_numpy())[:n])
    edges = raw.edges.iloc[chosen]
    used = np.union1d(edges["source"].cat.codes, edges["target"].cat.codes)
    nodes = raw.nodes.iloc[used].reset_index(drop=True)
    names = pd.CategoricalDtype(nodes["name"].astype(str))
    return Graph(
        nodes,
        edges.assign(
            source=edges["source"].astype(str).astype(names), target=edges["target"].astype(str).astype(names)
        ).reset_index(drop=True),
        raw.meta,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--graph", type=Path, default=ROOT / "graphs/smollm2-whole")
    parser.add_argument("--dictionaries", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=ROOT / "nbs/results")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    model, raw = load_model("smollm2-135m"), Graph.load(args.graph)
    dictionaries, graph = load_dictionaries(args.dictionaries, model), rank_by_share(raw)
    rows, possible = shares_of_readers(graph), count_possible(model, dictionaries)
    tables = {
        "modules": tabulate_modules(graph, rows).reset_index(),
        "needed": count_needed(graph, rows),
        "concentration": concentrate(graph, possible),
        "flow": rows.groupby(["writer", "reader"], as_index=False)["share"].sum(),
    }
    for name, table in tables.items():
        table.to_csv(args.out / f"whole_{name}.csv", index=False, float_format="%.5g")
        print(name, table.head(8).to_string(), "", sep="\n", flush=True)
    keep_strongest(graph, raw, N_SHOWN).save(args.out / "whole_graph")
    text, path = load_corpus("default", model, 256, seq_len=64, seed=1), args.out / "whole_ablation.csv"
    for n in (1_000, 10_000, 50_000):
        start = time.time()
        judging = Judging(run=Run(progress=False))
        curve = ablation_curve(
            model, graph, text, [n], value="zero", dictionaries=dictionaries, judging=judging
        )
        curve.assign(seconds=time.time() - start).round(5).to_csv(
            path, mode="a", header=not path.exists(), index=False
        )
        print(
            curve[["ablation", "n_kept", "n_nodes", "faithfulness"]].to_string(),
            f"{time.time() - start:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
