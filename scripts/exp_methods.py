"""Methods compared on SmolLM2-135M: the tables of nbs/95_exp_methods.ipynb.

    python scripts/exp_methods.py                      # all three parts
    python scripts/exp_methods.py --parts layer --tasks ioi

`head`: every pair of heads and MLPs, 32 prompts to find graphs and 64 others to judge them, two draws of a
task; 16 and 16 sequences and one draw of text. `layer`: with learned masks, exact patching and ACDC, 4 and 4
prompts. `feature`: 10 and 10 prompts, with the dictionaries that `make graph` trains (--dictionaries names
others). Each part writes nbs/results/methods_PART.csv, a method at a time, and a second run makes only the
rows that are missing.

CPU time: `head` 25 minutes a task and draw; `layer` 20 minutes a task (exact patching 7, ACDC 5, 200 steps
of masks 3; the saved table has exact patching and ACDC for ioi only); `feature` 8 minutes a task and draw.
Learned masks between heads (14 s a step) and 32 drawn masks there (4 minutes a task) are left out; --methods
names them.
"""

import argparse
from pathlib import Path
from typing import Any

from circuitgraph.data.corpus import load_corpus
from circuitgraph.data.prompts import load_task
from circuitgraph.dictionary.store import load_dictionaries
from circuitgraph.graph.graph import Graph
from circuitgraph.methods.compare import Comparing, compare_methods, list_methods
from circuitgraph.model.blocks import Model
from circuitgraph.model.loading import load_model
from exp_small_tasks import drop_known

ROOT = Path(__file__).resolve().parent.parent
DICTIONARIES = Path.home() / ".cache/circuitgraph/dictionaries/smollm2-135m-layers-8-11"
FAST = ["EAP", "EAP-IG", "mask IG", "RelP", "LRP", "guided backprop", "GradCAM", "AtP", "AtP, exact softmax"]
FAST += ["AtP*", "flow", "flow, no checkpoints", "IG of values", "gradient of values", "random"]
FEATURES = ["IG of values", "metric", "sparse feature circuit", "patch-free circuit", "random"]
PARTS = {
    "head": ([100, 300, 1_000, 3_000, 10_000, 30_000], FAST),
    "layer": ([10, 30, 100, 300, 1_000, 3_000], [*FAST, "mask IG, drawn", "ACDC", "edge pruning"]),
    "feature": ([300, 1_000, 3_000, 10_000], FEATURES),
}  # budgets and methods
INPUTS = {"head": (32, 64), "layer": (4, 4), "feature": (10, 10)}  # to find graphs, and to judge them
TEXTS = (16, 16)  # sequences of text between heads


def draw(name: str, model: Model, n_found: int, n_judged: int, seed: int) -> tuple[Any, Any]:
    "Prompts of a task, or sequences of 64 tokens of text; and others."
    if name == "text":
        counts = ((n_found, 2 * seed), (n_judged, 2 * seed + 1))
        found_on, judged_on = (load_corpus("default", model, n * 64, seq_len=64, seed=at) for n, at in counts)
        return found_on, judged_on
    found_on = load_task(name, model, n=n_found, seed=2 * seed)
    more = load_task(name, model, n=n_found + n_judged, seed=2 * seed + 1)
    return found_on, drop_known(more, found_on, n_judged)


def compare_part(model: Model, part: str, task: str, seed: int, args: argparse.Namespace) -> None:
    "Compare the methods of one part on one draw of a task."
    n_found, n_judged = TEXTS if (part, task) == ("head", "text") else INPUTS[part]
    n_found, n_judged = args.n_found or n_found, args.n_judged or n_judged
    value = "mean" if task == "text" or part == "feature" else "corrupted"  # text has no corrupted prompts
    nodes = load_dictionaries(args.dictionaries, model) if part == "feature" else part
    n_edges, names = PARTS[part]
    every, names = list_methods(part, value), args.methods.split(";") if args.methods else names
    found_on, judged_on = draw(task, model, n_found, n_judged, seed)

    def compare(methods: dict[str, Any], exact: Graph | None = None) -> None:
        comparing = Comparing([seed], exact=exact, out=args.out / f"methods_{part}.csv")
        options = {"nodes": nodes, "value": value, "comparing": comparing}
        compare_methods(model, found_on, judged_on, methods, n_edges, **options)

    exact = None
    if part == "layer":
        folder = ROOT / f"graphs/exact/{task}-{part}-{value}-{n_found}-{seed}"
        if not (folder / "meta.json").exists():

            def patch_and_save(*call: Any, **options: Any) -> Graph:
                graph = every["exact patching"](*call, **options)
                graph.save(folder)
                return graph

            compare({"exact patching": patch_and_save})
        exact = Graph.load(folder)
    compare({name: every[name] for name in names}, exact)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--tasks", help="by default ioi, greater-than, agreement and, but for layers, text")
    parser.add_argument("--n-found", type=int, help="inputs to find graphs on")
    parser.add_argument("--n-judged", type=int, help="other inputs to judge them on")
    parser.add_argument("--n-seeds", type=int)
    parser.add_argument("--dictionaries", default=DICTIONARIES)
    parser.add_argument("--methods", help="with semicolons; by default those of the part")
    parser.add_argument("--out", type=Path, default=ROOT / "nbs/results")
    args = parser.parse_args()
    model = load_model("smollm2-135m")
    for part in args.parts.split(","):
        tasks = "ioi,greater-than,agreement" + (",text" if part != "layer" else "")
        for task in (args.tasks or tasks).split(","):
            once = part == "layer" or task == "text"
            for seed in range(args.n_seeds or (1 if once else 2)):
                compare_part(model, part, task, seed, args)


if __name__ == "__main__":
    main()
