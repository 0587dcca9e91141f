"""Small graphs that are faithful on text: the tables of nbs/97_exp_small.ipynb.

    python scripts/exp_small.py --held-out wikitext-2-test.txt
    python scripts/exp_small.py --held-out wikitext-2-test.txt --found-on wikitext-2-valid.txt \\
        --text-seed 0 --start influence --out nbs/results/small_text_alike.csv

Graphs of heads and MLPs of SmolLM2-135M are found on one text, by default the embedded one, and judged on
another: by rules that order the edges of one graph, by methods that see the loss, by a search for each budget
(`search_gates`), and at random among the nodes that the search chose. Writes a table with one row a rule,
budget and ablated value. A second run takes the graphs that are there, and goes on with a search that was
stopped. CPU time on one core: 15 minutes for each search, 2 for the graph, 15 for the methods, 25 for
judging.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from circuitgraph.ablation.judge import faithfulness, measure, open_judge
from circuitgraph.ablation.selection import draw_among_nodes, select
from circuitgraph.ablation.values import AblatedValue, Mean, Resample
from circuitgraph.build.build import build_graph, complete_graph
from circuitgraph.cut import ModuleCut, cut_model
from circuitgraph.data.corpus import load_corpus
from circuitgraph.graph.graph import Graph
from circuitgraph.graph.select import Coverage, Top, select_edges
from circuitgraph.files import replace_file
from circuitgraph.methods.compare import list_methods
from circuitgraph.methods.gates import GateConfig, search_gates
from circuitgraph.model.loading import load_model
from circuitgraph.options import Judging, Run

ROOT = Path(__file__).resolve().parent.parent
Graphs = list[tuple[str, float, Graph]]  # rule, share of the edges, graph
SHARES = (0.01, 0.03, 0.1)
APART = Mean(n_apart=1)  # the first position has a mean of its own
RULES = {
    "largest weight": Top(),
    "largest signed weight": Top(signed=True),
    "influence": "influence",
    "node product": "node product",
    "coverage .95": Coverage(share=0.95),
    "coverage 1": Coverage(share=1.0),
}
METHODS = ("EAP-IG", "AtP*", "mask IG")  # they see the loss; edges by the larger absolute weight


def keep_or_build(folder: Path, build: Callable[[], Graph]) -> Graph:
    "A graph that an earlier run has kept, or a new one."
    if not (folder / "meta.json").exists():
        build().save(folder)
    return Graph.load(folder)


def draw_graph(cut: ModuleCut, graph: Graph, seed: int) -> Graph:
    "As many edges as a graph has, drawn at random among the same nodes."
    drawn = draw_among_nodes(cut, graph, seed)
    return complete_graph(cut.model, cut.grain).keep(drawn.mask.numpy())


def restore_half(graph: Graph, every: Graph, seed: int) -> Graph:
    "A graph with a random half of the edges that it lacks."
    kept = np.isin(every.edge_names, graph.edge_names)
    restored = np.random.default_rng(seed).random(len(every)) < 0.5
    return every.keep(kept | restored)


def list_graphs(
    cut: ModuleCut, whole: Graph, scored: dict[str, Graph], searched: dict[float, Graph]
) -> Iterator[tuple[str, float, Graph]]:
    "Each rule's graph at each budget."
    for share, small in searched.items():
        for name, rule in RULES.items():
            yield name, share, select_edges(whole, len(small), rule, prune=False)
        for name, graph in scored.items():
            yield name, share, select_edges(graph, len(small), "greedy")
        yield "search", share, small
        for seed in range(2):
            yield "random among the search's nodes", share, draw_graph(cut, small, seed)


def judge(cut: ModuleCut, graphs: Graphs, text: torch.Tensor, value: AblatedValue, seed: int) -> pd.DataFrame:
    "The faithfulness of each graph under one ablated value, with its interval."
    opened = open_judge(cut, text, value, Judging(seed=seed))
    selections = [select(cut, graph) for _, _, graph in graphs]
    scores = measure(opened, [selections[0].none(), *selections], desc=value.name)
    own, none, metric = scores["metric"][0], scores["metric"][1], scores["metric"][2:]
    low, high = opened.interval(faithfulness, metric, own, none)
    columns = {"rule": [rule for rule, _, _ in graphs], "share": [share for _, share, _ in graphs]}
    columns |= {"value": value.name, "n_edges": [len(graph) for _, _, graph in graphs]}
    columns |= {"faithfulness": faithfulness(metric, own, none), "low": low, "high": high}
    columns |= {name: scores[name][2:].mean(1) for name in ("kl", "ce")}
    columns |= {"kl_none": float(scores["kl"][1].mean()), "ce_model": -float(own.mean())}
    return pd.DataFrame(columns).assign(n_inputs=len(text))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--held-out", required=True, help="a text file to judge on")
    parser.add_argument("--found-on", default="default", help="a text file to find graphs on")
    parser.add_argument("--text-seed", type=int, default=5, help="of the draw of text for searches")
    parser.add_argument(
        "--start",
        choices=["gates", "influence"],
        default="gates",
        help="the first order of nodes in a search",
    )
    parser.add_argument("--n-judged", type=int, default=16, help="sequences of 64 tokens to judge on")
    parser.add_argument("--n-steps", type=int, default=60, help="steps of each search")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "nbs/results/small_text.csv")
    args = parser.parse_args()
    model = load_model("smollm2-135m")
    folder = ROOT / f"graphs/small/{Path(args.found_on).stem}-{args.start}-{args.seed}"
    text = load_corpus(args.found_on, model, 4096, seq_len=128, seed=args.seed)
    whole = keep_or_build(folder / "whole", lambda: build_graph(model, text, nodes="head"))
    found_on = load_corpus(args.found_on, model, 400 * 64, seq_len=64, seed=args.seed + args.text_seed)
    judging = Judging(seed=args.seed, run=Run(batch_size=4, checkpoint=folder / "unfinished"))
    options = {"value": APART, "config": GateConfig(n_steps=args.n_steps), "judging": judging}
    options["start"] = whole if args.start == "influence" else None

    def search(share: float) -> Graph:
        n_edges = round(share * len(whole))
        return search_gates(model, found_on, n_edges=[n_edges], **options).top_edges(n_edges)

    searched = {
        share: keep_or_build(folder / f"searched-{share:g}", partial(search, share)) for share in SHARES
    }
    methods = list_methods("head", "mean")
    scored = {
        name: keep_or_build(folder / name.strip("*"), partial(methods[name], model, found_on[:16], "head"))
        for name in METHODS
    }
    judged_on = load_corpus(args.held_out, model, args.n_judged * 64, seq_len=64)
    cut = cut_model(model, "head")
    graphs = list(list_graphs(cut, whole, scored, searched))
    half = [
        ("half of the rest restored", share, restore_half(graph, whole, 0))
        for rule, share, graph in graphs
        if rule == "search"
    ]
    tables = [judge(cut, [*graphs, *half], judged_on, value, args.seed) for value in (APART, Resample())]
    with replace_file(args.out) as partial_table:
        pd.concat(tables).round(5).to_csv(partial_table, index=False)


if __name__ == "__main__":
    main()
