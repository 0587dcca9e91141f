"""The library's functions with their options as flat keywords: tests give many options, one or two at a time.

`evaluate(model, graph, text, metric="kl", n_boot=20)` here is
`evaluate(model, graph, text, judging=Judging(metric="kl", n_boot=20))` in the library, without a bar.
"""

from dataclasses import fields

import torch

from circuitgraph.ablation import judge
from circuitgraph.ablation.features import run_selections
from circuitgraph.ablation.selection import ModuleSelection, mask_edges, select
from circuitgraph.ablation.values import AblatedText, Mean, Resample, read_value
from circuitgraph.attribution.method import Attribution, find_method
from circuitgraph.build import build
from circuitgraph.build.prompt import Prompt
from circuitgraph.cut import cut_model, open_cut
from circuitgraph.options import Budgets, Judging, Pruning, Run


def take(options, kind, **names):
    """An option value made of the keywords that belong to it, which are taken out of `options`."""
    known = {field.name for field in fields(kind)} - {"run"}
    given = {names.get(key, key): key for key in options}
    chosen = {field: options.pop(key) for field, key in given.items() if field in known}
    return kind(**chosen)


def take_run(options):
    return take({"progress": False} | {k: options.pop(k) for k in _RUN if k in options}, Run)


_RUN = ("batch_size", "memory", "checkpoint", "progress")


def take_judging(options):
    run, given = take_run(options), {k: options.pop(k) for k in _JUDGING if k in options}
    return Judging(**given, run=run)


_JUDGING = ("metric", "skip_first", "n_boot", "seed", "exact")


def take_value(options, seed=0):
    """The ablated value of the keywords `value`, `reference`, `per_position`."""
    value = options.pop("value", "mean")
    per_position, reference = options.pop("per_position", False), options.pop("reference", None)
    if value == "mean":
        return Mean(reference, per_position)
    assert not per_position and reference is None
    return Resample(seed) if value == "resample" else read_value(value)


def build_graph(model, data, nodes="head", **options):
    """`build_graph` with the options of `Attribution`, `Pruning`, `Run` and `Prompt` as keywords."""
    attribution, target = options.pop("attribution", "ig"), options.pop("target", "node")
    corrupted, run = options.pop("corrupted", None), take_run(options)
    pruning = take(options, Pruning, keep="n_edges")
    if options.pop("positions", "sum") == "keep":
        names = ("n_logits", "logit_mass")
        data = Prompt(data, **{name: options.pop(name) for name in names if name in options})
    if "others" in options:
        nodes = cut_model(model, nodes, options.pop("others"))
    if options:
        grain = nodes if isinstance(nodes, str) else "feature"
        defaults = {"skip_first": 0} if isinstance(data, Prompt) else {}
        defaults["baseline"] = find_method(attribution).default_baseline(target, grain)
        attribution = Attribution(attribution, **(defaults | options))
    return build.build_graph(
        model,
        data,
        nodes,
        attribution=attribution,
        target=target,
        corrupted=corrupted,
        pruning=pruning,
        run=run,
    )


def run_ablated(model, graph, tokens, corrupted=None, value="mean", **options):
    """`run_ablated` with options of values as keywords, masks between zero and one, and a batch size."""
    if options.keys() <= {"reference", "dictionaries", "ablation"}:
        return judge.run_ablated(model, graph, tokens, corrupted, value, **options)
    seed, masks = options.pop("seed", 0), options.pop("masks", None)
    cut = open_cut(model, graph, options.pop("dictionaries", None))
    value = take_value({"value": value} | options, seed)
    fixed = value.fix(cut, AblatedText(tokens, corrupted, run=Run(progress=False)))
    if masks is None:
        kept = [select(cut, graph, options.get("ablation", "edge"))]
    else:
        kept = [select_mask(cut, graph, mask) for mask in masks.view(-1, len(graph))]
    size, exact = options.get("batch_size") or len(tokens), options.get("exact", True)
    streams = []
    for start in range(0, len(tokens), size):
        rows = slice(start, start + size)
        streams.append(torch.stack(list(run_selections(cut, kept, tokens[rows], fixed.of_rows(rows), exact))))
    streams = torch.cat(streams, 1)
    logits = judge.run_logits(model, streams)
    return logits if masks is not None and masks.ndim == 2 else logits[0]


def select_mask(cut, graph, mask):
    """A selection of numbers for the edges of a graph."""
    if graph.meta["nodes"] == "feature":
        return select(cut, graph.keep(mask.bool().cpu().numpy()))
    return ModuleSelection(mask_edges(cut, graph, mask), len(graph))


def evaluate(model, graph, data, ablation="edge", value="mean", **options):
    """`evaluate` with the options of `Judging` and of values as keywords."""
    value = take_value({"value": value} | pop_value(options), options.get("seed", 0))
    dictionaries = options.pop("dictionaries", None)
    judging = take_judging(options)
    assert not options, options
    return judge.evaluate(model, graph, data, ablation, value, dictionaries=dictionaries, judging=judging)


def pop_value(options):
    return {key: options.pop(key) for key in ("value", "reference", "per_position") if key in options}


def judged(function, model, graphs, data, n_edges, options):
    """Call a function of curves or of single edges with keywords."""
    value = take_value(pop_value(options), options.get("seed", 0))
    budgets = {key: options.pop(key) for key in ("method", "by", "clip") if key in options}
    if budgets:
        n_edges = Budgets(n_edges, **budgets)
    mode = {"ablation": options.pop("ablation")} if "ablation" in options else {}
    dictionaries = options.pop("dictionaries", None)
    judging = take_judging(options)
    assert not options, options
    return function(
        model, graphs, data, n_edges, value=value, dictionaries=dictionaries, judging=judging, **mode
    )


def ablation_curve(model, graph, data, n_edges=None, **options):
    """`ablation_curve` with its options as keywords."""
    return judged(judge.ablation_curve, model, graph, data, n_edges, options)


def compare_curves(model, graphs, data, n_edges=None, **options):
    """`compare_curves` with its options as keywords."""
    return judged(judge.compare_curves, model, graphs, data, n_edges, options)


def minimality(model, graph, data, n_edges=100, **options):
    """`minimality` with its options as keywords."""
    return judged(judge.minimality, model, graph, data, n_edges, options)
