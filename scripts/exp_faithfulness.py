"""Edge and node ablation of the same graphs, on text and on tasks: tables of nbs/91_exp_faithfulness.ipynb.

    make graph                              # the graph that is judged: head grain, 4,096 tokens
    python scripts/exp_faithfulness.py      # writes nbs/results/faithfulness.csv and faithfulness_areas.csv

Each setting is written when it is done, and a second run makes only those that are missing. The text that
graphs are judged on is another sample than the one they were built on.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from circuitgraph.ablation.judge import compare_curves
from circuitgraph.ablation.values import Mean
from circuitgraph.data.corpus import load_corpus
from circuitgraph.graph.graph import Graph
from circuitgraph.model.blocks import Model
from circuitgraph.model.loading import load_model
from circuitgraph.options import Budgets
from circuitgraph.data.prompts import load_task
from circuitgraph.data.task import Task

ROOT = Path(__file__).resolve().parent.parent
KEY = ["data", "value", "method"]
TASKS = ("ioi", "greater-than", "agreement-attractor", "docstring", "induction")


def settings() -> list[tuple[str, str, str]]:  # data, value, method
    "Everything that is measured, what matters most first."
    text = [("text", value, "top") for value in ("mean", "mean by position", "zero", "resample")]
    tasks = [
        (task, value, "top")
        for value in ("corrupted", "mean", "mean by position", "zero", "resample")
        for task in TASKS
    ]
    return text + tasks + [("text", "mean", "greedy"), ("ioi", "corrupted", "greedy")]


def measure(
    model: Model, graph: Graph, data: torch.Tensor | Task, value: str, method: str
) -> tuple[pd.DataFrame, pd.DataFrame]:
    "Curves of one setting and the areas under them."
    if value == "resample" and isinstance(data, Task):
        data = with_partners(data)
    ablated = Mean(per_position=True) if value == "mean by position" else value
    return compare_curves(model, {"graph": graph}, data, Budgets(method=method), value=ablated)


def with_partners(task: Task) -> Task:
    "The task without prompts whose length no other prompt has: their writes can't be drawn from another."
    lengths = task.last + 1
    rows = (lengths[:, None] == lengths).sum(1) > 1
    return replace(
        task,
        lengths=lengths[rows],
        **{name: getattr(task, name)[rows] for name in ("clean", "corrupted", "answers", "wrong")},
    )


def append(path: Path, rows: pd.DataFrame) -> None:
    rows.round(5).to_csv(path, mode="a", header=not path.exists(), index=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--graph", type=Path, default=ROOT / "graphs/smollm2-head")
    parser.add_argument("--out", type=Path, default=ROOT / "nbs/results")
    parser.add_argument("--n-text", type=int, default=16, help="sequences of 128 tokens")
    parser.add_argument("--n-prompts", type=int, default=64, help="of each task")
    args = parser.parse_args()
    if not args.graph.exists():
        parser.error(f"no graph at {args.graph}: run `make graph` first, or name one with --graph")
    args.out.mkdir(parents=True, exist_ok=True)
    curves_csv, areas_csv = args.out / "faithfulness.csv", args.out / "faithfulness_areas.csv"
    done = set()
    if areas_csv.exists():
        done = {tuple(row) for row in pd.read_csv(areas_csv)[KEY].itertuples(index=False)}
    model, graph, data = load_model("smollm2-135m"), Graph.load(args.graph), {}
    for key in [key for key in settings() if key not in done]:
        name, value, method = key
        if name not in data:
            if name == "text":
                data[name] = held_out(model, args.n_text)
            else:
                data[name] = load_task(name, model, n=args.n_prompts)
        start = time.time()
        areas, curves = measure(model, graph, data[name], value, method)
        columns = dict(zip(KEY, key, strict=True)) | {
            "n_inputs": curves.attrs["n_inputs"],
            "score": curves.attrs["metric"],
        }
        append(curves_csv, curves.drop(columns="graph").assign(**columns))
        append(areas_csv, areas.drop(columns="graph").assign(**columns, seconds=time.time() - start))
        print(key, f"{time.time() - start:.0f} s", flush=True)


def held_out(model: Model, n: int) -> torch.Tensor:
    return load_corpus("default", model, n * 128, seq_len=128, seed=1)


if __name__ == "__main__":
    main()
