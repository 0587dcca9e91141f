"""Each option of each command is given what it can't be: one line that names it, and nothing is written.

The cases follow from the options: a command that would work is given one bad option at a time. No model may
be loaded before the refusal.
"""

import inspect
import re
from pathlib import Path
from typing import get_args

import pytest
from typer.models import OptionInfo
from typer.testing import CliRunner

import circuitgraph as cg
from circuitgraph.cli import app
from circuitgraph.model.loading import tiny_model
from oracles import random_tokens

pytestmark = pytest.mark.filterwarnings("ignore", "error:::circuitgraph")

NUMBERS = {"text": "three", "NaN": "nan", "huge": "1" + 30 * "0", "negative": "-7"}
BAD = {
    int: NUMBERS | {"fraction": "2.5"},
    float: NUMBERS | {"infinite": "inf"},
    str: {"unknown": "no such thing"},
    Path: {"unknown": "no/such/place", "below a file": "a-file/below"},
}
ARGUMENTS = {
    "prompt": ["a prompt"],
    "evaluate": ["graph"],
    "communities": ["graph"],
    "compare": ["graph", "graph"],
    "report": ["graph"],
    "view": ["graph"],
}
FOLDERS = {"build", "prompt", "train", "communities"}
ALLOWED = {
    *((command, "out", "unknown") for command in ("build", "prompt", "train")),  # folders that are made
    ("compare-methods", "exact", "unknown"),
    ("train", "modules", "unknown"),  # the model says which there are
    ("train", "sparsity", "huge"),
    ("train", "lr", "huge"),
    ("build", "memory", "huge"),
    ("communities", "resolution", "huge"),
}
NEEDED = {("train", "n_held_out"): {"held_out": "a-file"}}


def kind_of(annotation):
    "What an option takes: its type, without None and lists; None for flags and for what is no option."
    value, info = get_args(annotation)
    members = [member for member in get_args(value) or (value,) if member is not type(None)]
    kind = (get_args(members[0]) or members)[0]
    return kind if isinstance(info, OptionInfo) and kind in BAD else None


def list_cases():
    "Command, option and a bad value."
    cases = []
    for command in app.registered_commands:
        name = command.callback.__name__.replace("_", "-")
        for option, parameter in inspect.signature(command.callback).parameters.items():
            kind = kind_of(parameter.annotation)
            for case, value in BAD.get(kind, {}).items():
                if (name, option, case) not in ALLOWED:
                    cases.append((name, option, case, value))
    return cases


CASES = list_cases()


@pytest.fixture(scope="module")
def graph():
    model = tiny_model("llama")
    return cg.build_graph(model, random_tokens(model, 2, 8), "layer", run=cg.Run(progress=False))


@pytest.fixture
def home(tmp_path, monkeypatch, graph):
    "A folder with a graph and a file, from which commands are given; no model can be loaded."

    def reached(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("circuitgraph.model.loading.load_model", reached)
    monkeypatch.chdir(tmp_path)
    graph.save(tmp_path / "graph")
    (tmp_path / "a-file").write_text("mine")
    return tmp_path


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def give(command, *options):
    "Give a command with one bad option: the last line that it says."
    words = [command, *ARGUMENTS.get(command, []), *options]
    return CliRunner().invoke(app, [str(word) for word in words])


def check_refusal(done, name, value):
    "That a command ended with one error, which names the option, or the value that it was given."
    assert done.exit_code == 2 and done.stdout == "", (done.output, done.exception)
    said = " ".join(re.sub("[│╭╮╰╯─]", " ", done.stderr).split())
    names_option = re.search(rf"(?<![a-z]){name}\b", said.replace("-", "_"))
    assert "Traceback" not in said and (names_option or value in said), said


IDS = ["-".join(case[:3]) for case in CASES]
BY_VALUE = [(command, option, value) for command, option, _, value in CASES]


@pytest.mark.parametrize(("command", "option", "value"), BY_VALUE, ids=IDS)
def test_a_bad_option_is_refused(home, command, option, value):
    before = contents(home)
    places = {} if option == "out" else {"out": "results" if command in FOLDERS else "results.csv"}
    places |= NEEDED.get((command, option), {})
    given = places | {option: value}
    words = [f"--{name.replace('_', '-')}={one}" for name, one in given.items()]
    check_refusal(give(command, *words), option, value)
    assert contents(home) == before and {path.name for path in home.iterdir()} == {"graph", "a-file"}


@pytest.mark.parametrize("command", sorted({*ARGUMENTS, *FOLDERS, "compare-methods"}))
def test_an_output_of_the_wrong_kind_is_refused_before_any_work(home, command):
    before = contents(home)
    place = "a-file" if command in FOLDERS else "graph"
    force = [] if command in ("train", "compare-methods") else ["--force"]
    check_refusal(give(command, f"--out={place}", *force), "out", place)
    assert contents(home) == before and {path.name for path in home.iterdir()} == {"graph", "a-file"}
