"""What `help` says of the public names, against fastcore's reader of the same comments."""

import inspect
import subprocess
import sys

import pytest
from fastcore.docments import docments

import circuitgraph as cg
from circuitgraph.helptext import add_parameters, read_parameters

CODE = [
    name for name in cg.__all__ if inspect.isfunction(getattr(cg, name)) or inspect.isclass(getattr(cg, name))
]
FUNCTIONS = [name for name in CODE if inspect.isfunction(getattr(cg, name))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_help_tells_what_each_parameter_means(name):
    function = getattr(cg, name)
    said = inspect.getdoc(function)
    oracle = docments(function, returns=False)
    assert oracle and set(oracle) == set(inspect.signature(function).parameters)
    for parameter, meaning in oracle.items():
        assert f"    {parameter}: " in said
        if meaning:
            assert f"    {parameter}: {' '.join(meaning.split())}" in said
    assert said.count("\nParameters:\n") == 1


def test_fields_and_arguments_of_classes_are_told():
    said = inspect.getdoc(cg.Run)
    assert "    batch_size: sequences at a time; by default as many as hold about 512 tokens" in said
    assert "    nodes: one row a node, in the order of computation" in inspect.getdoc(cg.Graph)
    judging = read_parameters(cg.Judging)["metric"]
    assert judging.startswith('text: "ce" (default)') and judging.endswith("to one number for each")
    assert list(read_parameters(cg.Run)) == ["batch_size", "memory", "checkpoint", "progress"]


def test_what_has_no_source_is_left_as_it_is():
    made = {}
    exec('def built(x):\n    "Do it."\n', made)  # there is no file to read
    add_parameters(made["built"])
    assert made["built"].__doc__ == "Do it."
    add_parameters(cg.METHODS)  # a dictionary
    add_parameters(len)


def test_it_is_quick_and_needs_nothing():
    code = "import sys, circuitgraph; print({'torch', 'fastcore', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
