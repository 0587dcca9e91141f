"""Saving beside other people's files, against kills, full disks and other processes that save and read."""

import errno
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import networkx
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from circuitgraph.dictionary.places import neuron_basis
from circuitgraph.dictionary.store import load_dictionary, save_dictionary
from circuitgraph.build.build import build_graph, clear_checkpoint
from circuitgraph.cli import app
from circuitgraph.graph.graph import Graph, save_gexf, save_graphml
from circuitgraph.files import replace_file
from circuitgraph.graph.tables import check_output_folder
from circuitgraph.graph.viewer import write_report
from circuitgraph.model.loading import tiny_model
from circuitgraph.options import Run
from oracles import random_tokens
from savers import OWN, SIZES, chain, names_in, size_of_whole

HERE = Path(__file__).parent
LOADS = int(os.environ.get("LOADS", "300"))  # of a reader beside two savers


def contents(folder):
    """All files below a folder, with their bytes."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def save_as_before(graph, folder):
    """A folder as earlier versions wrote it: plain names, and no generation in meta.json."""
    folder.mkdir()
    hashes = {}
    for name, table in (("nodes.parquet", graph.nodes), ("edges.parquet", graph.edges)):
        table.to_parquet(folder / name)
        hashes[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    content = {"meta": graph.meta, "sha256": hashes}
    itself = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / "meta.json").write_text(json.dumps(content | {"self": itself}, indent=1))


# Other people's files


HASHES = {"nodes.parquet": "0", "edges.parquet": "0"}


@pytest.mark.parametrize(
    "meta",
    [
        None,
        "",
        "{",
        "[" * 100_000,
        "[]",
        "{}",
        "null",
        "\x00\x01",
        {"title": "my thesis", "format_version": 1},
        {"meta": {"format_version": 1}, "sha256": HASHES},
        {"meta": {}, "sha256": HASHES, "self": ""},
        {"meta": {"format_version": "1"}, "sha256": HASHES, "self": ""},
        {"meta": {"format_version": 1}, "sha256": {"thesis.pdf": "0"}, "self": ""},
        {"meta": [], "sha256": [], "self": ""},
    ],
    ids=lambda meta: str(meta)[:40].encode("unicode_escape").decode(),
)
def test_a_folder_that_is_no_graphs_is_refused_and_stays(tmp_path, meta):
    folder = tmp_path / "p"
    (folder / "data").mkdir(parents=True)
    for name in ("a thesis.tex", "b.csv", "c.html", "data/d.npy", "nodes.parquet"):
        (folder / name).write_text("mine")
    if meta is not None:
        (folder / "meta.json").write_text(meta if isinstance(meta, str) else json.dumps(meta))
    before = contents(tmp_path)
    for write in (chain(5).save, check_output_folder):
        with pytest.raises(ValueError, match=r"p holds a thesis\.tex, b\.csv, c\.html and .* name an empty"):
            write(folder)
    said = CliRunner().invoke(app, ["build", "--out", str(folder)])
    assert said.exit_code == 2 and said.stderr.count("\n") == 1 and "a thesis.tex" in said.stderr
    assert contents(tmp_path) == before


def test_a_new_an_empty_and_a_graphs_folder_are_saved_to(tmp_path):
    (tmp_path / "empty").mkdir()
    chain(9).save(tmp_path / "earlier")
    for name in ("far/below/new", "empty", "earlier"):
        assert chain(5).save(tmp_path / name) == tmp_path / name
        assert size_of_whole(tmp_path / name) == 5 and names_in(tmp_path / name) == OWN
    assert names_in(tmp_path) == {"far", "empty", "earlier"}


def test_what_stands_beside_a_graph_stays(tmp_path):
    folder = tmp_path / "g"
    chain(9).save(folder)
    (folder / "thesis").mkdir()
    others = (
        "thesis/a.tex",
        "report.html",
        ".hidden",
        "nodes.csv",
        ".nodes.parquet-mine",
        ".edges.parquet-new.txt",
    )
    for name in others:
        (folder / name).write_text(name)
    chain(5).save(folder)
    assert size_of_whole(folder) == 5
    assert names_in(folder) == OWN | {name.split("/")[0] for name in others}
    assert all((folder / name).read_text() == name for name in others)


def test_graphs_of_earlier_versions_are_read_and_replaced(tmp_path):
    save_as_before(chain(9), tmp_path / "g")
    assert size_of_whole(tmp_path / "g") == 9
    chain(5).save(tmp_path / "g")
    assert size_of_whole(tmp_path / "g") == 5 and names_in(tmp_path / "g") == OWN
    committed = HERE.parent / "nbs" / "results" / "layer_graph"
    shutil.copytree(committed, tmp_path / "committed")
    assert Graph.load(tmp_path / "committed") == Graph.load(committed)
    Graph.load(committed).top_edges(3).save(tmp_path / "committed")
    assert len(Graph.load(tmp_path / "committed")) == 3


def test_a_saved_folder_is_what_earlier_versions_read(tmp_path):
    folder = chain(9).save(tmp_path / "g")
    for _ in range(2):
        content = json.loads((folder / "meta.json").read_text())
        itself = content.pop("self")
        assert hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest() == itself
        for name in ("nodes.parquet", "edges.parquet"):
            data = (folder / name).read_bytes()
            assert hashlib.sha256(data).hexdigest() == content["sha256"][name]
        assert pd.read_parquet(folder / "edges.parquet")["weight"].tolist() == [9.0] * 8
        chain(9).save(folder)


@pytest.mark.parametrize("name", ["with space", "Графы 图 é", "x" * 255, "-rf", "a.b.c"])
def test_any_name_will_do(tmp_path, name):
    for n in SIZES:
        chain(n).save(tmp_path / name)
        assert size_of_whole(tmp_path / name) == n
    assert names_in(tmp_path) == {name}


def test_a_link_stays_and_its_target_is_written(tmp_path):
    (tmp_path / "target").mkdir()
    for link, target in (("link", "target"), ("early", "far")):  # the second leads nowhere yet
        (tmp_path / link).symlink_to(target)
        for n in SIZES:
            chain(n).save(tmp_path / link)
            assert (tmp_path / link).is_symlink() and size_of_whole(tmp_path / target) == n
    before = (tmp_path / "target" / "edges.parquet").read_bytes()
    (tmp_path / "copy").mkdir()
    for name in ("nodes.parquet", "edges.parquet", "meta.json"):
        (tmp_path / "copy" / name).symlink_to(tmp_path / "target" / name)
    chain(7).save(tmp_path / "copy")  # its files were links, and the graph that they led to is another's
    assert size_of_whole(tmp_path / "copy") == 7 and size_of_whole(tmp_path / "target") == SIZES[-1]
    assert (tmp_path / "target" / "edges.parquet").read_bytes() == before
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="loop"):
        chain(5).save(tmp_path / "loop")


def test_permissions_stay(tmp_path):
    folder = chain(9).save(tmp_path / "g")
    for path in (folder, *folder.iterdir()):
        path.chmod(0o700 if path.is_dir() else 0o600)
    chain(5).save(folder)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


# Failures


@contextmanager
def as_nobody():
    """Root may write anywhere; another user may not."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def shared():
    """A folder that another user can reach."""
    folder = Path("/tmp") / f"saving-{os.getpid()}"
    folder.mkdir(mode=0o755)
    yield folder
    shutil.rmtree(folder)


def test_a_folder_that_is_read_only_is_refused(shared):
    chain(9).save(shared / "g")
    (shared / "empty").mkdir()
    for folder in (shared, shared / "g", shared / "empty"):
        folder.chmod(0o555)
    before = contents(shared)
    try:
        for name in ("g", "empty", "new"):
            with as_nobody(), pytest.raises(OSError, match=f"{name} can't be written .*name another"):
                chain(5).save(shared / name)
        with as_nobody():
            assert size_of_whole(shared / "g") == 9, "readers need no leave to write"
        assert contents(shared) == before and names_in(shared) == {"g", "empty"}
    finally:
        for folder in (shared, shared / "g", shared / "empty"):
            folder.chmod(0o755)


@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.replace", "shutil.copymode"])
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, call):
    folder = chain(9).save(tmp_path / "g")
    (folder / "thesis.tex").write_text("mine")
    before = contents(tmp_path)

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(call, fail)
        with pytest.raises(OSError, match=r"g could not be saved.*No space left.*intact|could not be saved"):
            chain(5).save(folder)
        if call != "shutil.copymode":  # there is no file whose mode could be taken
            with pytest.raises(OSError, match="No space left"):
                chain(5).save(tmp_path / "new")
    assert contents(tmp_path) == before
    chain(5).save(folder)
    assert size_of_whole(folder) == 5


def test_half_a_table_does_not_replace_the_whole_one(tmp_path, monkeypatch):
    folder = chain(9).save(tmp_path / "g")
    before = contents(tmp_path)

    def cut(handle):
        os.ftruncate(handle, 10)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", cut)
        with pytest.raises(OSError, match="No space left"):
            chain(9).save(folder)  # the same graph, whose tables have the same hashes
    assert contents(tmp_path) == before and size_of_whole(folder) == 9


def test_what_cannot_be_written_leaves_no_folder(tmp_path):
    graph = chain(5)
    bad = Graph(graph.nodes.assign(module=[1, "a", 2.0, None, b""]), graph.edges, graph.meta)
    with pytest.raises(Exception, match="module|convert|expected"):
        bad.save(tmp_path / "g")
    assert names_in(tmp_path) == set()


def test_a_table_that_is_a_folder_does_not_stop_a_save(tmp_path):
    folder = chain(9).save(tmp_path / "g")
    (folder / "nodes.parquet").unlink()
    (folder / "nodes.parquet").mkdir()
    (folder / "nodes.parquet" / "mine").write_text("mine")
    chain(5).save(folder)
    assert size_of_whole(folder) == 5 and (folder / "nodes.parquet" / "mine").read_text() == "mine"


# Kills, and several processes


def run_apart(call):
    """Call one of the functions above in a process of its own: what it printed."""
    code = f"import savers; savers.{call}"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("kill", [True, False], ids=["killed", "disk full"])
def test_trouble_at_any_step_leaves_one_graph_whole(tmp_path, kill):
    assert int(run_apart(f"try_every_step({str(tmp_path)!r}, {kill})")) > 20


def test_twenty_kills_at_random_times(tmp_path):
    run_apart(f"kill_at_random({str(tmp_path)!r}, 20, seed=0)")


def test_two_savers_and_a_reader(tmp_path, record_property):
    run_apart(f"save_and_read_at_once({str(tmp_path)!r}, {LOADS})")
    reads = json.loads((tmp_path / "reads").read_text())
    saves = [int(path.read_text()) for path in tmp_path.glob("saves-*")]
    record_property("loads", len(reads))
    assert len(reads) == LOADS and min(saves) > LOADS / 50 and len(set(reads)) > 1


def test_three_first_saves_at_once(tmp_path):
    run_apart(f"save_first_at_once({str(tmp_path)!r})")


# Single files


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "curve.csv"
    with replace_file(path) as partial:
        assert partial.parent == tmp_path and partial.suffix == ".csv" and not path.exists()
        partial.write_text("old")
    assert path.read_text() == "old"
    path.chmod(0o640)
    for error in (OSError(errno.ENOSPC, "No space left on device"), ValueError("no"), KeyboardInterrupt()):
        with pytest.raises(type(error)), replace_file(path) as partial:
            partial.write_text("half")
            raise error
        assert path.read_text() == "old" and names_in(tmp_path) == {"curve.csv"}
    (tmp_path / "link.csv").symlink_to("curve.csv")
    with replace_file(tmp_path / "link.csv") as partial:
        partial.write_text("new")
    assert (tmp_path / "link.csv").is_symlink() and path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640 and names_in(tmp_path) == {"curve.csv", "link.csv"}


def test_a_file_that_cannot_be_replaced_is_named(tmp_path):
    for path in (tmp_path / "void" / "a.csv", tmp_path):
        with pytest.raises(OSError, match=f"{path} can't be written"), replace_file(path) as partial:
            partial.write_text("x")
    with replace_file("/dev/null") as partial:
        partial.write_text("x")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode) and names_in(tmp_path) == set()


@pytest.mark.parametrize("name", ["g.graphml", "g.graphml.gz", "g.gexf", "report.html"])
def test_a_full_disk_keeps_an_earlier_file(tmp_path, monkeypatch, name):
    write = {"graphml": save_graphml, "gexf": save_gexf, "html": write_report}[name.split(".")[1]]
    write(chain(9), tmp_path / name)
    before = contents(tmp_path)

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match=f"{name} can't be written .No space left on device"):
        write(chain(5), tmp_path / name)
    assert contents(tmp_path) == before
    if name.startswith("g.graphml"):
        assert networkx.read_graphml(tmp_path / name).number_of_nodes() == 9


# Checkpoints


def test_a_finished_run_removes_its_own_files_only(tmp_path):
    folder = tmp_path / ".g.partial"
    clear_checkpoint(folder)  # there is none
    model = tiny_model("llama", dtype=torch.float32)
    run = Run(checkpoint=folder, progress=False)
    build_graph(model, random_tokens(model), attribution="gradient", run=run)
    for name in (
        "request.json",
        "edges-12.parquet",
        f".{'0' * 16}.new.safetensors",
        "partial.safetensors.new",
    ):
        (folder / name).touch()
    mine = {"thesis.tex", "edges-final.parquet", ".new.json", "partial.safetensors.bak"}
    for name in mine:
        (folder / name).write_text(name)
    clear_checkpoint(folder)
    assert names_in(folder) == mine and all((folder / name).read_text() == name for name in mine)
    for name in mine:
        (folder / name).unlink()
    clear_checkpoint(folder)
    assert names_in(tmp_path) == set()


@pytest.mark.filterwarnings("ignore", "error:::circuitgraph")
def test_a_build_leaves_files_beside_its_checkpoint(tmp_path, monkeypatch):
    kept = tmp_path.parent / f".{tmp_path.name}.partial"
    kept.mkdir()
    (kept / "thesis.tex").write_text("mine")
    size = ["--n-tokens", "64", "--seq-len", "32"]
    options = ["--nodes", "block", "--attribution", "gradient", *size, "--fresh", "--out"]
    for out in (tmp_path, Path(".")):
        monkeypatch.chdir(tmp_path)
        done = CliRunner().invoke(app, ["build", "--force", *options, str(out)])
        assert done.exit_code == 0, done.output
        assert Graph.load(tmp_path).meta["nodes"] == "block" and names_in(tmp_path) == OWN
        assert (kept / "thesis.tex").read_text() == "mine" and names_in(kept) == {"thesis.tex"}


def test_tensors_of_something_else_are_no_checkpoint(tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    save_file({"weights": torch.ones(3)}, tmp_path / "partial.safetensors")
    before = contents(tmp_path)
    run = Run(checkpoint=tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"partial\.safetensors is of something else; name another"):
        build_graph(model, random_tokens(model), attribution="gradient", run=run)
    assert contents(tmp_path) == before


def test_tables_of_something_else_are_no_checkpoint(tmp_path):
    from test_feature_edges import all_dictionaries, build

    model = tiny_model("llama", dtype=torch.float64)
    tokens, dictionaries = random_tokens(model, 2, 6), all_dictionaries(model)
    pd.DataFrame({"mine": np.arange(3)}).to_parquet(tmp_path / "edges-0.parquet")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"edges-0\.parquet is of something else .* name another"):
        build(model, tokens, dictionaries, checkpoint=tmp_path)
    assert contents(tmp_path) == before


def test_saving_a_dictionary_leaves_other_hidden_folders(tmp_path):
    mine = tmp_path / ".m0.partial"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    model = tiny_model("llama")
    save_dictionary(neuron_basis(model, "m0"), tmp_path / "m0")
    assert load_dictionary(tmp_path / "m0", model).module == "m0"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".m0.partial", "m0"]
    assert (mine / "thesis.txt").read_text() == "mine"
