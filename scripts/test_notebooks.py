"""Run the tests in the notebooks, each in a fresh process, as many at a time as there are cores, and print one counted line for each. Names as arguments choose notebooks; by default all."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NBS = Path(__file__).resolve().parent.parent / "nbs"
RUN = "import sys; from pathlib import Path; from nbdev.test import test_nb; ok, _ = test_nb(Path(sys.argv[1]), skip_flags=['gpu', 'net'], do_print=False); sys.exit(not ok)"


def test(path: Path) -> tuple[Path, int, int, bool, float]:
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    asserts = sum("".join(c["source"]).count("assert ") + "".join(c["source"]).count("refused(") for c in cells)
    start = time.time()
    ok = subprocess.run([sys.executable, "-c", RUN, str(path)], cwd=NBS, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode == 0
    return path, len(cells), asserts, ok, time.time() - start


def main(names: list[str]) -> int:
    paths = [NBS / f"{name}.ipynb" for name in names] or sorted(NBS.glob("*.ipynb"))
    failed, total = [], 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # a process each, with one thread each
        for path, cells, asserts, ok, seconds in pool.map(test, paths):
            total += asserts
            failed += [] if ok else [path.name]
            print(f"{'ok    ' if ok else 'FAILED'} {path.name}: {cells} cells, {asserts} checks, {seconds:.0f} s", flush=True)
    print(f"{len(paths) - len(failed)} of {len(paths)} notebooks passed, {total} checks" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
