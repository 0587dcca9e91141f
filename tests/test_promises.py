"""Nothing silently wrong, nothing stale, nothing blocked: what went through without a word is refused."""

import functools
import hashlib
import json
import os
import pickle
import shutil
import zipfile

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import circuitgraph as cg
import circuitgraph.dictionary.train
import circuitgraph.model.loading as loading
from circuitgraph.cli import app
from circuitgraph.data.task import check_pairs
from circuitgraph.dictionary.formats import read_settings
from circuitgraph.dictionary.protocol import PursuitDictionary
from circuitgraph.dictionary.store import load_dictionary, save_dictionary
from circuitgraph.dictionary.trainer import save_state
from circuitgraph.files import check_output_file
from circuitgraph.methods.compare import Comparing, compare_methods, list_methods
from circuitgraph.methods.masks import MaskConfig, integrate_masks, learn_masks, prune_greedily
from circuitgraph.model.loading import load_model, tiny_model
from circuitgraph.options import Judging, Pruning, Run
from families import hugging_face
from feature_oracles import all_dictionaries, draw
from oracles import random_tokens
from savers import chain, names_in

pytestmark = pytest.mark.filterwarnings("ignore", "error:::circuitgraph")

QUIET = Run(progress=False)
JUDGED = Judging(n_boot=5, run=QUIET)
MODEL = tiny_model("llama", dtype=torch.float32)
TEXT, OTHER = random_tokens(MODEL, 4, 8), random_tokens(MODEL, 4, 8, seed=9)
EVERY = Pruning(n_edges=None)


# Silently wrong


@pytest.mark.parametrize("change", ["lacks", "has"])
def test_a_checkpoint_with_other_weights_is_refused_by_name(tmp_path, change):
    theirs = hugging_face("Llama", {"num_attention_heads": 2, "num_key_value_heads": 2}, 0)
    theirs.save_pretrained(tmp_path)
    path, name = tmp_path / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    weights = load_file(path)
    if change == "lacks":
        del weights[name]
    else:
        name = "model.layers.0.mlp.gate_2.weight"
        weights[name] = torch.ones(3)
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match=name):
        load_model(tmp_path)


def broken(value, where):
    "A dictionary that gives NaN or infinity from its encoder or its decoder, or from their gradients alone."

    def encode(x):
        acts = torch.sinh(x).clone()
        if where == "encode":
            acts[..., 0] = value
        return acts

    def decode(acts):
        y = torch.asinh(acts).clone()
        if where == "decode":
            y[..., 0] = value
        return y

    if where == "gradient":
        return cg.FunctionDictionary(
            "m0", "output", 16, lambda x: (x - x).abs().sqrt() + torch.sinh(x), torch.asinh
        )
    return cg.FunctionDictionary("m0", "output", 16, encode, decode)


@pytest.mark.parametrize("where", ["encode", "decode", "gradient"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_dictionary_that_gives_no_numbers_is_refused_by_name(value, where):
    with pytest.raises(ValueError, match=r"m0.* must be finite"):
        cg.build_graph(MODEL, TEXT, {"m0": broken(value, where)}, run=QUIET)


def test_shards_of_different_length_merge_to_means_over_all_positions():
    shards = TEXT, random_tokens(MODEL, 6, 16, seed=2)
    dictionaries = all_dictionaries(MODEL)
    for nodes in ("head", dictionaries):
        a, b = (cg.build_graph(MODEL, shard, nodes, pruning=EVERY, run=QUIET) for shard in shards)
        merged = a.merge(b).nodes
        for name in ("embed", "logits"):
            n, m = (len(shard) * (shard.shape[1] - 1 - (name == "logits")) for shard in shards)
            means = [graph.nodes.set_index("name").loc[name, "mean_activation"] for graph in (a, b)]
            expected = (n * means[0] + m * means[1]) / (n + m)
            assert np.isclose(merged.set_index("name").loc[name, "mean_activation"], expected, rtol=1e-12)


def test_cut_graphs_of_features_do_not_merge():
    dictionaries = all_dictionaries(MODEL)
    a, b = (cg.build_graph(MODEL, text, dictionaries, pruning=EVERY, run=QUIET) for text in (TEXT, OTHER))
    whole = a.merge(b)
    assert whole.merge(cg.build_graph(MODEL, TEXT[:2], dictionaries, pruning=EVERY, run=QUIET))
    cuts = {
        "top_edges": lambda graph: graph.top_edges(9),
        "threshold": lambda graph: graph.threshold(0.1),
        "keep": lambda graph: graph.keep(np.arange(len(graph)) < 9),
        "select_edges": lambda graph: cg.select_edges(graph, 9),
    }
    for name, cut in cuts.items():
        for pair in ((cut(a), b), (a, cut(b)), (whole, cut(b))):
            with pytest.raises(ValueError, match=rf"before they are cut, but one has the step .{name}\("):
                pair[0].merge(pair[1])


def test_corrupted_prompts_that_are_the_clean_ones_are_refused():
    same = cg.Task(TEXT, TEXT, metric=lambda logits: logits[:, -1, 0])
    rule = cg.Attribution("ig", baseline="corrupted")
    for build in (
        lambda: cg.build_graph(MODEL, same, attribution="eap", target="metric", run=QUIET),
        lambda: cg.build_graph(MODEL, TEXT, attribution=rule, corrupted=TEXT, run=QUIET),
        lambda: integrate_masks(MODEL, same, "layer", judging=JUDGED),
        lambda: list_methods(value="corrupted")["AtP"](MODEL, same, "layer", progress=False),
    ):
        with pytest.raises(ValueError, match="corrupted must differ from clean, but all 4 pairs"):
            build()
    half = torch.cat([TEXT[:2], OTHER[:2]])
    with pytest.warns(UserWarning, match="2 of 4 corrupted prompts are the same"):
        check_pairs(TEXT, half)
    check_pairs(TEXT, OTHER)


@pytest.fixture(scope="module")
def smollm():
    return load_model("smollm2-135m")


def test_marks_of_the_tokenizer_are_text_in_a_text(smollm, tmp_path):
    text = "A page <|endoftext|> of <|im_start|> markup, <|endoftext|> and more of it."
    tokens = cg.load_corpus([text], smollm, n_tokens=16, seq_len=16)
    assert not set(tokens.flatten().tolist()) & set(smollm.tokenizer.all_special_ids)
    assert smollm.tokenizer.decode(tokens[0]) in text
    path = tmp_path / "prompts.jsonl"
    for mark, refused in (
        ("<|endoftext|>", True),
        ("<|im_start|>", False),
    ):  # the chat template writes this one
        row = {"clean": f"The {mark} cat", "corrupted": f"The {mark} dog", "answers": " sat"}
        path.write_text(json.dumps(row))
        if refused:
            with pytest.raises(ValueError, match=r"line 1: .*holds the special token '<\|endoftext\|>'"):
                cg.load_task(path, smollm, n=1, check=False)
        else:
            assert len(cg.load_task(path, smollm, n=1, check=False)) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("clean,corrupted,answers,answers\nThe cat,The dog, sat, ran\n", "'answers' stands twice"),
        (
            "clean,corrupted,answers\nThe cat,The dog, sat, ran\n",
            "line 2: has more fields than the 3 columns",
        ),
        (
            "clean,corrupted,answers,worng\nThe cat,The dog, sat, ran\n",
            "line 2: fields must be .* got 'worng'",
        ),
    ],
)
def test_tables_of_prompts_that_say_two_things_are_refused(smollm, tmp_path, content, words):
    (tmp_path / "p.csv").write_text(content)
    with pytest.raises(ValueError, match=words):
        cg.load_task(tmp_path / "p.csv", smollm, n=1, check=False)


def test_no_threshold_and_no_steps_are_refused():
    with pytest.raises(ValueError, match="threshold must be a finite number, got nan"):
        prune_greedily(MODEL, TEXT, "layer", float("nan"), value="zero", judging=JUDGED)
    with pytest.raises(ValueError, match="n_steps must be at least 1, got -1"):
        learn_masks(MODEL, TEXT, "layer", config=MaskConfig(n_steps=-1), value="zero", judging=JUDGED)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        Run(batch_size=0)


# Stale


def test_rows_of_another_request_are_not_used_again(tmp_path):
    calls = []

    def random(model, data, nodes, seed=0, **_):
        calls.append(seed)
        return list_methods("layer")["random"](model, data, nodes, seed=seed)

    def compare(model=MODEL, found=TEXT, judged=TEXT, n_edges=(5,), **options):
        how = Comparing(**{"n_boot": 5, "out": tmp_path / "rows.csv", "progress": False} | options)
        return compare_methods(
            model, found, judged, {"random": random}, n_edges, nodes="layer", comparing=how
        )

    first = compare()
    assert compare().equals(first) and len(calls) == 1
    task = cg.Task(TEXT, OTHER, metric=lambda logits: logits[:, -1, 0], name="text")
    others = [
        {"model": tiny_model("llama", seed=5, dtype=torch.float32)},
        {"found": OTHER},
        {"judged": OTHER},
        {"found": TEXT[:3]},
        {"found": task, "judged": task},
        {"n_edges": (5, 9)},
        {"n_boot": 6},
        {"ablation": "edge"},
        {"exact": cg.complete_graph(MODEL, "layer")},
        {"truth": ["embed->m0"]},
    ]
    for i, other in enumerate(others, 2):
        rows = compare(**other)
        assert len(calls) == i, f"rows of another request were used for {other}"
        assert rows["request"].nunique() == 1 and rows["request"][0] != first["request"][0]
    assert compare().equals(first) and len(calls) == len(others) + 1
    kept = pd.read_csv(tmp_path / "rows.csv")
    assert kept["request"].nunique() == len(others) + 1


def test_metrics_of_one_name_are_told_apart(tmp_path):
    found = {}
    for token in (3, 4, 3):
        task = cg.Task(TEXT, OTHER, metric=lambda logits, token=token: logits[:, -1, token], name="mine")
        how = Comparing(n_boot=5, out=tmp_path / "rows.csv", progress=False)
        methods = {"EAP": list_methods("layer")["EAP"]}
        rows = compare_methods(MODEL, task, task, methods, [5], nodes="layer", comparing=how)
        found.setdefault(token, []).append(rows)
    assert found[3][0].equals(found[3][1]) and not found[3][0].equals(found[4][0])
    assert len(pd.read_csv(tmp_path / "rows.csv")) == 2 * len(found[3][0])


def test_rows_that_another_process_writes_meanwhile_stay(tmp_path):
    out = tmp_path / "rows.csv"
    random = list_methods("layer")["random"]

    def compare(text, method):
        how = Comparing(n_boot=5, out=out, progress=False)
        return compare_methods(MODEL, text, text, {"random": method}, [5], nodes="layer", comparing=how)

    def interrupted(model, data, nodes, seed=0, **_):
        compare(OTHER, random)  # as another process would, after this one has read the table
        return random(model, data, nodes, seed=seed)

    ours, others = compare(TEXT, interrupted), compare(OTHER, random)
    known = pd.read_csv(out)
    assert set(known["request"]) == {ours["request"][0], others["request"][0]}
    assert len(known) == len(ours) + len(others)


def test_a_run_whose_folder_is_deleted_meanwhile_can_be_given_again(tmp_path, monkeypatch):
    out, whole = tmp_path / "run", circuitgraph.dictionary.train._train
    config = cg.TrainConfig(n_steps=2, d_dict=32, k=2, batch_size=4)

    def train_and_lose(*args):
        trained = whole(*args)
        shutil.rmtree(out)
        return trained

    with monkeypatch.context() as patch:
        patch.setattr("circuitgraph.dictionary.train._train", train_and_lose)
        cg.train_dictionaries(MODEL, TEXT, ["m0"], config, out=out, n_workers=1, run=QUIET)
    assert names_in(out) == {"m0", "train.json"}
    again = cg.train_dictionaries(MODEL, TEXT, ["m0", "m1"], config, out=out, n_workers=1, run=QUIET)
    assert list(again) == ["m0", "m1"]


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[x] DefaultCPUAllocator: can't allocate memory"), "CUDA"]
)
def test_full_memory_is_said_in_one_line(tmp_path, monkeypatch, error):
    if error == "CUDA":
        error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def fail(*_, **__):
        raise error

    monkeypatch.setattr("circuitgraph.model.loading.load_model", fail)
    done = CliRunner().invoke(app, ["build", "--out", str(tmp_path / "g")])
    assert done.exit_code == 2 and done.stderr.count("\n") == 1 and "--batch-size" in done.stderr


def test_a_fault_of_the_program_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr("circuitgraph.model.loading.load_model", lambda *_, **__: next(iter([])) / 0)
    done = CliRunner().invoke(app, ["build", "--out", str(tmp_path / "g")])
    assert isinstance(done.exception, StopIteration)


def test_a_bad_place_is_noticed_before_any_work(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "junk.csv").write_bytes(b'\x00\xff\xfe,,\n"')
    before = names_in(tmp_path)
    for place, words in {
        "void/rows.csv": "out must lie in a folder that exists",
        "folder": "out must be a file, got the folder",
        "other.csv": "has no column",
        "junk.csv": "out must be a table of this function or a new file",
    }.items():
        with pytest.raises(ValueError, match=words):
            compare_methods(
                MODEL, TEXT, TEXT, {"never": pytest.fail}, [5], comparing=Comparing(out=tmp_path / place)
            )
    check_output_file("/dev/null")
    assert names_in(tmp_path) == before


# Strangers' files


class Trap:
    "What runs code when it is unpickled."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_of_a_strangers_file_is_run(tmp_path, monkeypatch):
    trap = tmp_path / "trap"
    folder = tmp_path / "d"
    save_dictionary(draw(MODEL, "a0"), folder / "a0")
    function = cg.FunctionDictionary("m0", "output", 16, torch.sinh, torch.asinh)
    save_dictionary(function, folder / "nested" / "m0", d_in=16)
    monkeypatch.setattr("torch.export.load", pytest.fail)
    assert list(cg.load_dictionaries(folder, MODEL, modules=["a0"])) == ["a0"]
    assert list(cg.load_dictionaries(folder, MODEL, modules=["a0"], trust=True)) == ["a0"]
    with pytest.raises(ValueError, match="holds programs.*trust=True"):
        cg.load_dictionaries(folder, MODEL)
    checkpoint = tmp_path / "ae"
    checkpoint.mkdir()
    settings = {"trainer": {"dict_class": "AutoEncoder", "submodule_name": "mlp", "layer": 0}}
    (checkpoint / "config.json").write_text(json.dumps(settings))
    torch.save({"encoder.weight": Trap(trap)}, checkpoint / "ae.pt")
    with pytest.raises(
        ValueError, match="as tensors alone, and nothing else is opened: it holds other objects"
    ):
        load_dictionary(checkpoint)
    (checkpoint / "ae.pt").write_bytes(pickle.dumps(Trap(trap)))
    with pytest.raises(ValueError, match="ae.pt can't be read"):
        load_dictionary(checkpoint)
    torch.save([torch.ones(2)], checkpoint / "ae.pt")
    with pytest.raises(ValueError, match="must hold tensors by name, got list"):
        load_dictionary(checkpoint)
    np.savez(tmp_path / "params.npz", W_enc=np.array([Trap(trap)], dtype=object))
    with pytest.raises(ValueError, match="can't be read as arrays of numbers"):
        load_dictionary(tmp_path / "params.npz", module="m0", reads="output")
    assert not trap.exists()


def test_bombs_are_refused_before_they_are_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("circuitgraph.dictionary.formats._FREE", 0)
    path = tmp_path / "params.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("W_enc.npy", "w") as file:
        for _ in range(20):
            file.write(bytes(2**20))
    assert path.stat().st_size < 2**20
    with pytest.raises(ValueError, match="would unpack to 20,971,520 bytes"):
        load_dictionary(path, module="m0", reads="output")
    (tmp_path / "c.yaml").write_text("a: &a [1, 2]\nb: [*a, *a]\n")
    with pytest.raises(ValueError, match="aliases"):
        read_settings(tmp_path / "c.yaml")
    for name, text in (
        ("deep.json", "[" * 100_000),
        ("deep.yaml", "[" * 9_000),
        ("t.yaml", "a: !!bool maybe"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name} can't be read"):
            read_settings(tmp_path / name)


@pytest.mark.parametrize("kind", ["rows", "string"])
def test_a_table_that_unpacks_to_gigabytes_is_refused(tmp_path, kind):
    folder = chain(5).save(tmp_path / "g")
    path = folder / "nodes.parquet"
    n = 1_000_000 if kind == "rows" else 10_000
    values = pa.array(np.zeros(n)) if kind == "rows" else pa.array(["x" * 2_000] * n)
    batch = pa.table({"a": values, "b": values})
    with pq.ParquetWriter(path, batch.schema, compression="zstd") as writer:
        for _ in range(20):
            writer.write_table(batch)
    assert path.stat().st_size < 2**20
    content = json.loads((folder / "meta.json").read_text())
    content.pop("self")
    content["sha256"]["nodes.parquet"] = hashlib.sha256(path.read_bytes()).hexdigest()
    itself = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / "meta.json").write_text(json.dumps(content | {"self": itself}))
    with pytest.raises(ValueError, match="nodes.parquet would unpack to more than"):
        cg.Graph.load(folder)


def test_a_pursuit_without_end_is_refused():
    directions = torch.eye(16)
    with pytest.raises(ValueError, match=r"max_steps must lie in \[1, 160\]"):
        PursuitDictionary("m0", "output", directions, torch.zeros(16), max_steps=10**12)


# Blocked or lost


def test_a_refused_run_leaves_no_folder_and_a_started_one_can_be_changed(tmp_path):
    out = tmp_path / "run"
    small = {"n_steps": 2, "d_dict": 32, "k": 2, "batch_size": 4}
    for options in ({"batch_size": 4_000}, {"skip_first": 200}):
        with pytest.raises(ValueError, match="must"):
            cg.train_dictionaries(MODEL, TEXT, ["m0"], cg.TrainConfig(**small | options), out=out, run=QUIET)
        assert not out.exists()
    failing = pytest.MonkeyPatch()
    with failing.context() as patch:
        patch.setattr("circuitgraph.dictionary.train.collect_places", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cg.train_dictionaries(MODEL, TEXT, ["m0"], cg.TrainConfig(**small), out=out, run=QUIET)
    assert names_in(out) == {"train.json"}
    other = cg.TrainConfig(**small | {"k": 3})
    assert list(cg.train_dictionaries(MODEL, TEXT, ["m0"], other, out=out, run=QUIET)) == ["m0"]
    with pytest.raises(ValueError, match="is not of this run"):
        cg.train_dictionaries(MODEL, TEXT, ["m0"], cg.TrainConfig(**small), out=out, run=QUIET)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.json").write_text('{"my": "own"}')
    with pytest.raises(ValueError, match="is not of this run"):
        cg.train_dictionaries(MODEL, TEXT, ["m0"], other, out=tmp_path / "mine", run=QUIET)
    assert (tmp_path / "mine" / "train.json").read_text() == '{"my": "own"}'


def test_a_full_disk_in_training_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "state"
    path.write_bytes(b"old")
    trainer = type("Trainer", (), {})()
    trainer.sae = trainer.optimizer = trainer.lr_scheduler = torch.nn.Linear(2, 2)
    trainer.coefficient_schedulers = {}
    monkeypatch.setattr("circuitgraph.dictionary.trainer._COUNTS", ())

    def fill(_, partial):
        partial.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed\nmore")

    monkeypatch.setattr("torch.save", fill)
    with pytest.raises(OSError, match="state can't be written .*file write failed.*make room"):
        save_state(trainer, path)
    assert path.read_bytes() == b"old" and names_in(tmp_path) == {"state"}


def test_what_a_killed_process_left_of_unpacking_is_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("CIRCUITGRAPH_CACHE", str(tmp_path))
    package = loading._PACKAGES["smollm2-135m"]
    calls = []

    def unpack(_, folder):
        calls.append(folder)
        folder.mkdir()
        (folder / "weights_hash.json").write_text("{}")

    monkeypatch.setattr(loading, "_unpack_beside", unpack)
    for name in ("smollm2-135m-abcd1234", "smollm2-135m-zzzz0000"):
        (tmp_path / name / "unpacked").mkdir(parents=True)
    (tmp_path / "smollm2-135m-mine").mkdir()  # a name that no unpacking has
    for _ in range(2):
        assert loading._packaged_folder(package) == tmp_path / "smollm2-135m"
        assert names_in(tmp_path) == {"smollm2-135m", "smollm2-135m-mine", ".smollm2-135m.lock"}
        (tmp_path / "smollm2-135m-left0000").mkdir()  # killed after the model had taken its place
    assert len(calls) == 1


# Metrics that are no plain functions


def last_logit(logits, token):
    return logits[:, -1, token]


class Metric:
    "A metric that is an object."

    def __call__(self, logits):
        return last_logit(logits, 3)


@pytest.mark.parametrize(
    "metric", [functools.partial(last_logit, token=3), Metric()], ids=["partial", "object"]
)
def test_a_metric_may_be_a_partial_or_an_object(metric):
    task = cg.Task(TEXT, OTHER, metric=metric)
    plain = cg.Task(TEXT, OTHER, metric=lambda logits: last_logit(logits, 3))
    assert task.metric_name == ("last_logit" if isinstance(metric, functools.partial) else "Metric")
    built = [cg.build_graph(MODEL, t, attribution="eap", target="metric", run=QUIET) for t in (task, plain)]
    assert built[0].edges.equals(built[1].edges) and built[0].meta["target"] == f"{task.metric_name} of task"
    for batch_size in (None, 1):  # a metric sees all prompts at once, however they are batched
        judging = Judging(run=Run(batch_size, progress=False))
        scores = [integrate_masks(MODEL, t, "layer", judging=judging).edges["weight"] for t in (task, plain)]
        assert scores[0].equals(scores[1]) and scores[0].abs().max() > 0
        learned = learn_masks(MODEL, task, "layer", config=MaskConfig(n_steps=2), judging=judging)
        assert len(learned) and len(prune_greedily(MODEL, task, "layer", judging=judging))
        own = Judging(metric=metric, run=judging.run)
        assert len(learn_masks(MODEL, task, "layer", config=MaskConfig(n_steps=2), judging=own))
