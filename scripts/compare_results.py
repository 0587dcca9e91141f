"""Compare two folders of results that `make_results.py` stored: `compare_results.py OLD NEW`.

For each result and array, the largest absolute difference relative to the largest entry of the old array.
NaN equals NaN. Shapes, strings and names must be the same. The exit code is 1 if anything exceeds 1e-6.
"""

import sys
from argparse import ArgumentParser
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

LIMIT = 1e-6


def gap_between(old: np.ndarray, new: np.ndarray) -> float:
    """Largest difference relative to the largest entry; infinite where arrays can't be compared."""
    if old.shape != new.shape or (old.dtype.kind in "US") != (new.dtype.kind in "US"):
        return float("inf")
    if old.dtype.kind in "US":
        return 0.0 if (old == new).all() else float("inf")
    a, b = (np.asarray(x, dtype=np.complex128 if x.dtype.kind == "c" else np.float64) for x in (old, new))
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(a) & np.isfinite(b)
        same = finite | (a == b) | (np.isnan(a) & np.isnan(b))
    if not same.all():
        return float("inf")
    if not finite.any():
        return 0.0
    largest, gap = np.abs(a[finite]).max(), np.abs(a[finite] - b[finite]).max()
    return float(gap / largest) if largest > 0 else float(gap)


def same_bits(old: np.ndarray, new: np.ndarray) -> bool:
    """Whether two arrays are the same, type and every bit included."""
    if old.dtype.kind in "US" and new.dtype.kind in "US":
        return old.shape == new.shape and bool((old == new).all())
    return old.dtype == new.dtype and old.shape == new.shape and old.tobytes() == new.tobytes()


def compare_files(old: Path, new: Path) -> tuple[list[tuple[float, str]], bool]:
    """The gap of each array of a result, largest first; and whether all are the same, bit for bit."""
    with np.load(old, allow_pickle=False) as a, np.load(new, allow_pickle=False) as b:
        names, bits = [*a.files, *(name for name in b.files if name not in a)], a.files == b.files
        gaps = []
        for name in names:
            if name not in a or name not in b:
                gaps.append((float("inf"), f"{name} (only in {'old' if name in a else 'new'})"))
                continue
            x, y = a[name], b[name]
            bits = bits and same_bits(x, y)
            told = "" if x.shape == y.shape else f" (shapes {x.shape} and {y.shape})"
            gaps.append((gap_between(x, y), name + told))
    return sorted(gaps, key=lambda gap: -gap[0]), bits


def print_result(name: str, gaps: list[tuple[float, str]], bits: bool, worst: int) -> None:
    """One line for a result, and one for each of its worst arrays that exceed the limit."""
    largest, where = gaps[0] if gaps else (0.0, "nothing")
    told = "bit-identical" if bits else f"not bit-identical, largest in {where}"
    print(f"{name:<40} {largest:9.2e}  {len(gaps):>6} arrays  {told}")
    for gap, array in gaps[:worst]:
        if gap > LIMIT:
            print(f"    {gap:9.2e}  {array}")


def main() -> int:
    """Compare what the command line names."""
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of names of results")
    parser.add_argument(
        "--worst", type=int, default=5, help="arrays listed of a result that exceeds the limit"
    )
    args = parser.parse_args()
    found = {path.stem for folder in (args.old, args.new) for path in folder.glob("*.npz")}
    names = sorted(name for name in found if any(fnmatch(name, pattern) for pattern in args.only))
    overall, n_bits = 0.0, 0
    for name in names:
        old, new = (folder / f"{name}.npz" for folder in (args.old, args.new))
        if not (old.exists() and new.exists()):
            print(f"{name:<40}       inf  only in {'old' if old.exists() else 'new'}")
            overall = float("inf")
            continue
        gaps, bits = compare_files(old, new)
        print_result(name, gaps, bits, args.worst)
        overall, n_bits = max([overall, *(gap for gap, _ in gaps[:1])]), n_bits + bits
    print(f"largest over all {len(names)} results: {overall:.2e}; {n_bits} bit-identical")
    return int(not names or overall > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
