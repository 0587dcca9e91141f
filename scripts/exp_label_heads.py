"""Labels of heads: the tables of heads in nbs/98_exp_labels.ipynb.

    python scripts/exp_label_heads.py --held-out wikitext-2-test.txt

Each head of SmolLM2-135M gets a mixture of rules, a sum of scores, and tables of what it moves, on the text
of the package. Then rules and scores take the place of the patterns of more and more heads, on the text of
--held-out. Writes to nbs/results labels_heads.csv, labels_heads_rolled.csv, labels_scores.csv,
labels_scores_rolled.csv and labels_moves.csv; what is there is left. CPU time on one core: 4 minutes for
rules, 3 for scores, 2 for what heads move.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from circuitgraph.data.corpus import load_corpus
from circuitgraph.files import replace_file
from circuitgraph.label.heads import judge_heads, label_heads
from circuitgraph.label.moves import describe_moves
from circuitgraph.label.scores import judge_scores, score_heads
from circuitgraph.model.blocks import Model
from circuitgraph.model.loading import load_model

ROOT = Path(__file__).resolve().parent.parent
SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)


def make_rules(model: Model, text: torch.Tensor, judged_on: torch.Tensor) -> dict[str, pd.DataFrame]:
    "Mixtures of rules, and the model with them."
    heads = label_heads(model, text)
    judged = judge_heads(model, heads, judged_on, shares=SHARES).assign(n_seq=len(judged_on))
    return {"labels_heads": heads.drop(columns="weights"), "labels_heads_rolled": judged}


def make_scores(model: Model, text: torch.Tensor, judged_on: torch.Tensor) -> dict[str, pd.DataFrame]:
    "Sums of scores, and the model with them."
    scored = score_heads(model, text)
    judged = judge_scores(model, scored, judged_on, shares=SHARES).assign(n_seq=len(judged_on))
    return {"labels_scores": scored.table, "labels_scores_rolled": judged}


def make_moves(model: Model, text: torch.Tensor) -> dict[str, pd.DataFrame]:
    "What heads move."
    return {"labels_moves": describe_moves(model, text)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--held-out", required=True, help="a text file that nothing was found on")
    parser.add_argument("--n-tokens", type=int, default=4_096, help="to find labels on")
    parser.add_argument("--n-scored", type=int, default=2_048, help="to find scores on")
    parser.add_argument("--n-moved", type=int, default=16_384, help="to make and try tables of values on")
    parser.add_argument("--n-judged", type=int, default=32, help="sequences of 64 tokens to judge on")
    parser.add_argument("--out", type=Path, default=ROOT / "nbs/results")
    args = parser.parse_args()
    model = load_model("smollm2-135m")
    text = load_corpus("default", model, args.n_tokens, seq_len=64)
    judged_on = load_corpus(args.held_out, model, args.n_judged * 64, seq_len=64)
    scored = load_corpus("default", model, args.n_scored, seq_len=64)
    moved = load_corpus("default", model, args.n_moved, seq_len=64, seed=1)
    makers: dict[str, Callable[[], dict[str, pd.DataFrame]]] = {
        "labels_heads_rolled": partial(make_rules, model, text, judged_on),
        "labels_scores_rolled": partial(make_scores, model, scored, judged_on),
        "labels_moves": partial(make_moves, model, moved),
    }
    for name, make in makers.items():
        if (args.out / f"{name}.csv").exists():
            continue
        for file, table in make().items():
            with replace_file(args.out / f"{file}.csv") as partial_table:
                table.round(5).to_csv(partial_table, index=False)


if __name__ == "__main__":
    main()
