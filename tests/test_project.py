"""What holds for the project: notebooks and package agree, code is short, the package stands alone."""

import ast
import importlib.util
import json
import re
import shutil
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
NBS, PACKAGE = ROOT / "nbs", ROOT / "circuitgraph"
NOTEBOOKS = sorted(NBS.glob("*.ipynb"))
NUMBERED = [path for path in NOTEBOOKS if path.stem[0].isdigit()]
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.stem not in ("__init__", "_modidx"))
DEVELOPMENT = {"nbdev", "fastcore", "execnb", "matplotlib", "pytest", "sae_lens", "captum"}


def cells(path, kind):
    book = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == kind]


def module_name(path):
    """The dotted name of a module within the package: graph/graph.py is graph.graph."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def public_names():
    """The module of each public name, and how often each is listed in the stub."""
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    listed = [(name.name, node.module) for node in tree.body for name in node.names]
    return dict(listed), [name for name, _ in listed]


def run(*args, cwd=ROOT):
    return subprocess.run([sys.executable, *args], cwd=cwd, capture_output=True, text=True, check=True)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The project's files, and none that it makes."""
    target = tmp_path_factory.mktemp("copy")
    ignored = shutil.ignore_patterns("__pycache__", "graphs", "report.html", ".ipynb_checkpoints")
    for name in ("nbs", "circuitgraph", "scripts"):
        shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=ignored)
    for name in ("settings.ini", "setup.py", "_quarto.yml", "README.md"):
        shutil.copy(ROOT / name, target / name)
    return target


# The order of notebooks


def read_code(path):
    """All code of a notebook, without magics."""
    return re.sub(r"^[%!].*$", "", "\n".join(cells(path, "code")), flags=re.M)


def exported_modules(paths):
    """The notebook that exports each module; an experiment exports none."""
    found = {path: re.search(r"#\|\s*default_exp ([\w.]+)", read_code(path)) for path in paths}
    return {match[1]: path for path, match in found.items() if match}


def imported_modules(source, modules):
    """Modules of this package that code uses; public names count for the module that they come from.

    A method may hand on to a function of a later notebook, which it imports when it is called."""
    public, _ = public_names()
    tree, used, aliases = ast.parse(source), set(), set()
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    methods = [node for one in classes for node in one.body if isinstance(node, ast.FunctionDef)]
    late = {id(node) for method in methods for node in ast.walk(method)}
    for node in ast.walk(tree):
        if id(node) in late:
            continue
        if isinstance(node, ast.Import):
            ours = [name for name in node.names if name.name.split(".")[0] == "circuitgraph"]
            used |= {name.name.removeprefix("circuitgraph.") for name in ours if "." in name.name}
            aliases |= {name.asname or "circuitgraph" for name in ours}
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "circuitgraph":
            package = node.module.removeprefix("circuitgraph").strip(".")
            for name in node.names:
                inner = f"{package}.{name.name}".strip(".")
                used.add(inner if inner in modules else package or public.get(name.name, name.name))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") in aliases:
            used.add(public.get(node.attr, node.attr))
    return used & set(modules)


def imports_from_above(paths):
    """Notebooks that import a module of a notebook with a higher number."""
    exported = exported_modules(paths)
    return [
        (path.stem, module)
        for path in paths
        for module in sorted(imported_modules(read_code(path), exported))
        if exported[module].stem > path.stem
    ]


GUIDES = ("00_introduction", "03_recipes", "04_gallery", "06_promises")  # they show the whole library


def test_a_notebook_imports_lower_numbers_only():
    assert imports_from_above([path for path in NUMBERED if path.stem not in GUIDES]) == []


@pytest.mark.parametrize(
    "planted",
    [
        "from circuitgraph.graph.viewer import view",
        "from circuitgraph.graph import viewer",
        "from circuitgraph import view",
        "import circuitgraph.graph.viewer",
        "import circuitgraph as cg\ncg.write_report",
    ],
)
def test_an_import_from_a_higher_number_is_seen(tmp_path, planted):
    for path in NUMBERED:
        shutil.copy(path, tmp_path)
    book = json.loads((NBS / "30_graph.ipynb").read_text(encoding="utf-8"))
    cell = {"cell_type": "code", "source": [planted], "metadata": {}, "outputs": [], "execution_count": None}
    book["cells"].append(cell)
    (tmp_path / "30_graph.ipynb").write_text(json.dumps(book), encoding="utf-8")
    above = imports_from_above(sorted(tmp_path.glob("*.ipynb")))
    assert ("30_graph", "graph.viewer") in above


def test_numbers_and_names_of_notebooks_are_unique():
    numbers = [path.stem.split("_")[0] for path in NUMBERED]
    names = [path.stem.split("_", 1)[1] for path in NUMBERED]
    assert [path.stem for path in NOTEBOOKS if path not in NUMBERED] == ["index"]
    assert all(len(number) in (2, 3) for number in numbers) and len(set(numbers)) == len(numbers)
    assert len(set(names)) == len(names), "pages are named without the number"


def test_every_module_has_a_notebook_and_is_kept_by_git():
    exported = exported_modules(NUMBERED)
    assert set(exported) == {module_name(path) for path in MODULES}
    assert len(exported) == sum("default_exp" in read_code(path) for path in NUMBERED)
    files = [str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py")]
    command = ["git", "check-ignore", "--no-index", *files]
    ignored = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert ignored == []


def test_the_sidebar_follows_the_numbers():
    assert (NBS / "_quarto.yml").is_symlink()
    text = (ROOT / "_quarto.yml").read_text(encoding="utf-8")
    assert (NBS / "_quarto.yml").read_text(encoding="utf-8") == text
    listed = []
    for entry in yaml.safe_load(text)["website"]["sidebar"]["contents"]:
        if isinstance(entry, dict):
            listed += entry.get("contents", []) or [entry["href"]]
        else:
            listed.append(entry)
    assert listed == ["index.ipynb", *[path.name for path in NUMBERED]], "run scripts/make_sidebar.py"
    maker = load_script("make_sidebar")
    assert text.endswith(maker.START + maker.render([path.stem for path in NOTEBOOKS]))


# Notebooks


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(folder): path.read_bytes() for path in files}


def test_exporting_and_cleaning_change_nothing(copy):
    before = contents(copy)
    assert {path.relative_to(ROOT) for path in [*NOTEBOOKS, *PACKAGE.rglob("*.py")]} <= set(before)
    for module, command in (("doclinks", "nbdev_export"), ("clean", "nbdev_clean")):
        run("-c", f"from nbdev.{module} import {command}; {command}()", cwd=copy)
    after = contents(copy)
    assert [str(path) for path in sorted({*before, *after}) if before.get(path) != after.get(path)] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_clean(path):
    text = path.read_text(encoding="utf-8")
    book = json.loads(text)
    hidden = sum(bool(re.search(r"^#\|\s*hide\b", source, re.M)) for source in cells(path, "code"))
    assert path.stat().st_size < 1e6 and len(book["cells"]) <= 60 and hidden <= len(book["cells"]) / 5
    assert "widgets" not in book["metadata"]
    outputs = [output for cell in book["cells"] for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert "application/vnd.jupyter.widget-view+json" not in text


def mixes_imports(source):
    """Whether a cell that a reader sees holds imports and other code; nbdev runs such cells again."""
    if re.search(r"^#\|\s*(hide|export|exporti|exports)\b", source, re.M):
        return False
    body = ast.parse(re.sub(r"^[%!].*$", "", source, flags=re.M)).body
    return len({isinstance(node, ast.Import | ast.ImportFrom) for node in body}) == 2


def test_imports_stand_alone():
    assert mixes_imports("import torch\ntorch.ones(2)")
    assert not mixes_imports("import torch\nfrom torch import nn") and not mixes_imports("torch.ones(2)")
    code = [(path.stem, source) for path in NOTEBOOKS for source in cells(path, "code")]
    assert [(name, source[:60]) for name, source in code if mixes_imports(source)] == []


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_quickstart_has_at_most_sixteen_lines():
    code = [source for source in cells(NBS / "index.ipynb", "code") if not source.startswith("#| hide")]
    lines = [line for source in code for line in source.splitlines()]
    assert sum(bool(line.strip()) and not line.startswith("#|") for line in lines) <= 16


def test_the_quickstart_prints_what_it_says():
    """Its numbers, as a reader sees them; the notebook itself asserts them whenever it is run."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^(graph|random edges|nothing kept) .* (-?[\d.]+)$", text, re.M)
    row = {name: float(x) for name, x in rows}
    assert 0.94 < row["graph"] < 0.98 and row["nothing kept"] == 0 and abs(row["random edges"]) < 0.05
    budgets = re.findall(r"^\d +(\d+) +\d+ +\d+ +([\d.]+)$", text, re.M)
    assert [int(n) for n, _ in budgets] == [1_000, 10_000, 100_000]
    assert [round(float(x), 1) for _, x in budgets] == [0.6, 0.7, 0.9]


# The size of the code


def decorators(node):
    return " ".join(ast.unparse(decorator) for decorator in node.decorator_list)


def is_kernel(node):
    """Compiled by numba: it takes plain arrays, and is written for speed."""
    return "njit" in decorators(node) or "numba" in decorators(node)


def is_command(node):
    """A command of the shell, whose parameters are its options."""
    return "app.command" in decorators(node)


def functions_of(text):
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]


def split_docstring(node):
    first = node.body[0]
    has_docstring = isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str)
    return node.body[1:] if has_docstring else node.body


def count_statements(node):
    return sum(isinstance(inner, ast.stmt) for body in split_docstring(node) for inner in ast.walk(body))


def count_lines(node):
    return node.end_lineno - node.lineno + 1


def count_nodes_per_line(node, text):
    """Syntax nodes of the body divided by its lines, without docstring, comments and empty lines."""
    body = split_docstring(node)
    if not body:
        return 0.0
    lines = text.splitlines()[body[0].lineno - 1 : node.end_lineno]
    code = [line for line in lines if line.strip() and not line.strip().startswith("#")]
    return sum(1 for inner in body for _ in ast.walk(inner)) / len(code)


def count_parameters(node):
    return len(node.args.posonlyargs) + len(node.args.args) + len(node.args.kwonlyargs)


def oversized(text):
    """Functions with more than 30 statements, 8 parameters or 60 lines."""
    faults = []
    for node in functions_of(text):
        if is_kernel(node):
            continue
        if count_statements(node) > 30:
            faults.append(f"{node.name}: {count_statements(node)} statements")
        if count_lines(node) > 60:
            faults.append(f"{node.name}: {count_lines(node)} lines")
        if count_parameters(node) > 8 and not is_command(node):
            faults.append(f"{node.name}: {count_parameters(node)} parameters")
    return faults


def long_lines(text):
    """Lines over 110 columns; the list of names that nbdev writes is wrapped by nbdev."""
    written = re.sub(r"^__all__ = \[.*?\]$", "", text, count=1, flags=re.M | re.S)
    return [line for line in written.splitlines() if len(line) > 110]


def test_an_oversized_function_is_seen():
    many = ", ".join(f"x{i}" for i in range(9))
    statements = "\n".join(f"    y{i} = {i}" for i in range(31))
    assert oversized(f"def f({many}):\n    pass") == ["f: 9 parameters"]
    assert oversized(f"@app.command()\ndef f({many}):\n    pass") == []
    assert oversized(f"def f():\n{statements}") == ["f: 31 statements"]
    assert oversized(f"@njit(cache=True)\ndef f({many}):\n{statements}") == []
    empty = "\n" * 59
    assert oversized(f"def f():\n    y = (1,{empty}    2)") == ["f: 61 lines"]
    assert long_lines(f"x = '{'a' * 110}'") and not long_lines("x = 1")
    dense, plain = "def f():\n    return g(a[0], b[1])", "def f():\n    x = 1\n    return x"
    nodes = [count_nodes_per_line(functions_of(text)[0], text) for text in (dense, plain)]
    assert nodes == [14, 3.5]


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_code_is_short_and_documented(path):
    text = path.read_text(encoding="utf-8")
    assert oversized(text) == [] and long_lines(text) == []
    tree = ast.parse(text)
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    listed = [node for node in assigned if getattr(node.targets[0], "id", "") == "__all__"]
    public = set(ast.literal_eval(listed[0].value))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in public:
            assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_functions_are_short_on_the_whole():
    texts = [path.read_text(encoding="utf-8") for path in MODULES]
    functions = [(node, text) for text in texts for node in functions_of(text)]
    lines = [count_lines(node) for node, _ in functions]
    density = [count_nodes_per_line(node, text) for node, text in functions if split_docstring(node)]
    assert statistics.median(lines) <= 12 and np.quantile(lines, 0.9) <= 35
    assert statistics.median(density) <= 13


# The package


def test_public_names_are_few_and_each_is_there_once():
    import circuitgraph

    modules, listed = public_names()
    assert len(listed) <= 56 and len(set(listed)) == len(listed)
    assert set(circuitgraph.__all__) == set(listed) <= set(dir(circuitgraph))
    for name, module in modules.items():
        home = importlib.import_module(f"circuitgraph.{module}")
        assert getattr(circuitgraph, name) is getattr(home, name)
        made_in = getattr(getattr(circuitgraph, name), "__module__", None)  # a table has none
        assert made_in in (None, f"circuitgraph.{module}"), "listed where it is made"


def test_an_unknown_name_is_refused_as_usual():
    import circuitgraph

    with pytest.raises(AttributeError, match="attribute.* load_modle|attribute 'load_modle'"):
        circuitgraph.load_modle  # noqa: B018


def test_no_module_is_called_like_a_public_name():
    packages = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    top = packages | {path.stem for path in PACKAGE.glob("*.py")}
    assert top & set(public_names()[0]) == set()


BLOCK = f"""
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {DEVELOPMENT}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Block())
import circuitgraph
assert "torch" not in sys.modules
"""


def test_it_imports_without_the_tools_of_development():
    modules = [f"import circuitgraph.{module_name(path)}" for path in MODULES]
    names = "for name in circuitgraph.__all__: getattr(circuitgraph, name)"
    run("-W", "ignore", "-c", "\n".join([BLOCK, *modules, names]))


def test_the_wheel_holds_modules_and_texts(copy, tmp_path):
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    run("-m", "pip", "wheel", *options, str(copy))
    names = zipfile.ZipFile(next(tmp_path.glob("transformer_circuitgraph-*.whl"))).namelist()
    files = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py")}
    texts = {"circuitgraph/texts/default.jsonl.gz", "circuitgraph/texts/LICENSES.md"}
    page = {str(path.relative_to(ROOT)) for path in (PACKAGE / "explorer").iterdir()}
    assert {"circuitgraph/explorer/d3.min.js", "circuitgraph/explorer/LICENSES.md"} <= page
    assert files | texts | page | {"circuitgraph/__init__.pyi"} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "nbs"))]


def test_no_file_is_large():
    command = ["git", "ls-files"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    sizes = {name: (ROOT / name).stat().st_size for name in listed if (ROOT / name).exists()}
    assert sizes and [name for name, size in sizes.items() if size >= 5e6] == []
