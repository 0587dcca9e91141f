"""The docs site, without Quarto: nbdev processes every notebook; pages and README refer to what exists."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
NOTEBOOKS = sorted(NBS.glob("*.ipynb"))
SIGNATURE = re.compile(r"```python\n.*?```", re.S)
EQUATION = re.compile(r"\$\$.*?\$\$", re.S)
CODE = re.compile(r"```.*?```|`[^`]*`", re.S)
CROSS_REFERENCE = re.compile(r"(fig|eq|sec|tbl)-")


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


readme = load_script("make_readme")


# What a fault looks like. Each function takes text and lists the faults in it.


def lost_text(first_cell):
    """Lines of a notebook's first cell that nbdev drops: it keeps title, claim and `- key: value`."""
    lines = first_cell.splitlines()
    return [line for line in lines if line.strip() and not re.match(r"# |> |- [\w-]+: ", line)]


def raw_signatures(markdown):
    """Links and cross-references in blocks of code, where they stand as they are written."""
    return [
        fault
        for block in SIGNATURE.findall(markdown)
        for fault in re.findall(r"\]\(http\S*|@eq-[\w-]+", block)
    ]


def read_labels(prose, code):
    """Labels of equations and sections in prose, and of figures in code."""
    return re.findall(r"\{#([\w-]+)[^}]*\}", prose) + re.findall(r"^#\|\s*label:\s*([\w-]+)", code, re.M)


def unresolved(prose, code, keys):
    """References to labels that the page lacks, and citations of keys that the bibliography lacks."""
    captions = "\n".join(re.findall(r"fig-cap:(.*)", code))
    text = CODE.sub("", EQUATION.sub("", prose)) + captions
    known = {*read_labels(prose, code), *keys}
    return sorted(set(re.findall(r"(?<![\w.@])@([A-Za-z][\w-]*)", text)) - known)


def dead_links(text, pages):
    """Links to notebooks that don't exist and to pages of the site that it lacks."""
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    dead = []
    for link in links:
        target = link.split("#")[0]
        if target.startswith(f"{readme.SITE}/"):
            exists = target.removeprefix(f"{readme.SITE}/") in pages
        elif target.endswith(".ipynb"):
            exists = readme.page_name(target) in pages and (NBS / target).exists()
        else:
            exists = not target or "://" in target or (ROOT / target).exists() or (NBS / target).exists()
        dead += [] if exists else [link]
    return dead


@pytest.mark.parametrize(
    ("first_cell", "lost"),
    [
        ("# Title\n\n> Claim.", []),
        ("# Title\n\n> Claim.\n\n- skip_showdoc: true", []),
        ("# Title\n\n> Claim.\n\nAn introduction.", ["An introduction."]),
        ("# Title\n\n> Claim.\n\n## Section", ["## Section"]),
    ],
)
def test_lost_text_is_seen(first_cell, lost):
    assert lost_text(first_cell) == lost


def test_links_in_signatures_are_seen_and_taken_out():
    linked = "[a](https://b.c)\n\n```python\ndef f(\n    x:int, # see [`g`](https://d.e#g)\n)->int:\n```\n"
    assert raw_signatures(linked) == ["](https://d.e#g)"]
    clean = load_script("process_notebooks").unlink_signatures(linked)
    assert clean == "[a](https://b.c)\n\n```python\ndef f(\n    x:int, # see `g`\n)->int:\n```\n"
    assert raw_signatures("```python\ndef f(x): # by @eq-one\n```") == ["@eq-one"]


@pytest.mark.parametrize(
    ("prose", "code", "missing"),
    [
        ("$$x$$ {#eq-here} By @eq-here and [@key; @key].", "", []),
        ("By @eq-elsewhere.", "", ["eq-elsewhere"]),
        ("See @fig-one.", "#| label: fig-one\nplot()", []),
        ("See @fig-two.", "#| label: fig-one\nplot()", ["fig-two"]),
        ("As [@nobody2020] says; write to me@example.org, not `@me`.", "", ["nobody2020"]),
        ("", '#| label: fig-one\n#| fig-cap: "After @nobody2020."', ["nobody2020"]),
    ],
)
def test_unresolved_references_are_seen(prose, code, missing):
    assert unresolved(prose, code, {"key"}) == missing


def test_dead_links_are_seen():
    pages = {readme.page_name(path.name) for path in NOTEBOOKS}
    numbered, good = f"[a]({readme.SITE}/58_build.html)", f"[a]({readme.SITE}/build.html#build_graph)"
    assert dead_links(numbered, pages) == [f"{readme.SITE}/58_build.html"]
    assert dead_links(good, pages) == dead_links("[a](30_graph.ipynb) [b](https://example.org)", pages) == []
    assert dead_links("[a](06_graph.ipynb), [b](nowhere.md)", pages) == ["06_graph.ipynb", "nowhere.md"]


# A small project, in which faults are planted that only nbdev sees.

GOOD = [
    "# Toy\n\n> A claim.",
    "#| default_exp toy",
    "#| export\ndef double(x: int) -> int:\n    'Twice.'\n    return 2 * x",
]
MISSING_PATH = 'import sys\n\nsys.path.append("../tests")\nfrom oracles_of_nobody import truth'
SANKEY = {"data": [{"type": "sankey", "link": {"source": [0], "target": [1], "value": [1]}}]}


def process(folder, *names):
    """Run nbdev's processing of a tree in a process of its own: its exit code and what it printed."""
    command = [sys.executable, "-W", "ignore", "scripts/process_notebooks.py", *names]
    env = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


@pytest.fixture
def toy_project(tmp_path):
    """A project of one notebook: a function that processes it with more cells."""
    for name in ("settings.ini", "_quarto.yml", "scripts/process_notebooks.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("nbs", "circuitgraph"):
        (tmp_path / name).mkdir()
    (tmp_path / "nbs" / "_quarto.yml").symlink_to("../_quarto.yml")
    (tmp_path / "circuitgraph" / "__init__.py").write_text("")
    (tmp_path / "circuitgraph" / "toy.py").write_text("def double(x):\n    return 2 * x\n")

    def process_cells(*more):
        first, *code = GOOD
        cells = [nbformat.v4.new_markdown_cell(first), *map(nbformat.v4.new_code_cell, code), *more]
        kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
        nbformat.write(
            nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "nbs" / "01_toy.ipynb"
        )
        return process(tmp_path)

    return process_cells


def test_a_sound_notebook_is_processed(toy_project):
    done = toy_project(nbformat.v4.new_code_cell("import sys"))
    assert done.returncode == 0 and "1 of 1 notebooks" in done.stdout, done.stdout + done.stderr


def test_the_code_of_experiments_is_folded():
    title = {"cell_type": "raw", "source": ["---\n", "title: 'A: b'\n", "---\n"]}
    book = {"cells": [title]}
    load_script("process_notebooks").fold_code(book)
    text = "".join(book["cells"][0]["source"])
    assert yaml.safe_load(text.strip("-\n")) == {"title": "A: b", "code-fold": True}


def test_pages_need_no_network_for_equations():
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    html = config["format"]["html"]
    assert html["html-math-method"] == "mathml" and (NBS / html["css"]).exists()


def test_an_import_that_fails_from_the_root_is_seen(toy_project):
    done = toy_project(nbformat.v4.new_code_cell(MISSING_PATH))
    assert done.returncode == 1 and "FAILED 01_toy.ipynb: ModuleNotFoundError" in done.stdout, done.stderr


def test_a_figure_whose_json_looks_like_a_cell_is_seen(toy_project):
    cell = nbformat.v4.new_code_cell("figure")
    cell.outputs = [nbformat.v4.new_output("display_data", {"application/vnd.plotly.v1+json": SANKEY})]
    done = toy_project(cell)
    assert done.returncode == 1 and "FAILED 01_toy.ipynb: AttributeError" in done.stdout, (
        done.stdout + done.stderr
    )


# The site as it is


def read_cells(path, kind):
    book = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == kind]


def read_keys():
    return re.findall(r"^@\w+\{([\w-]+),", (NBS / "references.bib").read_text(encoding="utf-8"), re.M)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """nbdev's run over a copy of the tree."""
    folder = tmp_path_factory.mktemp("site")
    ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "plotly.min.js")
    for name in ("nbs", "circuitgraph", "scripts", "tests"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    for name in ("settings.ini", "_quarto.yml"):
        shutil.copy(ROOT / name, folder / name)
    return folder, process(folder)


def test_nbdev_processes_every_notebook(site):
    folder, done = site
    assert done.returncode == 0, "\n".join(re.findall(r"^FAILED .*", done.stdout, re.M)) or done.stderr
    assert {path.name for path in (folder / "_proc").glob("*.ipynb")} == {path.name for path in NOTEBOOKS}


def test_processed_pages_are_sound(site):
    folder, _ = site
    keys, faults = set(read_keys()), {}
    pages = {readme.page_name(path.name) for path in NOTEBOOKS}
    for path in sorted((folder / "_proc").glob("*.ipynb")):
        book = json.loads(path.read_text(encoding="utf-8"))
        outputs = [output.get("data", {}) for cell in book["cells"] for output in cell.get("outputs", [])]
        shown = "\n\n".join("".join(data["text/markdown"]) for data in outputs if "text/markdown" in data)
        prose = "\n\n".join(read_cells(path, "markdown"))
        code = "\n".join(read_cells(NBS / path.name, "code"))
        docstrings = SIGNATURE.sub("", shown)
        missing = unresolved(f"{prose}\n\n{docstrings}", code, keys)
        found = raw_signatures(shown) + missing + dead_links(f"{prose}\n\n{docstrings}", pages)
        header = "".join(read_cells(path, "raw")[:1])
        found += [] if f"output-file: {readme.page_name(path.name)}" in header else ["page name"]
        if found:
            faults[path.name] = found
    assert not faults, faults


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_page_says_all_that_its_notebook_says(path):
    book = json.loads(path.read_text(encoding="utf-8"))
    first = "".join(book["cells"][0]["source"])
    assert lost_text(first) == [], "prose under the title is lost: it belongs into the second cell"
    assert re.match(r"# .+\n\n> .+", first), "the first cell is a title and a claim"
    prose, code = ("\n\n".join(read_cells(path, kind)) for kind in ("markdown", "code"))
    assert unresolved(prose, code, set(read_keys())) == []
    assert dead_links(prose, {readme.page_name(notebook.name) for notebook in NOTEBOOKS}) == []


def test_labels_and_keys_are_unique_and_every_key_is_cited():
    prose = {path.stem: "\n\n".join(read_cells(path, "markdown")) for path in NOTEBOOKS}
    code = {path.stem: "\n".join(read_cells(path, "code")) for path in NOTEBOOKS}
    labels = [label for name in prose for label in read_labels(CODE.sub("", prose[name]), code[name])]
    assert len(labels) == len(set(labels))
    keys, text = read_keys(), "\n".join([*prose.values(), *code.values()])
    assert len(keys) == len(set(keys)) and [key for key in keys if f"@{key}" not in text] == []


def test_links_in_the_readme_lead_to_pages():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = {readme.page_name(path.name) for path in NOTEBOOKS}
    assert f"]({readme.SITE}/" in text and dead_links(text, pages) == []


def test_the_readme_is_made_from_the_index():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme.render(NBS / "index.ipynb")


def test_make_docs_does_the_part_of_nbdev_before_it_asks_for_quarto():
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").split("\ndocs:")[1].split("\n\n")[0]
    assert lines.index("scripts/process_notebooks.py") < lines.index("command -v quarto")
