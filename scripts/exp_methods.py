"""Methods compared on SmolLM2-135M: the tables of nbs/25_exp_methods.ipynb.

    python scripts/exp_methods.py                # all three parts; the dictionaries are those that `make graph` trains, another folder with --dictionaries
    python scripts/exp_methods.py --parts layer --tasks ioi

`head`: every pair of heads and MLPs, 10 prompts and two draws of a task, 4 sequences and one draw of text. `layer`: with learned masks, exact patching and ACDC, 4 prompts. `feature`: 10 prompts. Each part writes nbs/results/methods_PART.csv, a method at a time; a second run does what is missing.

CPU time: `head` 8 minutes a task and draw, 12 for text; `layer` 20 minutes a task (exact patching 7, ACDC 5, 200 steps of masks 3; the saved table has exact patching and ACDC for ioi only); `feature` 8 minutes a task and draw. Learned masks between heads (14 s a step) and 32 drawn masks there (4 minutes a task) are left out; --methods names them."""

import argparse
from pathlib import Path

from circuitgraph.cli import compare_methods

ROOT = Path(__file__).resolve().parent.parent
DICTIONARIES = Path.home() / ".cache/circuitgraph/dictionaries/smollm2-135m-layers-8-11"
FAST = "EAP;EAP-IG;mask IG;RelP;LRP;guided backprop;GradCAM;AtP;AtP, exact softmax;AtP*;flow;flow, no checkpoints;IG of values;gradient of values;random"
PARTS = {
    "head": {"n_edges": [100, 300, 1_000, 3_000, 10_000, 30_000], "methods": FAST},
    "layer": {"nodes": "layer", "n_edges": [10, 30, 100, 300, 1_000, 3_000], "methods": f"{FAST};mask IG, drawn;ACDC;edge pruning", "exact": ROOT / "graphs/exact"},
    "feature": {"n_edges": [300, 1_000, 3_000, 10_000], "methods": "IG of values;metric;sparse feature circuit;patch-free circuit;random"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--tasks", help="by default ioi, greater-than, agreement and, but for layers, text")
    parser.add_argument("--n-prompts", type=int, help="pairs that graphs are found on, and as many others that they are judged on; of text, sequences of 64 tokens")
    parser.add_argument("--n-seeds", type=int)
    parser.add_argument("--dictionaries", default=DICTIONARIES)
    parser.add_argument("--methods", help="with semicolons; by default those of the part")
    parser.add_argument("--out", type=Path, default=ROOT / "nbs/results")
    args = parser.parse_args()
    for part in args.parts.split(","):
        options = PARTS[part] | ({"methods": args.methods} if args.methods else {}) | ({"nodes": str(args.dictionaries)} if part == "feature" else {})
        for task in (args.tasks or "ioi,greater-than,agreement" + (",text" if part != "layer" else "")).split(","):
            text = task == "text"
            n_prompts, n_seeds = args.n_prompts or (4 if part == "layer" or text and part == "head" else 10), args.n_seeds or (1 if part == "layer" or text else 2)
            value = "mean" if text or part == "feature" else "corrupted"  # text has no corrupted prompts
            compare_methods(args.out / f"methods_{part}.csv", tasks=task, value=value, n_prompts=n_prompts, n_seeds=n_seeds, **options)


if __name__ == "__main__":
    main()
