"""Small graphs that do a task: the table of tasks in nbs/97_exp_small.ipynb.

    python scripts/exp_small_tasks.py

For each task, graphs of heads and MLPs of SmolLM2 are found on some prompts and judged on others: by EAP-IG
with its edges ordered in three ways, by other methods with their largest edges, by a search (`search_gates`)
that sees neither answers nor metric, at random among the nodes that the search chose, and by EAP-IG with
answers that belong to other prompts. Writes nbs/results/small_tasks.csv, one row a task, rule and budget. A
second run takes the tasks that are there, and goes on with a search that was stopped. CPU time on one core:
30 minutes for indirect objects, fewer for shorter prompts.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from circuitgraph.ablation.judge import faithfulness, measure, open_judge
from circuitgraph.ablation.selection import select
from circuitgraph.cut import ModuleCut, cut_model
from circuitgraph.data.prompts import load_task
from circuitgraph.data.task import Task
from circuitgraph.graph.graph import Graph
from circuitgraph.graph.select import Top, select_edges
from circuitgraph.files import replace_file
from circuitgraph.methods.compare import list_methods
from circuitgraph.methods.gates import GateConfig, search_gates
from circuitgraph.model.loading import load_model
from circuitgraph.options import Judging, Run
from exp_small import draw_graph, keep_or_build

ROOT = Path(__file__).resolve().parent.parent
TASKS = ("ioi", "greater-than", "agreement", "induction", "pronoun", "successor")
BUDGETS = (10_000, 3_000, 1_000, 300)
RULES = {
    "EAP-IG, largest weight": Top(),
    "EAP-IG, largest signed weight": Top(signed=True),
    "EAP-IG, greedy": "greedy",
}
OTHERS = ("EAP", "RelP", "AtP, exact softmax", "flow, per prediction")


def drop_known(task: Task, known: Task, n: int) -> Task:
    "The first prompts of a task that another one does not have."
    seen = {tuple(row) for row in known.clean.tolist()}
    new = [i for i, row in enumerate(task.clean.tolist()) if tuple(row) not in seen]
    rows = new[:n]
    columns = {"clean": task.clean, "corrupted": task.corrupted, "answers": task.answers, "wrong": task.wrong}
    columns["lengths"] = task.lengths
    kept = {name: None if column is None else column[rows] for name, column in columns.items()}
    return replace(task, **kept)


def shuffle_answers(task: Task, seed: int = 0) -> Task:
    "A task in which each prompt has the answers of another."
    order = torch.randperm(len(task), generator=torch.Generator().manual_seed(seed))
    return replace(task, answers=task.answers[order], wrong=task.wrong[order])


def find_graphs(cut: ModuleCut, task: Task, folder: Path, n_steps: int) -> list[tuple[str, int, Graph]]:
    "Each rule's graph at each budget."
    model, methods = cut.model, list_methods("head", "corrupted")

    def search() -> Graph:
        judging = Judging(run=Run(batch_size=8, checkpoint=folder / "unfinished"))
        config = GateConfig(n_steps=n_steps)
        return search_gates(model, task, n_edges=BUDGETS, value="corrupted", config=config, judging=judging)

    def keep(name: str, data: Task) -> Graph:
        file = name.replace(", ", "-").replace(" ", "-")
        return keep_or_build(folder / file, lambda: methods[name.split("; ")[0]](model, data, "head"))

    attributed = keep("EAP-IG", task)
    others = {name: keep(name, task) for name in OTHERS}
    others["EAP-IG, answers of other prompts"] = keep("EAP-IG; shuffled", shuffle_answers(task))
    searched = keep_or_build(folder / "searched", search)
    graphs = []
    for n_edges in BUDGETS:
        graphs += [(name, n_edges, select_edges(attributed, n_edges, rule)) for name, rule in RULES.items()]
        graphs += [(name, n_edges, select_edges(graph, n_edges, Top())) for name, graph in others.items()]
        small = searched.top_edges(n_edges)
        graphs.append(("search", n_edges, small))
        graphs.append(("random among the search's nodes", n_edges, draw_graph(cut, small, 0)))
    return graphs


def judge(cut: ModuleCut, graphs: list[tuple[str, int, Graph]], task: Task) -> pd.DataFrame:
    "The faithfulness of each graph by the task's own metric, with its interval."
    opened = open_judge(cut, task, "corrupted", Judging())
    selections = [select(cut, graph) for *_, graph in graphs]
    scores = measure(opened, [selections[0].none(), *selections])
    own, none, metric = scores["metric"][0], scores["metric"][1], scores["metric"][2:]
    low, high = opened.interval(faithfulness, metric, own, none)
    columns = {"rule": [rule for rule, *_ in graphs], "budget": [n for _, n, _ in graphs]}
    columns |= {"n_edges": [len(graph) for *_, graph in graphs]}
    columns |= {"faithfulness": faithfulness(metric, own, none), "low": low, "high": high}
    kl = scores["kl"][2:]
    kl_low, kl_high = opened.interval(lambda score: score.mean(-1), kl)
    columns |= {"kl": kl.mean(1), "kl_low": kl_low, "kl_high": kl_high}
    columns["accuracy"] = scores["accuracy"][2:].mean(1)
    return pd.DataFrame(columns).assign(metric=task.metric, n_inputs=len(task))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--n-found", type=int, default=32, help="prompts to find graphs on")
    parser.add_argument("--n-judged", type=int, default=64, help="other prompts to judge on")
    parser.add_argument("--n-steps", type=int, default=32, help="steps for each budget of the search")
    parser.add_argument("--out", type=Path, default=ROOT / "nbs/results/small_tasks.csv")
    args = parser.parse_args()
    model = load_model("smollm2-135m")
    cut = cut_model(model, "head")
    for name in args.tasks:
        if args.out.exists() and name in set(pd.read_csv(args.out)["task"]):
            continue
        found_on = load_task(name, model, n=args.n_found, seed=0)
        drawn = load_task(name, model, n=args.n_found + args.n_judged, seed=1)
        judged_on = drop_known(drawn, found_on, args.n_judged)
        graphs = find_graphs(cut, found_on, ROOT / f"graphs/small/tasks/{name}", args.n_steps)
        rows = judge(cut, graphs, judged_on).assign(task=name).round(5)
        table = pd.concat([pd.read_csv(args.out), rows]) if args.out.exists() else rows
        with replace_file(args.out) as partial_table:
            table.to_csv(partial_table, index=False)


if __name__ == "__main__":
    main()
