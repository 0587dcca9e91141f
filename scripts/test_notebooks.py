"""Run the tests in the notebooks and print one counted line for each.

    python scripts/test_notebooks.py                # all
    python scripts/test_notebooks.py 30_graph       # one

Each notebook runs in a process of its own, as many at a time as there are cores. The processes are forked
from one that has imported the slow libraries, which takes seconds. They import the package of the tree that
this script stands in.
"""

import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
CONTEXT = multiprocessing.get_context("forkserver")
SLOW_TO_IMPORT = [
    "nbdev.test",
    "torch",
    "pandas",
    "plotly.graph_objects",
    "transformer_lens",
    "sklearn.cluster",
]


@dataclass
class Result:
    """What came of one notebook."""

    name: str
    cells: int
    checks: int
    passed: bool
    seconds: float

    def __str__(self) -> str:
        mark = "ok    " if self.passed else "FAILED"
        return f"{mark} {self.name}: {self.cells} cells, {self.checks} checks, {self.seconds:.0f} s"


def set_environment() -> None:
    """One thread for each notebook, and this tree first on the path."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(path for path in paths if path)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def run(path: Path) -> None:
    """Run the cells of a notebook but those that need a GPU or a network; exit with 1 if one fails."""
    from nbdev.test import test_nb

    os.chdir(NBS)
    passed, _ = test_nb(path, skip_flags=["gpu", "net"], do_print=False)
    sys.exit(not passed)


def test(path: Path) -> Result:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    checks = sum(source.count("assert ") + source.count("refused(") for source in code)
    start = time.time()
    process = CONTEXT.Process(target=run, args=(path,))
    process.start()
    process.join()
    return Result(path.name, len(code), checks, process.exitcode == 0, time.time() - start)


def main(names: list[str]) -> int:
    paths = [NBS / f"{name}.ipynb" for name in names] or sorted(NBS.glob("*.ipynb"))
    set_environment()
    CONTEXT.set_forkserver_preload(SLOW_TO_IMPORT)
    results = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each thread waits for a process
        for result in pool.map(test, paths):
            results.append(result)
            print(result, flush=True)
    failed = [result.name for result in results if not result.passed]
    checks = sum(result.checks for result in results)
    failures = f"; failed: {', '.join(failed)}" if failed else ""
    print(f"{len(paths) - len(failed)} of {len(paths)} notebooks passed, {checks} checks{failures}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
