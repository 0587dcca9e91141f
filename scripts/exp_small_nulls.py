"""The search for small graphs where there is nothing to find: a table of nbs/97_exp_small.ipynb.

    python scripts/exp_small_nulls.py --held-out wikitext-2-test.txt

SmolLM2-135M with the entries of each weight in a random order has the same nodes, edges and norms of weights,
and has learned nothing. The search of `exp_small.py` is run on it at the smallest budget, and its graph is
judged on another text, beside random edges among the nodes that it chose. Writes
nbs/results/small_nulls.csv, a row for each. A second run takes the graph that is there, and goes on with a
search that was stopped. CPU time on one core: 20 minutes.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from circuitgraph.build.build import complete_graph
from circuitgraph.cut import cut_model
from circuitgraph.data.corpus import load_corpus
from circuitgraph.graph.graph import Graph
from circuitgraph.files import replace_file
from circuitgraph.methods.gates import GateConfig, search_gates
from circuitgraph.model.blocks import Model
from circuitgraph.model.loading import load_model
from circuitgraph.options import Judging, Run
from exp_small import APART, SHARES, draw_graph, judge, keep_or_build

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path.home() / ".cache/circuitgraph/smollm2-135m"


def shuffle_weights(seed: int) -> Model:
    "SmolLM2 with the entries of each of its parameters in a random order."
    tokenizer = load_model("smollm2-135m").tokenizer
    found = AutoModelForCausalLM.from_pretrained(FOLDER)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in found.parameters():
            order = torch.randperm(parameter.numel(), generator=generator)
            shuffled = parameter.flatten()[order]
            parameter.copy_(shuffled.view_as(parameter))
    return load_model(found, tokenizer=tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--held-out", required=True, help="a text file to judge on")
    parser.add_argument("--n-judged", type=int, default=16, help="sequences of 64 tokens to judge on")
    parser.add_argument("--n-steps", type=int, default=60, help="steps of the search")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "nbs/results/small_nulls.csv")
    args = parser.parse_args()
    model = shuffle_weights(args.seed)
    cut, folder = cut_model(model, "head"), ROOT / f"graphs/small/{args.seed}/shuffled"
    n_edges = round(min(SHARES) * len(complete_graph(model, "head")))
    found_on = load_corpus("default", model, 400 * 64, seq_len=64, seed=args.seed + 5)

    def search() -> Graph:
        judging = Judging(seed=args.seed, run=Run(batch_size=4, checkpoint=folder / "unfinished"))
        config = GateConfig(n_steps=args.n_steps)
        found = search_gates(model, found_on, n_edges=[n_edges], value=APART, config=config, judging=judging)
        return found.top_edges(n_edges)

    small = keep_or_build(folder / "searched", search)
    judged_on = load_corpus(args.held_out, model, args.n_judged * 64, seq_len=64)
    graphs = [("search", min(SHARES), small), ("random", min(SHARES), draw_graph(cut, small, 0))]
    table = judge(cut, graphs, judged_on, APART, args.seed)
    with replace_file(args.out) as partial_table:
        table.round(5).to_csv(partial_table, index=False)


if __name__ == "__main__":
    main()
