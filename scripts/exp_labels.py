"""Labels of features: the tables of nbs/98_exp_labels.ipynb.

    make graph
    python scripts/exp_labels.py --held-out wikitext-2-test.txt

Layers 8 to 11 of SmolLM2-135M are cut into features: attention layers by the autoencoders of `make graph`,
MLPs by transcoders, which are trained here. Each feature gets a program over its parents.
Writes to nbs/results:

- labels_features.csv: a row for each feature that was tried, with its two tests;
- labels_nulls.csv: some features, labelled with the parents of another feature, and by a table of tokens;
- labels_rolled.csv: cross-entropy with programs in the place of features, on the text of --held-out;
- labels_best.csv: the same with programs only that did well when they were tested;
- labels_examples.csv: the 40 programs that do best when parents are swapped;
- labels_by_text.csv: how many features of each module pass, added for each amount of text (--n-tokens);
- labels_rulers.csv: programs, linear fits and edge ablation side by side, on the start of that text.

A second run goes on where the first was stopped; other text needs another --folder. CPU time on one core: 8
minutes to train, 5 for the graph, 25 for labels, 25 for the rest.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import torch

from circuitgraph.attribution.method import Attribution
from circuitgraph.build.build import build_feature_graph
from circuitgraph.cut import FeatureCut, cut_model
from circuitgraph.data.corpus import load_corpus
from circuitgraph.dictionary.protocol import Dictionary
from circuitgraph.dictionary.store import load_dictionaries
from circuitgraph.dictionary.train import train_dictionaries
from circuitgraph.dictionary.trainer import TrainConfig
from circuitgraph.graph.graph import Graph
from circuitgraph.files import replace_file
from circuitgraph.label.fit import LabelConfig, fit_program
from circuitgraph.label.nodes import SWAPPED, Activities, keep_tested, label_nodes, list_parents
from circuitgraph.label.nodes import list_selectors, read_activities, score_programs, split_text
from circuitgraph.label.replaced import compare_rulers, judge_labelled
from circuitgraph.model.blocks import Model
from circuitgraph.model.loading import load_model
from circuitgraph.options import Judging, Pruning, Run
from exp_small_features import add_row, has_row

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path.home() / ".cache/circuitgraph/dictionaries"
LAYERS = range(8, 12)
SHARES = (0.1, 0.25, 1.0)
LEAST = (0.0, 0.3, 0.5)  # R2 of programs
RULED = 8  # sequences for edge ablation, which runs each feature on an input of its own
JUDGING = Judging(run=Run(batch_size=32))
TESTS = ["r2", "f1", "r2_intervened", "f1_intervened"]
COLUMNS = ["name", "function", "bits", "saved", *TESTS]


def write_table(table: pd.DataFrame, path: Path) -> None:
    "Write a table whole."
    with replace_file(path) as partial:
        table.to_csv(partial, index=False)


def keep_or_build(folder: Path, build: Callable[[], Graph]) -> Graph:
    "A graph that an earlier run has kept, or a new one."
    if not (folder / "meta.json").exists():
        build().save(folder)
    return Graph.load(folder)


def open_dictionaries(model: Model, args: argparse.Namespace) -> dict[str, Dictionary]:
    "Autoencoders of attention layers and transcoders of MLPs."
    text = load_corpus("default", model, 50_000, seq_len=128)
    attention = [f"a{layer}" for layer in LAYERS]
    mlps = [f"m{layer}" for layer in LAYERS]
    config = TrainConfig(n_steps=600, transcode=True)
    transcoders = train_dictionaries(model, text, mlps, config, out=args.transcoders)
    found = dict(load_dictionaries(args.dictionaries, model, modules=attention)) | transcoders
    return {name: found[name] for layer in LAYERS for name in (f"a{layer}", f"m{layer}")}


def score_tokens(found: Activities, tested: Activities, names: list[str]) -> pd.DataFrame:
    "How well a table of tokens gives each feature on the held-out text: its mean activation at each token."
    rows = []
    token_found, token_tested = found.text.tokens.ravel(), tested.text.tokens.ravel()
    n_vocab = 1 + max(token_found.max(), token_tested.max())
    count = np.bincount(token_found[found.counted], minlength=n_vocab)
    for name in names:
        own, other = (one.read(name, ()).acts for one in (found, tested))
        total = np.bincount(token_found, own, minlength=n_vocab)
        fires = np.bincount(token_found, own > 0, minlength=n_vocab)
        seen = np.maximum(count, 1)
        acts = other[tested.counted]
        token = token_tested[tested.counted]
        predicted, fired = (total / seen)[token], (2 * fires >= seen)[token] & (count > 0)[token]
        error = ((acts - predicted) ** 2).sum()
        hits = 2 * ((acts > 0) & fired).sum() / max((acts > 0).sum() + fired.sum(), 1)
        rows.append({"name": name, "r2": 1 - error / max(acts.var() * len(acts), 1e-12), "f1": hits})
    return pd.DataFrame(rows)


def swap_readers(graph: Graph, names: list[str], parents: dict[str, list[str]]) -> dict[str, list[str]]:
    "For each feature, the parents of another one of its module with the nearest frequency."
    frequency = graph.nodes.set_index("name")["frequency"]
    swapped = {}
    for name in names:
        others = [other for other in parents if other.split("/")[0] == name.split("/")[0] and other != name]
        distance = [abs(frequency[other] - frequency[name]) for other in others]
        swapped[name] = parents[others[int(np.argmin(distance))]]
    return swapped


def make_nulls(
    model: Model,
    graph: Graph,
    cut: FeatureCut,
    text: torch.Tensor,
    dictionaries: dict[str, Dictionary],
    n: int,
) -> pd.DataFrame:
    "Labels of some features with their own parents, with those of another feature, and by their tokens."
    found_on, tested_on = split_text(text)
    found = read_activities(model, graph, found_on, dictionaries, Run())
    tested = read_activities(model, graph, tested_on, dictionaries, Run())
    parents = list_parents(graph, LabelConfig().n_parents)
    tried = graph.nodes.loc[graph.nodes["bits"] > 0, "name"].astype(str).tolist()
    generator = np.random.default_rng(0)
    names = [str(name) for name in generator.choice(tried, n, replace=False)]
    tables = [score_tokens(found, tested, names).assign(parents="table of tokens")]
    for kind, given in (("its own", parents), ("of another feature", swap_readers(graph, names, parents))):
        fits = {
            name: fit_program(
                found.read(name, given[name]), list_selectors(name), n_vocab=model.d_vocab
            ).program
            for name in names
        }
        programs = {name: program for name, program in fits.items() if program is not None}
        swapped = score_programs(cut, programs, tested_on, SWAPPED).add_suffix("_intervened")
        table = score_programs(cut, programs, tested_on).join(swapped)
        reads = {name: len(program.parents) for name, program in programs.items()}
        table = table.assign(n_parents=pd.Series(reads)).reindex(names).rename_axis("name").reset_index()
        tables.append(table.assign(parents=kind))
    return pd.concat(tables)


def compare_three(
    model: Model, labelled: Graph, dictionaries: dict[str, Dictionary], text: torch.Tensor
) -> pd.DataFrame:
    "Programs that did well when they were tested, linear fits and edge ablation."
    tables = []
    found_on = load_corpus("default", model, 8192, seq_len=128, seed=1)
    for least in LEAST[::2]:
        options = {"found_on": found_on, "judging": JUDGING}
        table = compare_rulers(model, keep_tested(labelled, least), text, dictionaries, **options)
        tables.append(table.assign(least=least))
    return pd.concat(tables).assign(n_seq=len(text))


def open_parser(description: str | None) -> argparse.ArgumentParser:
    "The options of all commands that label features."
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter)
    parser.add_argument("--held-out", required=True, help="a text file that nothing was found on")
    parser.add_argument("--dictionaries", type=Path, default=CACHE / "smollm2-135m-layers-8-11")
    parser.add_argument("--transcoders", type=Path, default=CACHE / "smollm2-135m-transcoders")
    parser.add_argument("--folder", type=Path, default=ROOT / "graphs/labels")
    return parser


def read_arguments() -> argparse.Namespace:
    "The options of the command."
    parser = open_parser(__doc__)
    parser.add_argument(
        "--n-tokens", type=int, default=32_000, help="half to find programs, half to test them"
    )
    parser.add_argument("--n-judged", type=int, default=32, help="sequences of 64 tokens to run labels on")
    parser.add_argument("--n-nulls", type=int, default=400, help="features labelled for the nulls")
    parser.add_argument("--n-jobs", type=int, default=2, help="processes that find programs")
    parser.add_argument("--out", type=Path, default=ROOT / "nbs/results")
    return parser.parse_args()


def list_tried(labelled: Graph) -> pd.DataFrame:
    "The features that were tried: those with parents that fire often enough."
    nodes = labelled.nodes
    is_feature = (nodes["kind"] == "feature") & nodes["bits"].notna()
    tried = nodes[is_feature & ~nodes["no_label"].str.startswith("active at")]
    saved = tried["bits_saved"] / tried["bits"]
    tests = tried[TESTS].replace(-np.inf, np.nan).round(3)
    function = tried["function"].replace("", "none")
    return tried.assign(saved=saved.round(3), bits=tried["bits"].round(), function=function, **tests)


def count_passing(tried: pd.DataFrame, n_tokens: int) -> pd.DataFrame:
    "The part of each module's features with a program, and of those that pass the tests."
    held_out = (tried[["r2", "f1"]] >= 0.5).all(axis=1)
    flags = {"labelled": tried["function"] != "none", "held_out": held_out}
    flags["passes"] = held_out & (tried["r2_intervened"] >= 0.5)
    module = tried["name"].str.split("/").str[0]
    counts = pd.DataFrame(flags).groupby(module).sum().rename_axis("module").reset_index()
    tried_in = module.value_counts()
    return counts.assign(tried=counts["module"].map(tried_in), n_tokens=n_tokens)


def roll_labels(
    model: Model, labelled: Graph, dictionaries: dict[str, Dictionary], text: torch.Tensor
) -> pd.DataFrame:
    "Cross-entropy with programs in the place of features: of all modules together, and of each MLP alone."
    tables = []
    for error in (True, False):
        options = {"error": error, "judging": JUDGING}
        table = judge_labelled(model, labelled, text, dictionaries, shares=SHARES, **options)
        tables.append(table.assign(modules="all", error=error))
    for module in (name for name in dictionaries if name.startswith("m")):
        options = {"modules": [module], "judging": JUDGING}
        table = judge_labelled(model, labelled, text, dictionaries, shares=[1.0], **options)
        tables.append(table.assign(modules=module, error=True))
    return pd.concat(tables).assign(n_seq=len(text))


def roll_best(
    model: Model, labelled: Graph, dictionaries: dict[str, Dictionary], text: torch.Tensor
) -> pd.DataFrame:
    "Cross-entropy with programs only that did well when they were tested."
    tables = []
    for least in LEAST:
        kept = keep_tested(labelled, least)
        table = judge_labelled(model, kept, text, dictionaries, shares=[1.0], judging=JUDGING)
        tables.append(table.assign(least=least))
    return pd.concat(tables).assign(n_seq=len(text))


def main() -> None:
    args = read_arguments()
    model = load_model("smollm2-135m")
    dictionaries = open_dictionaries(model, args)
    cut = cut_model(model, dictionaries)
    small = load_corpus("default", model, 1024, seq_len=128)
    build = partial(build_feature_graph, cut, small, Attribution(), Pruning(n_edges=100), Run())
    graph = keep_or_build(args.folder / "graph", build)
    text = load_corpus("default", model, args.n_tokens, seq_len=128, seed=1)
    run = Run(batch_size=32, checkpoint=args.folder / "unfinished")
    label = partial(label_nodes, graph, model, text, dictionaries, run=run)
    with joblib.parallel_config(n_jobs=args.n_jobs):
        labelled = keep_or_build(args.folder / "labelled", label)
    tried = list_tried(labelled)
    write_table(tried[COLUMNS], args.out / "labels_features.csv")
    if not has_row(args.out / "labels_by_text.csv", n_tokens=args.n_tokens):
        add_row(args.out / "labels_by_text.csv", count_passing(tried, args.n_tokens))
    best = tried[tried["function"] != "none"].sort_values("r2_intervened", ascending=False)
    write_table(best.head(40)[[*COLUMNS, "program"]], args.out / "labels_examples.csv")
    judged_on = load_corpus(args.held_out, model, args.n_judged * 64, seq_len=64)
    if not (args.out / "labels_rolled.csv").exists():
        rolled = roll_labels(model, labelled, dictionaries, judged_on)
        write_table(rolled.round(5), args.out / "labels_rolled.csv")
    if not (args.out / "labels_best.csv").exists():
        write_table(
            roll_best(model, labelled, dictionaries, judged_on).round(5), args.out / "labels_best.csv"
        )
    if not (args.out / "labels_rulers.csv").exists():
        rulers = compare_three(model, labelled, dictionaries, judged_on[:RULED])
        write_table(rulers.round(5), args.out / "labels_rulers.csv")
    if not (args.out / "labels_nulls.csv").exists():
        nulls = make_nulls(model, labelled, cut, text, dictionaries, args.n_nulls)
        write_table(nulls.round(4), args.out / "labels_nulls.csv")


if __name__ == "__main__":
    main()
