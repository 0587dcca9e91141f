"""What programs may read: the tables of parents in nbs/98_exp_labels.ipynb.

    make graph
    python scripts/exp_label_parents.py --held-out wikitext-2-test.txt

The dictionaries, the graph and the text are those of `exp_labels.py`. Some features of each module, drawn at
random, get programs that read features alone, and programs that also read whole modules and error nodes.
Writes to nbs/results:

- labels_parents.csv: both tests of each feature; with its own parents, with the module's own pre-activation
  above a fixed threshold, which no sum over parents can beat, and, on half of the text, with dictionaries of
  random directions, on SmolLM2 or (--shuffled) on SmolLM2 with shuffled weights;
- labels_module.csv: cross-entropy with programs in the place of all features of one module, on --held-out.

A second run goes on where the first was stopped. CPU time on one core: 5 minutes for the graph if there is
none, 20 for the rest.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from circuitgraph.attribution.method import Attribution
from circuitgraph.build.build import build_feature_graph
from circuitgraph.cut import FeatureCut, cut_model, part_output
from circuitgraph.data.corpus import load_corpus
from circuitgraph.dictionary.places import visit_modules
from circuitgraph.dictionary.protocol import Dictionary, LinearDictionary
from circuitgraph.graph.graph import Graph
from circuitgraph.label.fit import WRITERS, LabelConfig, fit_threshold
from circuitgraph.label.nodes import SKIP_FIRST, SWAPPED, Activities, fit_chunk, give_chunk, list_parents
from circuitgraph.label.nodes import read_activities, score_programs, split_text
from circuitgraph.label.programs import Program, Threshold
from circuitgraph.label.replaced import describe_losses, next_token_losses, run_replaced
from circuitgraph.label.summands import has_summands
from circuitgraph.model.loading import load_model
from circuitgraph.options import Judging, Pruning, Run
from exp_labels import ROOT, keep_or_build, open_dictionaries, open_parser
from exp_small_features import add_row, has_row
from exp_small_nulls import shuffle_weights

RUN = Run(batch_size=32)
CONFIGS = {"all": LabelConfig(writers="all", n_used=10), "features": LabelConfig()}
NULL_MODULES = ("a8", "m8", "m10")  # whose features are labelled with random directions
CHUNK = 64  # features whose summands are computed together


def build_graph(cut: FeatureCut, folder: Path, into: tuple[str, ...] | None = None) -> Graph:
    "The graph of some dictionaries."
    small = load_corpus("default", cut.model, 1024, seq_len=128)
    build = partial(build_feature_graph, cut, small, Attribution(), Pruning(n_edges=100), RUN, into=into)
    return keep_or_build(folder, build)


def list_pool(cut: FeatureCut, graph: Graph, config: LabelConfig) -> dict[str, list[str]]:
    "The parents of each feature that programs may read."
    whole = [part.module for part in cut.parts[:-1] if config.writers == "all" and has_summands(part)]
    return list_parents(graph, config.n_parents, whole)


def draw_features(found: Activities, pool: Mapping[str, list[str]], n: int) -> list[str]:
    "Some live features of each module, at random: those that have parents and fire often enough."
    by_module: dict[str, list[str]] = {}
    for name in pool:
        reader = found.read(name, ())
        n_fires = int((reader.acts[reader.counted] > 0).sum())
        if n_fires >= LabelConfig().min_active:
            by_module.setdefault(name.split("/")[0], []).append(name)
    generator, drawn = np.random.default_rng(0), []
    for names in by_module.values():
        chosen = generator.choice(names, min(n, len(names)), replace=False)
        drawn += sorted(map(str, chosen))
    return drawn


def fit_programs(
    found: Activities, parents: Mapping[str, list[str]], config: LabelConfig, n_vocab: int
) -> dict[str, Program]:
    "The programs of some features with given parents."
    every, programs = list(parents.items()), {}
    for start in range(0, len(every), CHUNK):
        chunk = every[start : start + CHUNK]
        fits = fit_chunk(found, chunk, give_chunk(found, chunk), config, n_vocab)
        for (name, _), fit in zip(chunk, fits, strict=True):
            if fit.program is not None:
                programs[name] = fit.program
    return programs


def test_programs(
    cut: FeatureCut, programs: Mapping[str, Program], names: list[str], text: torch.Tensor, writers: str
) -> pd.DataFrame:
    "Both tests; a row for each feature, empty where it has no program."
    swapped = score_programs(cut, programs, text, SWAPPED, writers=writers, run=RUN).add_suffix("_intervened")
    table = score_programs(cut, programs, text, writers=writers, run=RUN).join(swapped)
    shown = {
        "function": {name: one.kind for name, one in programs.items()},
        "selector": {name: one.selector for name, one in programs.items()},
        "n_parents": {name: len(one.parents) for name, one in programs.items()},
        "n_whole": {name: len(one.whole) for name, one in programs.items()},
    }
    described = table.join(pd.DataFrame(shown)).reindex(names).rename_axis("name")
    return described.drop(columns=["n_active_intervened"]).reset_index().assign(writers=writers)


def read_pre(cut: FeatureCut, text: torch.Tensor, names: list[str]) -> dict[str, np.ndarray]:
    "The pre-activations and activations `[position 2]` of some features."
    rows: dict[str, list[np.ndarray]] = {name: [] for name in names}
    index: dict[str, list[int]] = {}
    for name in names:
        module, number = name.split("/")
        index.setdefault(module, []).append(int(number))

    def visit(kind: str, layer: int, places: dict[str, torch.Tensor]) -> None:
        for part in cut.parts[:-1]:
            if f"{kind}{layer}" != part.module or part.module not in index:
                continue
            assert part.structure is not None and part.dictionary is not None
            read = part_output(cut.model, part, places) if part.reads == "output" else places[part.reads]
            pre = read @ part.structure.W_enc + part.structure.b_enc
            both = torch.stack([pre, part.dictionary.encode(read)], -1)[:, SKIP_FIRST:].flatten(0, 1)
            for number in index[part.module]:
                rows[f"{part.module}/{number}"].append(both[:, number].double().numpy())

    for batch in text.split(16):
        with torch.no_grad():
            visit_modules(
                cut.model, batch, visit, 1 + max(part.layer for part in cut.parts if part.dictionary)
            )
    return {name: np.concatenate(some) for name, some in rows.items()}


def score_threshold(found: np.ndarray, tested: np.ndarray) -> dict[str, float]:
    "R2 and F1 of a pre-activation above a threshold that was found on other text."
    fires = found[:, 1] > 0
    rule = (
        fit_threshold(found[:, :1], found[:, 1], np.ones(len(found))) if fires.any() else Threshold((0.0,), 0)
    )
    predicted, acts = rule(tested[:, :1]), tested[:, 1]
    error = ((acts - predicted) ** 2).sum()
    hits = ((acts > 0) & (predicted > 0)).sum()
    n_fires, n_on = (acts > 0).sum(), (predicted > 0).sum()
    total = acts.var() * len(acts)
    r2 = 1 - error / total if total else np.nan
    return {"r2": r2, "f1": 2 * hits / max(n_fires + n_on, 1), "n_active": int(n_fires)}


def find_ceiling(
    cut: FeatureCut, names: list[str], found_on: torch.Tensor, text: torch.Tensor
) -> pd.DataFrame:
    "What a program would reach that gives the pre-activation itself, above one threshold."
    found, tested = (read_pre(cut, one, names) for one in (found_on, text))
    rows = [{"name": name, **score_threshold(found[name], tested[name])} for name in names]
    return pd.DataFrame(rows).assign(writers="all")


def draw_directions(dictionary: Dictionary, seed: int) -> LinearDictionary:
    "A dictionary of the same kind with random directions, as long as those of the dictionary."
    assert isinstance(dictionary, LinearDictionary)
    generator = torch.Generator().manual_seed(seed)
    W_enc = torch.randn(dictionary.W_enc.shape, generator=generator)
    W_enc = W_enc / W_enc.norm(dim=0) * dictionary.W_enc.norm(dim=0)
    W_dec = W_enc.mT
    if dictionary.reads != "output":
        W_dec = torch.randn(dictionary.W_dec.shape, generator=generator)
    length = dictionary.W_dec.norm(dim=1, keepdim=True)
    W_dec = W_dec / W_dec.norm(dim=1, keepdim=True) * length
    zeros = torch.zeros_like(dictionary.b_enc)
    return replace(dictionary, W_enc=W_enc, W_dec=W_dec.contiguous(), b_enc=zeros, meta={})


def make_rows(
    cut: FeatureCut,
    graph: Graph,
    kinds: Mapping[str, Callable],
    args: argparse.Namespace,
    programs_over: Sequence[str] = WRITERS,
) -> None:
    "Rows of some kinds of parents for each kind of programs."
    text = load_corpus("default", cut.model, args.n_tokens, seq_len=128, seed=1)
    found_on, tested_on = split_text(text)
    n_vocab, file = cut.model.d_vocab, args.out / "labels_parents.csv"
    for writers in programs_over:
        config = CONFIGS[writers]
        missing = [kind for kind in kinds if not has_row(file, parents=kind, writers=writers)]
        if not missing:
            continue
        found = read_activities(cut.model, graph, found_on, cut.dictionaries, RUN, writers)
        pool = list_pool(cut, graph, config)
        names = draw_features(found, pool, args.n_features)
        for kind in missing:
            parents = kinds[kind](found, names, pool)
            programs = fit_programs(found, parents, config, n_vocab)
            table = test_programs(cut, programs, names, tested_on, writers)
            add_row(file, table.assign(parents=kind).round(4))
        if "its own" in kinds and writers == "all":
            table = find_ceiling(cut, names, found_on, tested_on)
            add_row(file, table.assign(parents="own pre-activation").round(4))


def take_own(_: Activities, names: list[str], pool: Mapping[str, list[str]]) -> dict[str, list[str]]:
    "Each feature's own parents."
    return {name: pool[name] for name in names}


@torch.no_grad()
def roll_module(cut: FeatureCut, graph: Graph, module: str, args: argparse.Namespace) -> None:
    "Programs in the place of all features of one module."
    file = args.out / "labels_module.csv"
    text = load_corpus("default", cut.model, args.n_tokens, seq_len=128, seed=1)
    found_on, _ = split_text(text)
    judged_on = load_corpus(args.held_out, cut.model, args.n_judged * 64, seq_len=64)
    config, writers = CONFIGS["all"], "all"
    if has_row(file, writers=writers, module=module):
        return
    found = read_activities(cut.model, graph, found_on, cut.dictionaries, RUN, writers)
    pool = list_pool(cut, graph, config)
    of_module = {name: parents for name, parents in pool.items() if name.startswith(f"{module}/")}
    programs = fit_programs(found, of_module, config, cut.model.d_vocab)
    silence = dict.fromkeys(programs, 0.0)
    every = {f"{module}/{i}": 0.0 for i in range(cut.dictionaries[module].d_dict)}
    runs = {"nothing": {}, "program": programs, "silence": silence, "silence of all": every}
    losses = [next_token_losses(run_replaced(cut, one, judged_on), judged_on) for one in runs.values()]
    table = describe_losses(torch.stack(losses), Judging(run=RUN))
    table.insert(0, "replaced_by", list(runs))
    n_features = [len(one) for one in runs.values()]
    described = table.assign(n_features=n_features, module=module, writers=writers, n_seq=len(judged_on))
    add_row(file, described.round(5))


def read_arguments() -> argparse.Namespace:
    "The options of the command."
    parser = open_parser(__doc__)
    parser.add_argument("--n-tokens", type=int, default=32_000, help="half to find programs, half to test")
    parser.add_argument("--n-features", type=int, default=120, help="of each module")
    parser.add_argument("--modules", nargs="+", default=["m8", "m10"], help="whose features are all replaced")
    parser.add_argument("--shuffled", action="store_true", help="random directions on shuffled weights too")
    parser.add_argument("--n-judged", type=int, default=32, help="sequences of 64 tokens to run labels on")
    parser.add_argument("--out", type=Path, default=ROOT / "nbs/results")
    return parser.parse_args()


def main() -> None:
    args = read_arguments()
    model = load_model("smollm2-135m")
    dictionaries = open_dictionaries(model, args)
    cut = cut_model(model, dictionaries)
    assert isinstance(cut, FeatureCut)
    graph = build_graph(cut, args.folder / "graph")
    make_rows(cut, graph, {"its own": take_own}, args)
    for module in args.modules:
        roll_module(cut, graph, module, args)
    others = {"random directions": model}
    if args.shuffled:
        others["random directions, shuffled weights"] = shuffle_weights(0)
    half = argparse.Namespace(
        **vars(args) | {"n_tokens": args.n_tokens // 2, "n_features": args.n_features // 2}
    )
    for kind, other in others.items():
        drawn = {name: draw_directions(one, seed) for seed, (name, one) in enumerate(dictionaries.items())}
        random_cut = cut_model(other, drawn)
        assert isinstance(random_cut, FeatureCut)
        folder = args.folder / kind.replace(", ", "-").replace(" ", "-")
        random_graph = build_graph(random_cut, folder, NULL_MODULES)
        make_rows(random_cut, random_graph, {kind: take_own}, half, ["all"])


if __name__ == "__main__":
    main()
