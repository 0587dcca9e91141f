"""Small graphs of features: which fine edges bring the model back. A table of 97_exp_small.

    python scripts/exp_small_edges.py --found-on wikitext-2-valid.txt --held-out wikitext-2-test.txt

SmolLM2's MLPs are cut into features by transcoders of 2,304 features, 32 of them active: those of layers 8 to
11, then all 30. Attention layers, error nodes and embeddings are the backbone, whose edges are always kept.
Fine edges, from a feature to a feature, are found on one text and judged on another by the exact run: those
that `search_edges` finds, those that bring most to their readers, and random candidates. Writes
nbs/results/small_edges.csv, a row for each set of modules, rule and budget. A second run goes on after the
rows that are there. The table has text in both sets of layers, in all layers with 30,000 edges alone, and
three tasks in all layers with 30,000, of which indirect objects with 10,000 too; the rest was not run. CPU
time on one core: 15 minutes for the transcoders, 10 minutes a search on text in four layers and 30 in all of
them, 3 on a task, 1 to 10 minutes a judged graph.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

from circuitgraph.ablation.judge import Judge, faithfulness, measure, open_judge
from circuitgraph.ablation.selection import FeatureSelection
from circuitgraph.ablation.values import Mean
from circuitgraph.cut import cut_model
from circuitgraph.data.corpus import load_corpus
from circuitgraph.data.prompts import load_task
from circuitgraph.dictionary.store import load_dictionaries
from circuitgraph.dictionary.train import train_dictionaries
from circuitgraph.dictionary.trainer import TrainConfig
from circuitgraph.methods.edge_search import Candidates, EdgeConfig, keep_candidates, list_candidates
from circuitgraph.methods.edge_search import search_edges
from circuitgraph.model.blocks import Model
from circuitgraph.model.loading import load_model
from circuitgraph.options import Judging, Run
from exp_small_features import add_row, has_row
from exp_small_tasks import drop_known

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path.home() / ".cache/circuitgraph"
LAYERS = {"layers 8 to 11": range(8, 12), "all layers": range(30)}
BUDGETS = (10_000, 30_000)
N_DRAWN = {"agreement": 190}  # prompts to choose 64 others from; there are no more
N_PARENTS = {"layers 8 to 11": 150, "all layers": 50}


def load_transcoders(model: Model, folder: Path, modules: list[str]) -> dict:
    "Transcoders of some MLPs; those that are missing are trained."
    text = load_corpus("default", model, 50_000, seq_len=128)
    config = TrainConfig(n_steps=600, transcode=True)
    train_dictionaries(model, text, [f"m{i}" for i in range(30)], config, out=folder)
    return dict(load_dictionaries(folder, model, modules=modules))


def open_judges(model: Model, cut: object, data: str, options: argparse.Namespace) -> tuple[Judge, Judge]:
    "Where edges are found, and where they are judged: other text, or other prompts of a task."
    quiet = Judging(metric="kl" if data == "text" else None, run=Run(progress=False))
    if data == "text":
        texts = [load_corpus(options.found_on, model, 32_768, seq_len=64)]
        texts.append(load_corpus(options.held_out, model, options.n_tokens, seq_len=64))
        value = Mean(load_corpus("default", model, 4096, seq_len=128))
        return tuple(open_judge(cut, text, value, quiet) for text in texts)
    found = load_task(data, model, 32, seed=1)
    judged = drop_known(load_task(data, model, N_DRAWN.get(data, 256), seed=2), found, 64)
    return tuple(open_judge(cut, task, "corrupted", quiet) for task in (found, judged))


def keep_largest(
    judge: Judge, candidates: dict[str, Candidates], size: torch.Tensor, n: int
) -> FeatureSelection:
    "The candidates of largest size."
    kept = torch.zeros(len(size), dtype=torch.bool)
    kept[size.topk(n).indices] = True
    return keep_candidates(judge, candidates, kept)


def list_rules(
    judge: Judge, candidates: dict[str, Candidates], config: EdgeConfig
) -> dict[str, Callable[[int], FeatureSelection]]:
    "Selections by rule, of a number of edges."
    size = torch.cat([some.size for some in candidates.values()])
    noise = torch.rand(len(size), generator=torch.Generator().manual_seed(0))
    return {
        "search": lambda n: search_edges(judge, candidates, n, config),
        "largest": lambda n: keep_largest(judge, candidates, size, n),
        "random": lambda n: keep_largest(judge, candidates, noise, n),
    }


def judge_selection(judge: Judge, kept: FeatureSelection) -> pd.DataFrame:
    "Faithfulness between the backbone alone (0) and the model (1), by the judge's metric and by divergence."
    scores = measure(judge, [kept.none(), kept])
    row = {
        "n_fine": kept.n_edges,
        "n_readers": len(set(kept.target.tolist())),
        "n_inputs": len(judge.data.tokens),
    }
    for name, sign in (("metric", 1), ("kl", -1)):
        model, none, found = sign * scores[name]
        low, high = judge.interval(lambda m, n, f: faithfulness(f, m, n), model, none, found)
        row |= {name: float(faithfulness(found, model, none))}
        row |= {f"{name}_low": float(low), f"{name}_high": float(high)}
        row |= {
            f"{name}_of_backbone": float(sign * none.mean()),
            f"{name}_of_graph": float(sign * found.mean()),
        }
    return pd.DataFrame([row])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--found-on", required=True, help="a text file to find edges on")
    parser.add_argument("--held-out", required=True, help="a text file that nothing was built on")
    parser.add_argument("--transcoders", type=Path, default=CACHE / "dictionaries/smollm2-135m-transcoders")
    parser.add_argument("--layers", nargs="*", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--data", nargs="*", default=["text", "ioi", "greater-than", "agreement"])
    parser.add_argument("--rules", nargs="*", default=["search", "largest", "random"])
    parser.add_argument("--budgets", type=int, nargs="*", default=list(BUDGETS))
    parser.add_argument("--n-tokens", type=int, default=256, help="that are judged")
    parser.add_argument("--n-steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=ROOT / "nbs/results/small_edges.csv")
    options = parser.parse_args()
    model = load_model("smollm2-135m")
    for layers in options.layers:
        modules = [f"m{i}" for i in LAYERS[layers]]
        cut = cut_model(model, load_transcoders(model, options.transcoders, modules))
        for data in options.data:
            wanted = [(rule, n) for n in options.budgets for rule in options.rules]
            done = [has_row(options.out, layers=layers, data=data, rule=rule, budget=n) for rule, n in wanted]
            if all(done):
                continue
            found_on, judged = open_judges(model, cut, data, options)
            candidates = list_candidates(found_on, slice(0, 32), N_PARENTS[layers])
            config = EdgeConfig(n_parents=N_PARENTS[layers], n_steps=options.n_steps)
            rules = list_rules(found_on, candidates, config)
            for (rule, n), is_done in zip(wanted, done, strict=True):
                if is_done:
                    continue
                row = judge_selection(judged, rules[rule](n))
                add_row(options.out, row.assign(layers=layers, data=data, rule=rule, budget=n))
                print(
                    layers,
                    data,
                    rule,
                    n,
                    row["metric"].round(3).item(),
                    row["kl"].round(3).item(),
                    flush=True,
                )


if __name__ == "__main__":
    main()
