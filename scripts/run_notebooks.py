"""Run notebooks in place, all or those named, and keep only outputs that belong in the paper: no progress bars, no state of widgets."""

import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NBS = Path(__file__).resolve().parent.parent / "nbs"
WIDGET = "application/vnd.jupyter.widget-view+json"


def main(names: list[str]) -> None:
    for path in [NBS / f"{name}.ipynb" for name in names] or sorted(NBS.glob("*.ipynb")):
        print(path.name, flush=True)
        book = nbformat.read(path, 4)
        NotebookClient(book, timeout=1800, kernel_name="python3", resources={"metadata": {"path": NBS}}).execute()
        book.metadata.pop("widgets", None)
        for cell in book.cells:
            if cell.cell_type == "code": cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {}) and o.get("name") != "stderr"]
        nbformat.write(book, path)
        subprocess.run([sys.executable, "-c", "import sys; from nbdev.clean import nbdev_clean; nbdev_clean(sys.argv[1])", str(path)], check=True, cwd=NBS.parent)


if __name__ == "__main__":
    main(sys.argv[1:])
