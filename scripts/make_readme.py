"""README.md from nbs/index.ipynb, without Quarto: markdown as it stands, code in fences, text outputs below. Figures stay on the site."""

import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
SITE = "https://circuitgraph.github.io/circuitgraph"


def show_output(output: nbformat.NotebookNode) -> str:
    """The text of an output; tables come as their plain text."""
    text = output.get("text") if output.output_type == "stream" else output.get("data", {}).get("text/plain", "")
    return "" if not text or text.startswith("Figure(") else f"\n```text\n{text.rstrip()}\n```\n"


def render(notebook: Path) -> str:
    parts = []
    for cell in nbformat.read(notebook, 4).cells:
        if cell.cell_type == "markdown":
            parts.append(re.sub(r"\]\((\w+)\.ipynb\)", rf"]({SITE}/\1.html)", cell.source))
        elif not re.search(r"^#\|\s*hide", cell.source, re.M):
            code = re.sub(r"^#\|.*\n", "", cell.source, flags=re.M)
            parts.append(f"```python\n{code}\n```\n" + "".join(map(show_output, cell.outputs)))
    return "\n\n".join(part.strip() for part in parts) + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(render(ROOT / "nbs" / "index.ipynb"), encoding="utf-8")
