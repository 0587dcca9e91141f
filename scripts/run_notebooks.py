"""Run notebooks in place, all or those named, and keep only outputs that belong in the paper.

    python scripts/run_notebooks.py              # all
    python scripts/run_notebooks.py 30_graph     # one

Progress bars and the state of widgets are dropped. Notebooks import the package of the tree that this script
stands in.
"""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
WIDGET = "application/vnd.jupyter.widget-view+json"
CLEAN = "import sys; from nbdev.clean import nbdev_clean; nbdev_clean(sys.argv[1])"


def import_from_this_tree() -> None:
    """Put this tree first on the path of the processes that are started from now on."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)


def belongs_in_the_paper(output: nbformat.NotebookNode) -> bool:
    """Whether an output is kept: neither a widget nor what was written to stderr."""
    return WIDGET not in output.get("data", {}) and output.get("name") != "stderr"


def run(path: Path) -> None:
    """Run one notebook and write it back."""
    book = nbformat.read(path, 4)
    resources = {"metadata": {"path": NBS}}
    NotebookClient(book, timeout=1800, kernel_name="python3", resources=resources).execute()
    book.metadata.pop("widgets", None)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if belongs_in_the_paper(output)]
    nbformat.write(book, path)
    subprocess.run([sys.executable, "-c", CLEAN, str(path)], check=True, cwd=ROOT)


def main(names: list[str]) -> None:
    import_from_this_tree()
    for path in [NBS / f"{name}.ipynb" for name in names] or sorted(NBS.glob("*.ipynb")):
        print(path.name, flush=True)
        run(path)


if __name__ == "__main__":
    main(sys.argv[1:])
