"""Do nbdev's part of the docs site, without Quarto: process all notebooks, or those named, into `_proc`.

    python scripts/process_notebooks.py              # all
    python scripts/process_notebooks.py 30_graph     # one

nbdev executes the cells that import and export, and shows the signature of each exported function. Every
notebook that can't be processed is named with its error, and the exit code is 1.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from nbdev.config import get_config
from nbdev.doclinks import _build_modidx
from nbdev.processors import _default_exp, exec_show_docs
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import FilterDefaults, proc_nbs
from nbdev.serve_drv import main as process_notebook
from plotly.offline import get_plotlyjs


def unlink_signatures(text: str) -> str:
    """Markdown without links in its blocks of code, where they would stand as they are written."""
    link = re.compile(r"\[(`[^`\]]*`)\]\(https?://[^)]*\)")
    return re.sub(r"```python\n.*?```", lambda block: link.sub(r"\1", block[0]), text, flags=re.S)


class ExecuteCells(exec_show_docs):
    """nbdev's execution of cells, as parts of their module: a signature may name what follows later."""

    def begin(self) -> None:
        super().begin()
        module = _default_exp(self.nb)
        if module is not None:
            module = f"{get_config().lib_path.name}.{module}"
            self.k.run_cell(f"__name__ = {module!r}\nfrom {module} import *")


class Processors(FilterDefaults):
    """nbdev's steps, with our execution of cells."""

    def base_procs(self) -> list[type]:
        return [ExecuteCells if step is exec_show_docs else step for step in super().base_procs()]


def fold_code(book: dict[str, Any]) -> None:
    """Fold the code of an experiment, whose readers come for its tables and figures."""
    head = book["cells"][0]
    assert head["cell_type"] == "raw", "nbdev writes the title as the first cell"
    lines = "".join(head["source"]).rstrip("-\n")
    head["source"] = f"{lines}\ncode-fold: true\n---\n".splitlines(keepends=True)


def clean_page(page: Path) -> None:
    """Take nbdev's links out of the signatures of a processed notebook, and fold the code of experiments."""
    book = json.loads(page.read_text(encoding="utf-8"))
    if "_exp_" in page.name:
        fold_code(book)
    for cell in book["cells"]:
        for output in cell.get("outputs", []):
            if "text/markdown" in output.get("data", {}):
                text = "".join(output["data"]["text/markdown"])
                output["data"]["text/markdown"] = unlink_signatures(text).splitlines(keepends=True)
    page.write_text(json.dumps(book, ensure_ascii=False, indent=1), encoding="utf-8")


def process(path: Path, target: Path) -> str:
    """Process one notebook; the error, or nothing."""
    try:
        process_notebook((path, target / path.name, Processors))
        clean_page(target / path.name)
    except Exception as error:
        cause = error.__cause__ or error
        return f"{type(cause).__name__}: {cause}"
    return ""


def main(names: list[str]) -> int:
    config = get_config()
    (config.nbs_path / "plotly.min.js").write_text(get_plotlyjs(), encoding="utf-8")
    sys.path.append(str(config.config_path / "tests"))  # helpers that notebooks import from ../tests
    refresh_quarto_yml()
    _build_modidx()
    target = proc_nbs(
        config.nbs_path, n_workers=0, force=True, skip_file_re=r"\.ipynb$"
    )  # what Quarto needs beside
    paths = [config.nbs_path / f"{name}.ipynb" for name in names] or sorted(config.nbs_path.glob("*.ipynb"))
    errors = {path.name: error for path in paths if (error := process(path, target))}
    for name, error in errors.items():
        print(f"FAILED {name}: {error}")
    print(f"nbdev processed {len(paths) - len(errors)} of {len(paths)} notebooks into {target}")
    return bool(errors)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
