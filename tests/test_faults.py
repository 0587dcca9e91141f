"""A campaign of faults: each argument of a public function is given what it can't be, and refused by name.

The cases follow from the signatures: each argument of a call that works is replaced by values that its
annotation does not allow, or that no argument of that kind can have. A refusal is a ValueError or TypeError,
or an OSError for a path. It names the argument, says what it must be, and leaves no file.
"""

import inspect
import math
import re

import numpy as np
import pytest
import torch

import circuitgraph as cg
from circuitgraph.checks import LEAST, _list_kinds
from circuitgraph.community.behaviour import Matching
from circuitgraph.community.search import find_communities
from circuitgraph.dictionary.interaction import BasisConfig
from circuitgraph.graph.select import Coverage
from circuitgraph.label.fit import LabelConfig
from circuitgraph.methods.compare import Comparing
from circuitgraph.methods.gates import GateConfig
from circuitgraph.methods.masks import MaskConfig, integrate_masks, learn_masks, prune_greedily
from circuitgraph.methods.patching import patch_edges, patch_nodes
from circuitgraph.model.loading import tiny_model
from feature_oracles import all_dictionaries
from oracles import random_tokens

pytestmark = pytest.mark.filterwarnings("ignore", "error:::circuitgraph")

QUIET = cg.Run(progress=False)
JUDGED = cg.Judging(n_boot=5, run=QUIET)


class World:
    "What the calls that work need, made once."

    def __init__(self):
        self.model = tiny_model("llama", dtype=torch.float32)
        self.text = random_tokens(self.model, 4, 8)
        self.task = cg.Task(self.text, random_tokens(self.model, 4, 8, seed=9), metric=lambda x: x[:, -1, 3])
        self.dictionaries = all_dictionaries(self.model)
        self.graph = cg.build_graph(self.model, self.text, "layer", run=QUIET)
        self.fine = cg.build_graph(self.model, self.text, self.dictionaries, run=QUIET)
        self.grouped = find_communities(self.graph)


WORLD = World()


def call_of(function, **arguments):
    "A function and the arguments of a call of it that works."
    return function, arguments


def list_calls(world):
    "A call that works, for each function."
    model, graph, text, fine = world.model, world.graph, world.text, world.fine
    judged = {"model": model, "graph": graph, "data": text, "judging": JUDGED}
    patched = {"model": model, "data": world.task, "nodes": "layer", "judging": JUDGED}
    behaviours = {"behaviours": {"late": torch.ones_like(text, dtype=torch.bool)}, "run": QUIET}
    calls = [
        call_of(
            cg.build_graph, model=model, data=text, nodes="layer", attribution="ig", target="node", run=QUIET
        ),
        call_of(cg.complete_graph, model=model, nodes="layer", ports="split"),
        call_of(cg.cut_model, model=model, nodes="layer", others="layer"),
        call_of(cg.evaluate, **judged, ablation="edge", value="mean"),
        call_of(cg.ablation_curve, **judged, n_edges=[3], ablation="edge", value="mean"),
        call_of(
            cg.compare_curves,
            model=model,
            graphs={"one": graph},
            data=text,
            n_edges=[3],
            ablation="edge",
            value="mean",
            judging=JUDGED,
        ),
        call_of(cg.minimality, **judged, n_edges=3, value="mean"),
        call_of(cg.run_ablated, model=model, graph=graph, tokens=text, value="mean", ablation="edge"),
        call_of(cg.select_edges, graph=graph, n=3, method="greedy", by="weight", prune=True),
        call_of(
            cg.find_communities,
            graph=graph,
            method="leiden",
            weight="share",
            resolution=1.0,
            seed=0,
            n_seeds=1,
        ),
        call_of(
            cg.judge_communities,
            graph=world.grouped,
            method="leiden",
            weight="share",
            resolution=1.0,
            n_null=2,
            n_seeds=2,
            seed=0,
        ),
        call_of(
            cg.match_behaviours, model=model, graph=world.grouped, tokens=text, value="mean", **behaviours
        ),
        call_of(
            cg.compare_methods,
            model=model,
            found_on=text,
            judged_on=text,
            methods={"random": cg.list_methods("layer")["random"]},
            n_edges=[3],
            nodes="layer",
            value="mean",
            comparing=Comparing(n_boot=5, progress=False),
        ),
        call_of(cg.list_methods, nodes="head", value="mean"),
        call_of(cg.rank_edges, graph=graph, by="weight", node="m0", least_count=1, skip_first=0),
        call_of(cg.explore, graph=graph, model=model, n_edges=10),
        call_of(cg.cut_edges, model=model, graph=graph, edges=["embed->logits"], tokens=text, value="mean"),
        call_of(
            cg.steer,
            model=model,
            dictionaries=world.dictionaries,
            features={"m0/0": 1.0},
            prompt=text[:1],
            max_new_tokens=2,
            temperature=0.0,
            seed=0,
        ),
        call_of(
            cg.label_nodes,
            graph=fine,
            model=model,
            corpus=text,
            dictionaries=world.dictionaries,
            config=LabelConfig(),
            nodes=["m0/0"],
            run=QUIET,
        ),
        call_of(cg.explain, graph=fine, node="m0/0", depth=2),
        call_of(
            cg.run_labelled,
            model=model,
            graph=fine,
            tokens=text,
            dictionaries=world.dictionaries,
            share=1.0,
            error=True,
        ),
        call_of(
            cg.compare_graphs,
            graph=graph,
            other=graph,
            text=text,
            models=(model, model),
            n_classes=40,
            run=QUIET,
        ),
        call_of(cg.neuron_basis, model=model, module="m0"),
        call_of(
            cg.train_dictionaries, model=model, corpus=text, modules=["m0"], checkpoint_every=1, n_workers=1
        ),
        call_of(cg.load_corpus, source=["a text " * 99], model=model, n_tokens=8, seq_len=4, seed=0),
        call_of(
            cg.load_task,
            source="ioi",
            model=model,
            n=4,
            seed=0,
            check=True,
            batch_size=4,
            multi_token="refuse",
        ),
        call_of(cg.load_model, source="void", device="cpu", dtype=torch.float32),
        call_of(cg.load_dictionaries, source="void", model=model, modules=["m0"], trust=False),
        call_of(cg.save_dictionary, dictionary=world.dictionaries["m0"], folder="saved", d_in=16),
        call_of(cg.plot_layers, graph=graph, n_edges=3, by="weight", levels=[3], height=100),
        call_of(cg.view, graph=graph, n_edges=3),
        call_of(cg.write_report, graph=graph, path="report.html", n_edges=3),
        call_of(cg.view_features, model=model, dictionary=world.dictionaries["m0"], corpus=text, n=2),
        call_of(cg.view_communities, graph=world.grouped, method="leiden", resolutions=[1.0], n=2),
        call_of(cg.Graph, nodes=graph.nodes, edges=graph.edges, meta=graph.meta),
        call_of(graph.top_edges, n=3, by="weight"),
        call_of(graph.threshold, minimum=0.1, by="weight"),
        call_of(graph.merge, other=graph.keep([])),
        call_of(graph.keep, edges=graph.edge_names[:1]),
        call_of(patch_edges, **patched, value="mean"),
        call_of(prune_greedily, **patched, threshold=0.1, value="mean"),
        call_of(learn_masks, **patched, config=MaskConfig(n_steps=1), value="mean"),
        call_of(integrate_masks, **patched, n_steps=1, path="line", value="mean"),
        call_of(
            patch_nodes,
            model=model,
            task=world.task,
            nodes="layer",
            value="mean",
            exact_softmax=True,
            grad_drop=True,
            run=QUIET,
        ),
        call_of(cg.Task, clean=text, corrupted=text, metric="ce", answers=text[:, :1]),
        call_of(cg.Prompt, tokens=text[:1], n_logits=3, logit_mass=0.5),
    ]
    matrices = {"W_enc": torch.ones(16, 4), "W_dec": torch.ones(4, 16), "b_enc": torch.ones(4)}
    calls += [
        call_of(
            cg.LinearDictionary, module="m0", reads="output", **matrices, b_dec=torch.ones(16), gate=cg.Gate()
        ),
        call_of(
            cg.FunctionDictionary,
            module="m0",
            reads="output",
            d_dict=4,
            encoder=torch.sinh,
            decoder=torch.asinh,
        ),
        call_of(cg.Gate, kind="topk", k=2),
    ]
    options = (
        cg.Run,
        cg.Pruning,
        cg.Judging,
        cg.Budgets,
        cg.TrainConfig,
        cg.Attribution,
        Matching,
        LabelConfig,
    )
    for kind in (*options, MaskConfig, GateConfig, BasisConfig, Comparing, Coverage):
        parameters = inspect.signature(kind).parameters
        calls.append(call_of(kind, **{name: parameter.default for name, parameter in parameters.items()}))
    return {function.__name__: (function, arguments) for function, arguments in calls}


NUMBERS = {"text": "3", "NaN": math.nan, "huge": 10**30, "list": [1]}
OBJECTS = {"number": 7, "text": "nothing", "list": [1], "object": object()}
BAD = {  # by the kind of an argument: what it can't be
    int: NUMBERS | {"fraction": 2.5, "negative": -1, "bool": True},
    float: NUMBERS | {"infinite": math.inf, "bool": True, "complex": 1j},
    str: {"number": 7, "unknown": "no such thing", "bytes": b"mean", "list": ["a", 3]},
    bool: {"text": "yes", "number": 2, "NaN": math.nan},
    "tensor": {
        "list": [[1, 2]],
        "floating": torch.rand(4, 8),
        "empty": torch.zeros(0, 8, dtype=torch.long),
        "no positions": torch.zeros(4, 0, dtype=torch.long),
        "flat": torch.arange(4),
        "beyond the vocabulary": torch.full((4, 8), 10_000),
        "negative": torch.full((4, 8), -1),
        "too long": torch.zeros(1, 10_000, dtype=torch.long),
        "array": np.zeros((4, 8)),
        "on a device without numbers": torch.zeros(4, 8, dtype=torch.long, device="meta"),
        "text": "a text",
    },
    "matrix": {
        "list": [[1.0]],
        "NaN": torch.full((16, 4), math.nan),
        "infinite": torch.full((4, 16), math.inf),
        "flat": torch.ones(4),
        "whole numbers": torch.ones(4, 16, dtype=torch.long),
        "shape": torch.ones(3, 5),
        "text": "a text",
    },
    "object": OBJECTS,
    "series": {"number": 7, "mixed": [1, "a"], "object": object(), "NaN": [math.nan], "negative": [-1]},
    "path": {"number": 7, "object": object()},
    "mapping": {"number": 7, "list": [1], "values": {"m0": 3}, "object": object()},
}
_LATER = ("beyond the vocabulary", "negative", "too long")  # a task alone has no model to compare with
ALLOWED = {  # what an argument may be, although another of its kind may not
    *(
        (owner, name, case)
        for owner in ("Task", "Prompt")
        for name in ("clean", "corrupted", "tokens")
        for case in _LATER
    ),
    ("Task", "answers", "beyond the vocabulary"),
    ("LinearDictionary", "module", "unknown"),  # the model that it is placed in says so
    ("FunctionDictionary", "module", "unknown"),
    ("LinearDictionary", "reads", "unknown"),
    ("FunctionDictionary", "reads", "unknown"),
    ("explain", "node", "unknown"),
    ("LinearDictionary", "b_enc", "flat"),  # it is flat
    ("Judging", "metric", "unknown"),  # the data that it is measured on says so
    ("Budgets", "by", "unknown"),  # and the graph
    ("build_graph", "data", "text"),  # a prompt
    ("cut_edges", "tokens", "text"),
    ("steer", "prompt", "text"),
}
MATRICES = {"W_enc", "W_dec", "b_enc", "b_dec", "b_in", "W_skip", "threshold", "b_gate", "r_mag", "b_mag"}


def kind_of(name, annotation, default):
    "Under which kind of `BAD` an argument falls; None for what takes everything."
    kinds = _list_kinds(annotation)
    if name in MATRICES:
        return "matrix"
    if any(hasattr(kind, "array_type") for kind in kinds):
        return "tensor"
    if any(kind is inspect.Parameter.empty or str(kind) == "typing.Any" for kind in kinds):
        return None
    origins = [getattr(kind, "__origin__", kind) for kind in kinds]
    for kind in (bool, int, float):
        if kind in origins:
            return kind
    named = {getattr(origin, "__name__", "") for origin in origins}
    if "Path" in named:
        return "path"
    if "Mapping" in named or "dict" in named:
        return "mapping"
    if "Sequence" in named or "Iterable" in named:
        return "series"
    if str in origins and (default is None or isinstance(default, str)):
        return str
    return "object"


CALLS = list_calls(WORLD)


def list_cases():
    "Function, argument, and the name of a bad value."
    cases = []
    for function, (call, arguments) in CALLS.items():
        parameters = inspect.signature(call).parameters
        for name in arguments:
            parameter = parameters[name]
            kind = kind_of(name, parameter.annotation, arguments[name])
            for case in BAD.get(kind, {}):
                if (function, name, case) not in ALLOWED:
                    cases.append((function, name, case, kind))
            kinds = _list_kinds(parameter.annotation)
            is_checked = kind is not None and type(None) not in kinds
            if is_checked and (function, name, "none") not in ALLOWED:
                cases.append((function, name, "none", kind))
            if LEAST.get(name, 0) > 0 and int in kinds:
                cases.append((function, name, "zero", kind))
    return cases


CASES = list_cases()


@pytest.mark.parametrize(
    ("function", "name", "case", "kind"), CASES, ids=[f"{f}-{n}-{c}" for f, n, c, _ in CASES]
)
def test_a_fault_is_refused_by_name(tmp_path, monkeypatch, function, name, case, kind):
    monkeypatch.chdir(tmp_path)
    call, arguments = CALLS[function]
    with pytest.raises((ValueError, TypeError, OSError)) as refused:
        call(**arguments | {name: ({"none": None, "zero": 0} | BAD[kind])[case]})
    said = str(refused.value)
    assert re.search(rf"\b{name}\b", said), said
    assert re.search(r"must|needs|takes|has no|can't|goes with|is no|unknown", said), said
    assert list(tmp_path.iterdir()) == []


def test_the_campaign_is_large_and_covers_every_public_function():
    functions = {name for name in cg.__all__ if inspect.isfunction(getattr(cg, name))}
    assert functions <= set(CALLS), functions - set(CALLS)
    assert len(CASES) >= 400
