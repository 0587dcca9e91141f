"""README.md from nbs/index.ipynb, without Quarto.

Prose stays as it stands, code comes into fences with text outputs below, and figures stay on the site.
"""

import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
SITE = "https://circuitgraph.github.io/circuitgraph"


def page_name(notebook: str) -> str:
    """The page of a notebook: its name without the number, so 58_build.ipynb is build.html."""
    return re.sub(r"^\d+_", "", Path(notebook).stem) + ".html"


def link_pages(text: str) -> str:
    """Markdown whose links to notebooks lead to their pages on the site, and pictures to their files."""
    text = text.replace("](images/", "](nbs/images/")
    return re.sub(r"\]\((\w+\.ipynb)\)", lambda link: f"]({SITE}/{page_name(link[1])})", text)


def show_output(output: nbformat.NotebookNode) -> str:
    """The text of an output; tables come as their plain text."""
    text = output.get("data", {}).get("text/plain", "")
    if output.output_type == "stream":
        text = output.get("text", "")
    if not text or text.startswith("Figure("):
        return ""
    return f"\n```text\n{text.rstrip()}\n```\n"


def render(notebook: Path) -> str:
    """The whole README."""
    parts = []
    for cell in nbformat.read(notebook, 4).cells:
        if cell.cell_type == "markdown":
            parts.append(link_pages(cell.source))
        elif not re.search(r"^#\|\s*hide", cell.source, re.M):
            code = re.sub(r"^#\|.*\n", "", cell.source, flags=re.M)
            parts.append(f"```python\n{code}\n```\n" + "".join(map(show_output, cell.outputs)))
    return "\n\n".join(part.strip() for part in parts) + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(render(ROOT / "nbs" / "index.ipynb"), encoding="utf-8")
