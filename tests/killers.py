"""Every long command on a small model, and what may befall it: kills, full disks, deleted folders, and more.

All work is done in processes forked from one that has imported everything. After each trouble the same
command is given once more, and has to leave the files of a command that nothing has befallen.
"""

import ctypes
import functools
import json
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path

import pandas as pd
import torch
from safetensors import SafetensorError
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))

import exp_ladder
import make_family

import circuitgraph as cg
from circuitgraph.cli import app
from circuitgraph.data.corpus import Document
from circuitgraph.methods.gates import GateConfig, search_gates
from exp_labels import keep_or_build
from savers import wait

GIVEN: dict = {}  # what all work starts from; see `prepare`
N_STEPS, SIZE = 6, "2x32"
OBSCURE = 1  # the exit code of an error that names nothing
NO_MEMORY = 3


# What all work starts from


def read_text():
    cats, numbers = "the cat sat on the mat and the dog saw it ", "one two three four five six seven eight "
    return [60 * cats, 60 * numbers]


def read_documents(_):
    "Texts of each register to train on, and texts that are held out."
    registers = ("code", "literature", "documentation", "documentation")
    known = [Document(name, str(i), 12 * text) for i, text in enumerate(read_text()) for name in registers]
    return known, known


def list_behaviours(_, held_out):
    return {f"token {i} of 4": held_out.tokens % 4 == i for i in range(4)}


def make_models(folder):
    "Two small models with a tokenizer, and what they began with."
    known, _ = read_documents([])
    tokenizer = make_family.train_tokenizer([document.text for document in known])
    documents = make_family.encode(tokenizer, known)
    for seed in (0, make_family.SHUFFLED):
        make_family.train_member(make_family.Member(SIZE, seed), tokenizer, documents, folder, N_STEPS)


def prepare(home):
    "Small models, a text, a graph, dictionaries and a graph of features."
    make_family.SAVE_STEPS = 2
    for module in (make_family, exp_ladder):
        module.N_SEEDS = {SIZE: 1}
        module.read_documents = read_documents
    exp_ladder.list_behaviours = list_behaviours
    exp_ladder.N_NULL = 6
    exp_ladder.N_GRAPH = exp_ladder.N_MATCH = exp_ladder.N_CUT = 4
    exp_ladder.N_NEURONS = exp_ladder.SHIFTS = 2
    exp_ladder.OF_NEURONS = ("other half",)
    make_models(home / "family")
    text = home / "text.txt"
    text.write_text("\n".join([" ".join(read_text())] * 3))
    options = ["--model", home / f"family/{SIZE}-0", "--corpus", text, "--seq-len", 16]
    GIVEN.update(home=home, text=text, options=options)
    build_modules(home / "modules")
    train(home / "trained")
    GIVEN["dictionaries"] = home / "trained/dictionaries"
    GIVEN["model"] = cg.load_model(home / f"family/{SIZE}-0", dtype=torch.float32)
    build_features(home / "features")


# The work


def shell(*words):
    "Give a command; its code of exit is this process's."
    code = app([str(word) for word in words], standalone_mode=False)
    if code:
        raise SystemExit(code)


def build_modules(folder):
    out = ["--out", folder / "graph", "--force", "--batch-size", 1, "--n-tokens", 256]
    shell("build", "--nodes", "head", *out, *GIVEN["options"])


def build_features(folder):
    out = ["--out", folder / "graph", "--force", "--memory", 9_000, "--n-tokens", 256, "--n-check", 0]
    shell("build", "--nodes", GIVEN["dictionaries"], *out, *GIVEN["options"])


def train(folder):
    sizes = ["--d-dict", 24, "--k", 3, "--n-steps", 420, "--batch-size", 32, "--n-tokens", 512]
    shell("train", "--modules", "m0,a0", "--out", folder / "dictionaries", *sizes, *GIVEN["options"])


def compare_methods(folder):
    chosen = ["--methods", "EAP;flow;random", "--nodes", "layer", "--n-edges", 3, "--n-edges", 5]
    out = ["--out", folder / "rows.csv", "--n-prompts", 4]
    shell("compare-methods", "--tasks", "text", *chosen, *out, *GIVEN["options"])


def communities(folder):
    graph = GIVEN["home"] / "features/graph"
    shell("communities", graph, "--out", folder / "graph", "--n-null", 9, "--force")


def labels(folder):
    graph = cg.Graph.load(GIVEN["home"] / "features/graph")
    dictionaries = cg.load_dictionaries(GIVEN["dictionaries"], GIVEN["model"])
    text = cg.load_corpus(GIVEN["text"], GIVEN["model"], n_tokens=512, seq_len=16)
    run = cg.Run(checkpoint=folder / "unfinished", progress=False)
    keep_or_build(
        folder / "graph", lambda: cg.label_nodes(graph, GIVEN["model"], text, dictionaries, run=run)
    )


def compare(folder):
    graph = GIVEN["home"] / "modules/graph"
    sizes = ["--n-classes", 3, "--text", GIVEN["text"]]
    shell("compare", graph, graph, "--out", folder / "rows.csv", "--force", *sizes)


def run_script(script, *words):
    sys.argv = [script.__file__, *map(str, words)]
    script.main()


def ladder(folder):
    out = folder / "results"
    out.mkdir(exist_ok=True)
    family = GIVEN["home"] / "family"
    run_script(exp_ladder, "--family", family, "--folder", folder / "graphs", "--out", out)


def family(folder):
    out = ["--out", folder / "family", "--table", folder / "rows.csv"]
    run_script(make_family, "--sizes", SIZE, "--n-steps", N_STEPS, *out)


def gates(folder):
    tokens = torch.randint(50, (4, 16), generator=torch.Generator().manual_seed(0))
    judging = cg.Judging(run=cg.Run(checkpoint=folder / "unfinished", progress=False))
    options = {"config": GateConfig(n_steps=3), "value": "mean", "judging": judging}
    search_gates(GIVEN["model"], tokens, "layer", [2, 4], **options).save(folder / "graph")


LONG = (build_modules, build_features, train, compare_methods, communities)
LONG += (labels, compare, ladder, family, gates)
WORK = {work.__name__: work for work in LONG}


# Processes


def do(work, folder):
    "Do the work and end the process: with 2 if it was refused in words, and with 3 for want of memory."
    try:
        work(folder)
    except (ValueError, OSError, SafetensorError) as error:  # the last one says that a disk is full
        os.write(1, f"Error: {error}\n".encode())
        os._exit(2 if str(error) else OBSCURE)
    except SystemExit as error:
        os._exit(error.code if isinstance(error.code, int) else 2)
    except MemoryError:
        os._exit(NO_MEMORY)
    except BaseException as error:
        traceback.print_exc()
        os._exit(NO_MEMORY if "alloc" in str(error) else OBSCURE)
    os._exit(0)


def start(work, folder, before=lambda: None):
    "Begin the work in a process of its own, after something that happens in that process."
    process = os.fork()
    if process:
        return process
    said = os.open(folder.parent / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    tqdm.set_lock(threading.RLock())  # the usual one is shared, and a process that is killed never returns it
    before()
    return do(work, folder)


def read_said(folder):
    return (folder.parent / "said.txt").read_text()[-3000:]


def read_results(folder):
    "What work has left, but for unfinished parts and for the time that it took."
    results = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if "unfinished" in name or ".partial" in name:
            continue
        if path.suffix in (".parquet", ".safetensors"):
            results[name] = path.read_bytes()
        if path.suffix == ".csv":
            table = pd.read_csv(path).drop(columns=["seconds", "memory"], errors="ignore")
            results[name] = sorted(table.to_csv(index=False).splitlines())  # lost rows are added at the end
    return results


def check_whole(work, folder, expected):
    "Go on with the work, and check that it leaves the files that it leaves when nothing befalls it."
    code = wait(start(work, folder))
    assert code == 0, (code, read_said(folder))
    found = read_results(folder)
    assert expected and expected.keys() == found.keys(), (sorted(expected), sorted(found))
    assert [path for path in expected if expected[path] != found[path]] == []


# Troubles. Each takes the work, its folder, the files that it should leave, the seconds that it takes, and a
# source of chance; it says how often the trouble was met.


def kill(work, folder, expected, seconds, rng, n=1):
    "Kill the work up to `n` times, each time later in it, as long as it has not come to its end."
    n_killed = 0
    while n_killed < n:
        process = start(work, folder)
        time.sleep(rng.uniform(0, seconds))
        os.kill(process, signal.SIGKILL)
        if wait(process) == 0:
            break
        n_killed += 1
    check_whole(work, folder, expected)
    return n_killed


CLONE_NEWNS, CLONE_NEWUSER, MS_REMOUNT, MS_REC, MS_PRIVATE = 0x20000, 0x10000000, 32, 16384, 1 << 18


def call_system(name, *args):
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*args):
        raise OSError(ctypes.get_errno(), f"{name} is not allowed here")


def mount_small_disk(folder, n_bytes, flags=0):
    "Put a small disk in place of a folder, for this process and its children alone."
    if not flags:
        call_system("unshare", CLONE_NEWNS if os.geteuid() == 0 else CLONE_NEWNS | CLONE_NEWUSER)
        call_system("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    size = f"size={n_bytes}".encode()
    call_system("mount", b"tmpfs", str(folder).encode(), b"tmpfs", flags, size)


def limit_files(n_bytes):
    "Where no disk can be mounted: no file may be larger."
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.RLIM_INFINITY))


def work_on_small_disk(work, folder, n_bytes, expected):
    "Fill a small disk, make room, and go on."
    before = functools.partial(limit_files, n_bytes // 4)
    is_mounted = False
    try:
        mount_small_disk(folder, n_bytes)
        is_mounted, before = True, lambda: None
    except OSError:
        pass
    code = wait(start(work, folder, before))
    assert code in (0, 2), (code, read_said(folder))
    if is_mounted:
        mount_small_disk(folder, 2**28, MS_REMOUNT)
    check_whole(work, folder, expected)
    os._exit(5 if code == 2 else 0)


def fill_disk(work, folder, expected, seconds, rng):  # noqa: ARG001
    "Let the disk be full at some size of the results."
    largest = sum(len(one) for one in expected.values())
    n_bytes = 4096 * (1 + int(rng.uniform(0, 0.9) * largest / 4096))
    process = os.fork()
    if not process:
        try:
            work_on_small_disk(work, folder, n_bytes, expected)
        except BaseException:
            traceback.print_exc()
            os._exit(OBSCURE)
    code = wait(process)
    assert code in (0, 5), (code, n_bytes, read_said(folder))
    return int(code == 5)


def delete_folder(work, folder, expected, seconds, rng):
    "Delete all that the work has written so far, while it goes on."
    process = start(work, folder)
    time.sleep(rng.uniform(0, seconds))
    for path in list(folder.iterdir()):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    code = wait(process)
    assert code in (0, 2), (code, read_said(folder))
    check_whole(work, folder, expected)
    return 1


def take_memory(work, folder, expected, seconds, rng):  # noqa: ARG001
    "Leave the work a few megabytes."
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    budget = held + int(rng.uniform(0, 2**22))
    process = start(work, folder, lambda: resource.setrlimit(resource.RLIMIT_AS, (budget, budget)))
    code = wait(process)
    assert code != OBSCURE, read_said(folder)
    check_whole(work, folder, expected)
    return int(code != 0)


def work_twice_at_once(work, folder, expected, seconds, rng):
    "Two processes with one output: one at least comes to its end, and the other says why it does not."
    first = start(work, folder)
    time.sleep(rng.uniform(0, seconds / 2))
    second = start(work, folder)
    codes = {wait(first), wait(second)}
    assert 0 in codes and codes <= {0, 2}, (codes, read_said(folder))
    check_whole(work, folder, expected)
    return 1


TROUBLES = {one.__name__: one for one in (fill_disk, delete_folder, take_memory, work_twice_at_once)}


# All of them


def try_work(home, name, n_kills, seed):
    "How often each trouble was met by some work."
    work, rng = WORK[name], random.Random(f"{name} {seed}")
    warm, whole = home / name / "warm", home / name / "whole"
    for folder in (warm, whole):
        folder.mkdir(parents=True)
    work(warm)  # so that the processes that are forked have all that they import and compile
    started = time.monotonic()
    assert wait(start(work, whole)) == 0, read_said(whole)
    seconds = time.monotonic() - started
    expected, met, n_folders = read_results(whole), {"kill": 0}, 0

    def meet(trouble, **options):
        nonlocal n_folders
        n_folders += 1
        folder = home / name / str(n_folders)
        folder.mkdir()
        return trouble(work, folder, expected, seconds, rng, **options)

    while met["kill"] < n_kills:
        met["kill"] += meet(kill, n=min(3, n_kills - met["kill"]))
    turn = list(WORK).index(name) + seed
    for i, (key, trouble) in enumerate(TROUBLES.items()):
        n = n_kills // 5 or int(turn % len(TROUBLES) == i)  # of few kills, one other trouble
        met[key] = sum(meet(trouble) for _ in range(n))
    return met


def try_all(home, names, n_kills, seed):
    "All work in turn: prints for each how often it met each trouble, or what went wrong."
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    said, printed = {}, os.dup(1)
    os.dup2(2, 1)
    prepare(Path(home))
    for name in names:
        try:
            said[name] = try_work(Path(home), name, n_kills, seed)
        except Exception:
            said[name] = traceback.format_exc()
        sys.stderr.write(f"{name}: {said[name]}\n")
    os.write(printed, json.dumps(said).encode())
