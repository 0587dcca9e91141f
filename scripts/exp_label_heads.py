"""Labels of heads: the tables of heads in nbs/98_exp_labels.ipynb.

    python scripts/exp_label_heads.py --held-out wikitext-2-test.txt

Each head of SmolLM2-135M gets a mixture of rules, on the text of the package. Then the rules take the place
of the patterns of more and more heads, on the text of --held-out. Writes nbs/results/labels_heads.csv and
labels_heads_rolled.csv. CPU time on one core: 4 minutes.
"""

import argparse
from pathlib import Path

from circuitgraph.data.corpus import load_corpus
from circuitgraph.files import replace_file
from circuitgraph.label.heads import judge_heads, label_heads
from circuitgraph.model.loading import load_model

ROOT = Path(__file__).resolve().parent.parent
SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--held-out", required=True, help="a text file that nothing was found on")
    parser.add_argument("--n-tokens", type=int, default=4_096, help="to find labels on")
    parser.add_argument("--n-judged", type=int, default=32, help="sequences of 64 tokens to judge on")
    parser.add_argument("--out", type=Path, default=ROOT / "nbs/results")
    args = parser.parse_args()
    model = load_model("smollm2-135m")
    heads = label_heads(model, load_corpus("default", model, args.n_tokens, seq_len=64))
    judged_on = load_corpus(args.held_out, model, args.n_judged * 64, seq_len=64)
    judged = judge_heads(model, heads, judged_on, shares=SHARES).assign(n_seq=len(judged_on))
    tables = {"labels_heads": heads.drop(columns="weights"), "labels_heads_rolled": judged}
    for name, table in tables.items():
        with replace_file(args.out / f"{name}.csv") as partial:
            table.round(5).to_csv(partial, index=False)


if __name__ == "__main__":
    main()
