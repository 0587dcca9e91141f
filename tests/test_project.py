"""What holds for the project as a whole: notebooks and package agree, pages refer to what exists, the package stands alone."""

import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
NBS, PACKAGE = ROOT / "nbs", ROOT / "circuitgraph"
NOTEBOOKS = sorted(NBS.glob("*.ipynb"))
MODULES = sorted(p for p in PACKAGE.glob("*.py") if p.stem not in ("__init__", "_modidx"))


def cells(path, kind):
    return ["".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]


def run(*args, cwd=ROOT):
    return subprocess.run([sys.executable, *args], cwd=cwd, capture_output=True, text=True, check=True)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The project's files, and none that it makes."""
    target = tmp_path_factory.mktemp("copy")
    for name in ("nbs", "circuitgraph", "scripts"): shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "graphs", "report.html", ".ipynb_checkpoints"))
    for name in ("settings.ini", "setup.py", "_quarto.yml", "README.md"): shutil.copy(ROOT / name, target / name)
    return target


# Notebooks and package


def imported_stages(source):
    """The modules of this package that a notebook imports, lazily imported names of the package resolved to theirs."""
    from circuitgraph import _HOME
    found, tree = set(), ast.parse(source)
    package = {a.asname or "circuitgraph" for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names if a.name.split(".")[0] == "circuitgraph"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") in package and node.attr in {*_HOME, *(p.stem for p in MODULES)}: found.add(_HOME.get(node.attr, node.attr))
        if isinstance(node, ast.Import): found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("circuitgraph.")} | ({"view", "cli"} & {a.name for a in node.names})
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("circuitgraph")):
            parts = (node.module or "").removeprefix("circuitgraph").strip(".").split(".")
            found |= {parts[0]} if parts[0] else {_HOME.get(a.name, a.name) for a in node.names}
    return found


def stages_too_high(paths):
    exported = {p: re.search(r"#\|\s*default_exp (\w+)", "\n".join(cells(p, "code"))) for p in paths if p.stem[0].isdigit()}  # an experiment exports nothing
    number = {found[1]: int(p.stem[:2]) for p, found in exported.items() if found}
    code = {p: re.sub(r"^[%!].*$", "", "\n".join(cells(p, "code")), flags=re.M) for p in paths if p.stem[0].isdigit()}
    return [(p.stem, stage) for p, source in code.items() for stage in imported_stages(source) if number[stage] > int(p.stem[:2])]


def test_a_notebook_imports_lower_stages_only(tmp_path):
    assert stages_too_high(NOTEBOOKS) == []
    for path in NOTEBOOKS: shutil.copy(path, tmp_path)
    for planted in ("from circuitgraph.view import view", "from .view import view", "from circuitgraph import view", "import circuitgraph.view", "import circuitgraph as cg\ncg.plot_layers"):
        book = json.loads((NBS / "06_graph.ipynb").read_text())
        book["cells"].append({"cell_type": "code", "source": [planted], "metadata": {}, "outputs": [], "execution_count": None})
        (tmp_path / "06_graph.ipynb").write_text(json.dumps(book))
        assert stages_too_high(sorted(tmp_path.glob("*.ipynb"))) == [("06_graph", "view")], planted


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}


def test_exporting_and_cleaning_change_nothing(copy):
    before = contents(copy)
    assert {p.relative_to(ROOT) for p in [*NOTEBOOKS, *PACKAGE.glob("*.py")]} <= set(before) and (copy / "nbs" / "_quarto.yml").is_symlink()
    for module, command in (("doclinks", "nbdev_export"), ("clean", "nbdev_clean")): run("-c", f"from nbdev.{module} import {command}; {command}()", cwd=copy)
    after = contents(copy)
    assert [str(p) for p in sorted({*before, *after}) if before.get(p) != after.get(p)] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_small_and_clean(path):
    book = json.loads(path.read_text(encoding="utf-8"))
    hidden = sum(bool(re.search(r"^#\|\s*hide\b", source, re.M)) for source in cells(path, "code"))
    assert path.stat().st_size < 1e6 and len(book["cells"]) <= 60 and hidden <= len(book["cells"]) / 5
    assert "widgets" not in book["metadata"]
    assert not [o for c in book["cells"] for o in c.get("outputs", []) if o["output_type"] == "error"]
    assert "application/vnd.jupyter.widget-view+json" not in path.read_text(encoding="utf-8")


def mixes_imports(source):
    """Whether a cell that a reader sees and that is not exported holds imports and other code: nbdev runs such cells again when it makes the pages."""
    if re.search(r"^#\|\s*(hide|export|exporti|exports)\b", source, re.M): return False
    return len({isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(re.sub(r"^[%!].*$", "", source, flags=re.M)).body}) == 2


def test_imports_stand_alone():
    assert mixes_imports("import torch\ntorch.ones(2)") and not mixes_imports("import torch\nfrom torch import nn") and not mixes_imports("torch.ones(2)")
    assert [(path.stem, source[:60]) for path in NOTEBOOKS for source in cells(path, "code") if mixes_imports(source)] == []


def test_readme_is_made_from_index():
    spec = importlib.util.spec_from_file_location("make_readme", ROOT / "scripts" / "make_readme.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    assert (ROOT / "README.md").read_text(encoding="utf-8") == maker.render(NBS / "index.ipynb")


def test_quickstart_has_at_most_ten_lines():
    assert sum(bool(line.strip()) and not line.startswith("#|") for source in cells(NBS / "index.ipynb", "code") for line in source.splitlines()) <= 10


def test_functions_are_short_and_documented():
    for path in [PACKAGE / "__init__.py", *MODULES]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef): assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"
        if path.stem == "__init__": continue  # its public names are those of the other modules
        public = set(ast.literal_eval(next(n.value for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__")))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in public: assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


# Pages


def test_the_site_lists_every_notebook():
    assert (NBS / "_quarto.yml").is_symlink() and (NBS / "_quarto.yml").read_bytes() == (ROOT / "_quarto.yml").read_bytes()
    contents = yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]["sidebar"]["contents"]
    listed = [entry if isinstance(entry, str) else entry["href"] for entry in contents]
    assert listed == ["index.ipynb", *[p.name for p in NOTEBOOKS if p.name != "index.ipynb"]]


def test_references_and_links_resolve():
    keys = re.findall(r"^@\w+\{([\w-]+),", (NBS / "references.bib").read_text(encoding="utf-8"), re.M)
    labels, cited = [], set()
    for path in NOTEBOOKS:
        code, prose = "\n".join(cells(path, "code")), "\n".join(cells(path, "markdown"))
        labels += re.findall(r"^#\|\s*label:\s*([\w-]+)", code, re.M) + re.findall(r"\{#([\w-]+)[^}]*\}", prose)
        prose = re.sub(r"```.*?```|`[^`]*`|\$\$.*?\$\$", "", prose, flags=re.S)
        here = set(re.findall(r"(?<![\w.])@([\w-]+)", prose + "\n".join(re.findall(r"fig-cap:(.*)", code))))
        cited |= {key for key in here if not re.match(r"(fig|eq|sec|tbl)-", key)}
        for reference in here - cited: assert labels.count(reference) == 1, f"{path.name}: @{reference}"
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", prose): assert (NBS / link).exists(), f"{path.name}: {link}"
    assert len(labels) == len(set(labels)) and cited <= set(keys), cited - set(keys)
    assert set(keys) <= cited and len(keys) == len(set(keys)), set(keys) - cited


# The package


def test_it_imports_without_the_tools_of_development():
    block = ("import sys\nclass Block:\n    def find_spec(self, name, path=None, target=None):\n        if name.split('.')[0] in {'nbdev', 'fastcore', 'execnb', 'matplotlib', 'pytest', 'sae_lens', 'captum'}: raise ModuleNotFoundError(name)\n"
             "sys.meta_path.insert(0, Block())\nimport circuitgraph\nassert 'torch' not in sys.modules\n")
    run("-W", "ignore", "-c", block + "\n".join(f"import circuitgraph.{p.stem}" for p in MODULES) + "\nfor name in circuitgraph.__all__: getattr(circuitgraph, name)")


@pytest.mark.parametrize("first", ["import circuitgraph.view", "from circuitgraph.view import plot_layers", "from circuitgraph import view", "import circuitgraph as cg; cg.view; import circuitgraph.view", "import circuitgraph.cli"])
def test_view_is_the_function_in_any_order_of_imports(first):
    run("-W", "ignore", "-c", f"{first}\nimport types, circuitgraph as cg\nassert isinstance(cg.view, types.FunctionType)\nfrom circuitgraph import view\nassert view is cg.view\nfrom circuitgraph.view import write_report\nassert cg.write_report is write_report")


def test_an_unknown_name_is_refused_as_usual():
    import circuitgraph
    with pytest.raises(AttributeError, match="no attribute 'load_modle'"): circuitgraph.load_modle  # noqa: B018
    assert set(circuitgraph.__all__) <= set(dir(circuitgraph))


def test_the_wheel_holds_modules_and_texts(copy, tmp_path):
    run("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(copy))
    names = zipfile.ZipFile(next(tmp_path.glob("transformer_circuitgraph-*.whl"))).namelist()
    assert {"circuitgraph/texts/default.jsonl.gz", "circuitgraph/texts/LICENSES.md", *(f"circuitgraph/{p.name}" for p in PACKAGE.glob("*.py"))} <= set(names)
    assert not [n for n in names if n.startswith(("tests", "nbs"))]


def test_no_file_is_large():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert listed and all((ROOT / name).stat().st_size < 5e6 for name in listed if (ROOT / name).exists())
