"""The sidebar of the docs site, in `_quarto.yml`: one section for each range of numbers of notebooks.

python scripts/make_sidebar.py      # rewrites what stands below `contents:`
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = {  # the first number of each section; notebooks below 8 stand before all sections
    8: "Files and arguments",
    10: "Model and data",
    20: "Dictionaries",
    29: "Graph",
    40: "Attribution",
    50: "Cutting and building",
    60: "Ablation and viewer",
    70: "Methods",
    80: "Communities",
    88: "Labels",
    89: "Comparison",
    90: "Command line",
    91: "Experiments and discussion",
}
START = "    contents:\n"


def render(names: list[str]) -> str:
    """The lines below `contents:` for notebooks with these names (without suffix)."""
    lines, sections = ["- text: circuitgraph", "  href: index.ipynb"], dict(SECTIONS)
    for name in sorted(name for name in names if name[0].isdigit()):
        started = [first for first in sections if first <= int(name[:2])]
        for first in started:
            lines += [f"- section: {sections.pop(first)}", "  contents:"]
        indent = "" if int(name[:2]) < min(SECTIONS) else "    "
        lines.append(f"{indent}- {name}.ipynb")
    return "".join(f"      {line}\n" for line in lines)


def main() -> None:
    path = ROOT / "_quarto.yml"
    head, _, _ = path.read_text(encoding="utf-8").partition(START)
    names = [notebook.stem for notebook in (ROOT / "nbs").glob("*.ipynb")]
    path.write_text(head + START + render(names), encoding="utf-8")


if __name__ == "__main__":
    main()
