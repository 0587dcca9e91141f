"""Processes that save and read graphs, and are killed. They are forked from a process that imports little."""

import errno
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import pandas as pd

from circuitgraph.graph.graph import Graph
from circuitgraph.graph.tables import GraphError

OWN = {".graph.lock", "edges.parquet", "meta.json", "nodes.parquet"}
SIZES = (5, 40)  # nodes of the graphs that replace each other


def chain(n):
    """A chain of `n` nodes; all numbers in it are `n`, so that parts of two graphs don't fit together."""
    names = [f"n{i}" for i in range(n)]
    nodes = pd.DataFrame({"name": names, "module": names, "kind": "mlp", "layer": range(n), "index": -1})
    nodes = nodes.assign(frequency=float(n), mean_activation=float(n))
    edges = pd.DataFrame({"source": names[:-1], "target": names[1:], "port": "mlp", "count": n})
    edges = edges.assign(weight=float(n), abs_weight=float(n), rms_weight=float(n))
    return Graph(nodes, edges, {"model": {"name": "chain"}, "nodes": "layer", "seed": n})


def size_of_whole(folder):
    """How many nodes the saved graph has; an error if its parts are of different graphs."""
    loaded = Graph.load(folder)
    n = loaded.meta["seed"]
    assert loaded == chain(n), "a mixture"
    return n


def names_in(folder):
    return {path.name for path in folder.iterdir()}


STEPS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir", "fcntl.flock"}


def fork(work, *args):
    """Start a process that ends with 0 if the work succeeds."""
    process = os.fork()
    if process:
        return process
    try:
        work(*args)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def wait(process):
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def save_with_trouble_at(step, folder, n, kill):
    """Save; at some step in the file system be killed, or be told that the disk is full. Exit with 3 after
    an error, and with 4 if the save was over before that step."""
    graph, seen = chain(n), []

    def stop(event, _):
        if event not in STEPS:
            return
        seen.append(event)
        if len(seen) == step:
            if kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, "No space left on device")

    sys.addaudithook(stop)
    try:
        graph.save(folder)
    except OSError:
        os._exit(3)
    os._exit(4 if len(seen) < step else 0)


def check(folder, allowed, names):
    """That a folder holds one of the allowed graphs, or none, and no other files than these."""
    if names is not None and folder.exists():
        assert names_in(folder) <= names, f"left: {names_in(folder)}"
    try:
        found = size_of_whole(folder)
    except GraphError as error:
        assert "is missing" in str(error)
        found = None
    assert found in allowed, f"{found} where {allowed}"


def check_and_go_on(folder, allowed, names):
    """And that nothing that is left stops the next save."""
    check(folder, allowed, names)
    chain(7).save(folder)
    check(folder, (7,), OWN)


def try_every_step(home, kill):
    """Trouble at each step of a save into a new folder, and of one that replaces a graph."""
    home, total = Path(home), 0
    for old in (None, SIZES[0]):
        for step in range(1, 200):
            folder = home / f"{old}-{step}"
            if old:
                assert wait(fork(chain(old).save, folder)) == 0
            code = wait(fork(save_with_trouble_at, step, folder, SIZES[1], kill))
            if code == 4:
                break
            total += 1
            names = OWN if code == 3 else None  # an error after the save is not one of the save
            allowed = {-signal.SIGKILL: (old, SIZES[1]), 3: (old,), 0: (SIZES[1],)}[code]
            assert wait(fork(check_and_go_on, folder, allowed, names)) == 0, (old, step, code)
        else:
            raise AssertionError("a save has no end")
    sys.stdout.write(str(total))


def save_in_turns(folder, sizes):
    "Save graphs in turns until a file says that it is enough."
    stop, graphs, n = folder.parent / "stop", [chain(size) for size in sizes], 0
    while not stop.exists():
        graphs[n % len(graphs)].save(folder)
        n += 1
    (folder.parent / f"saves-{os.getpid()}").write_text(str(n))


def kill_at_random(home, n_kills, seed):
    folder = Path(home) / "g"
    assert wait(fork(chain(SIZES[0]).save, folder)) == 0
    rng = random.Random(seed)
    for _ in range(n_kills):
        process = fork(save_in_turns, folder, SIZES)
        time.sleep(rng.uniform(0.05, 0.3))
        os.kill(process, signal.SIGKILL)
        assert wait(process) == -signal.SIGKILL
        assert wait(fork(size_of_whole, folder)) == 0
    assert wait(fork(chain(7).save, folder)) == 0
    assert wait(fork(check, folder, (7,), OWN)) == 0


def read_on(folder, n_loads):
    try:
        found = [size_of_whole(folder) for _ in range(n_loads)]
        (folder.parent / "reads").write_text(json.dumps(found))
    finally:
        (folder.parent / "stop").touch()


def save_and_read_at_once(home, n_loads):
    folder = Path(home) / "g"
    assert wait(fork(chain(5).save, folder)) == 0
    work = [(save_in_turns, folder, (5, 40)), (save_in_turns, folder, (6, 300)), (read_on, folder, n_loads)]
    processes = [fork(*task) for task in work]
    assert [wait(process) for process in processes] == [0, 0, 0]
    assert wait(fork(check, folder, (5, 40, 6, 300), OWN)) == 0


def save_first_at_once(home):
    """Several processes make the same new folder."""
    for turn in range(8):
        folder = Path(home) / str(turn)
        processes = [fork(chain(n).save, folder) for n in (5, 6, 7)]
        assert [wait(process) for process in processes] == [0, 0, 0]
        assert wait(fork(check, folder, (5, 6, 7), OWN)) == 0
