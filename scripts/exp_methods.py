"""Methods compared on SmolLM2-135M: the numbers of nbs/25_exp_methods.ipynb.

    python scripts/exp_methods.py head                                  # every pair of heads and MLPs, four data, three seeds
    python scripts/exp_methods.py layer                                 # with exact patching, ACDC and learned masks
    python scripts/exp_methods.py feature --dictionaries FOLDER         # features of a few layers (for the folder see the Makefile)

Each part writes nbs/results/methods_PART.csv, a method at a time; a second run does what is missing. One task at a time with --tasks.

CPU time: `head` 8 minutes a task and seed with 10 prompts, 12 for 4 sequences of text; `layer` 20 minutes a task and seed with 4 prompts (exact patching 7, ACDC 5, 200 steps of masks 3, a run of 0.03 s a prompt for each of 3,691 edges); `feature`, with the eight dictionaries of `make graph`, 8 minutes a task and seed with 10 prompts. Learned masks between heads (14 s a step) and 32 drawn masks there (4 minutes a task) are left out; --methods names them. The tables of the notebook: `head` with --n-seeds 2 for the tasks and --n-prompts 4 --n-seeds 1 for text, `layer` with --n-prompts 4 (exact patching and ACDC on ioi only), `feature` with --n-seeds 2."""

import argparse
from pathlib import Path

from circuitgraph.cli import compare_methods

ROOT = Path(__file__).resolve().parent.parent
FAST = "EAP;EAP-IG;mask IG;RelP;LRP;guided backprop;GradCAM;AtP;AtP, exact softmax;AtP*;flow;flow, no checkpoints;IG of values;gradient of values;random"
PARTS = {
    "head": {"n_edges": [100, 300, 1_000, 3_000, 10_000, 30_000], "methods": FAST},
    "layer": {"nodes": "layer", "n_edges": [10, 30, 100, 300, 1_000, 3_000], "methods": f"{FAST};mask IG, drawn;ACDC;edge pruning", "exact": ROOT / "graphs/exact"},
    "feature": {"n_edges": [300, 1_000, 3_000, 10_000], "methods": "IG of values;metric;sparse feature circuit;patch-free circuit;random"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--tasks", default="ioi,greater-than,agreement,text")
    parser.add_argument("--n-prompts", type=int, default=10, help="pairs that graphs are found on, and as many others that they are judged on; of text, sequences of 64 tokens")
    parser.add_argument("--n-seeds", type=int, help="by default 3, and 1 for the part of layers")
    parser.add_argument("--dictionaries", help="for the part of features")
    parser.add_argument("--methods", help="with semicolons; by default those of the part")
    parser.add_argument("--out", type=Path, default=ROOT / "nbs/results")
    args = parser.parse_args()
    options = PARTS[args.part] | ({"methods": args.methods} if args.methods else {})
    if args.part == "feature":
        if args.dictionaries is None: parser.error("the part of features needs --dictionaries")
        options["nodes"] = args.dictionaries
    for task in args.tasks.split(","):
        value = "mean" if task == "text" or args.part == "feature" else "corrupted"  # text has no corrupted prompts
        compare_methods(args.out / f"methods_{args.part}.csv", tasks=task, value=value, n_prompts=args.n_prompts, n_seeds=args.n_seeds or (1 if args.part == "layer" else 3), **options)


if __name__ == "__main__":
    main()
