"""Numbers of `nbs/96_exp_models.ipynb`: a second real model from its weights to a graph of features.

`python scripts/exp_models.py [MODEL]` (by default gemma3-270m, after `make gemma`) takes some ten minutes on
two cores and writes `nbs/results/models_MODEL.csv`: what was made, how long it took, and how exact it is.
"""

import argparse
import resource
import time
from pathlib import Path

import pandas as pd
import torch

import circuitgraph as cg
from circuitgraph.ablation.features import run_selections
from circuitgraph.ablation.selection import FeatureSelection
from circuitgraph.ablation.values import FixedValues
from circuitgraph.cut import cut_model
from circuitgraph.model.blocks import run_logits

ROOT = Path(__file__).parents[1]
MODULES = ("a8", "m8", "a9", "m9")


def log(rows: list[dict], step: str, start: float, **numbers: float) -> None:
    "Add what a step took and gave to the table, and print it."
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    row = {"step": step, "seconds": round(time.perf_counter() - start, 1), "peak GB": round(peak, 2)}
    rows += [row | {"figure": name, "value": value} for name, value in numbers.items()]
    print(row, numbers, flush=True)


@torch.no_grad()
def gap(model: cg.Model, graph: cg.Graph, tokens: torch.Tensor, **options) -> dict[str, float]:
    "How far logits with all edges of a graph kept are from the model's own."
    own = model(tokens)
    kept = cg.run_ablated(model, graph, tokens, value="zero", **options)
    return {
        "largest deviation of a logit": float((kept - own).abs().max()),
        "largest logit": float(own.abs().max()),
    }


@torch.no_grad()
def feature_gap(model: cg.Model, dictionaries: dict, tokens: torch.Tensor) -> dict[str, float]:
    "The same between features, all edges that the architecture allows kept, and not those of a text alone."
    cut = cut_model(model, dictionaries)
    nothing = FeatureSelection.nothing(cut)
    (stream,) = run_selections(cut, [~nothing], tokens, FixedValues())
    own = model(tokens)
    deviation = (run_logits(model, stream) - own).abs().max()
    return {"largest deviation of a logit": float(deviation), "largest logit": float(own.abs().max())}


def make_heads(model: cg.Model, rows: list[dict]) -> None:
    "The head graph, how exact its ablated run is, and what its largest edges are worth."
    text = cg.load_corpus("default", model, 2048, seq_len=128, seed=0)
    held_out = cg.load_corpus("default", model, 512, seq_len=128, seed=1)
    start = time.perf_counter()
    graph = cg.build_graph(model, text, "head")
    log(rows, "head graph, 2,048 tokens", start, nodes=len(graph.nodes), edges=len(graph))
    start = time.perf_counter()
    log(rows, "all edges kept, heads", start, **gap(model, cg.complete_graph(model, "head"), held_out[:2]))
    start = time.perf_counter()
    budgets = cg.Budgets([1_000, 10_000, len(graph)])
    judging = cg.Judging(run=cg.Run(batch_size=2))  # a batch of logits is a quarter of a gigabyte
    judged = cg.ablation_curve(model, graph, held_out, budgets, ablation="edge", judging=judging)
    faithful = {f"faithfulness, {row.n_edges:,} edges": row.faithfulness for row in judged.itertuples()}
    log(rows, "edge ablation, 512 held-out tokens", start, **faithful)


def make_features(model: cg.Model, rows: list[dict]) -> None:
    "Dictionaries of two layers, their graph, and how exact its ablated run is."
    start = time.perf_counter()
    text = cg.load_corpus("default", model, 20_000, seq_len=128, seed=2)
    config = cg.TrainConfig(2048, "topk", k=32, n_steps=200)
    dictionaries = cg.train_dictionaries(model, text, list(MODULES), config)
    log(rows, "four dictionaries, 200 steps", start, features=sum(d.d_dict for d in dictionaries.values()))
    start = time.perf_counter()
    graph = cg.build_graph(model, text[:2], dictionaries)
    active = int((graph.nodes["frequency"] > 0).sum())
    size = {"nodes": len(graph.nodes), "edges": len(graph), "active nodes": active}
    log(rows, "feature graph of layers 8 and 9, 256 tokens", start, **size)
    start, tokens = time.perf_counter(), text[2:3, :24]
    log(rows, "all edges kept, features", start, **feature_gap(model, dictionaries, tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="gemma3-270m")
    name = parser.parse_args().model
    rows: list[dict] = []
    start = time.perf_counter()
    model = cg.load_model(name)
    log(rows, "load", start, layers=model.n_layers, heads=model.n_heads, vocabulary=model.d_vocab)
    make_heads(model, rows)
    make_features(model, rows)
    pd.DataFrame(rows).to_csv(ROOT / f"nbs/results/models_{name}.csv", index=False)


if __name__ == "__main__":
    main()
