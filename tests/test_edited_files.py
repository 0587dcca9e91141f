"""Files with edited bytes are loaded, or refused as what they are: no crash, no hang, no other error.

No file runs code, takes a gigabyte or is loaded as something else. Each kind gets a share of FUZZ_SECONDS, by
default 30. FUZZ_SECONDS=600 runs for ten minutes, and FUZZ_SEED names another seed.
"""

import json
import os
import random
import resource
import signal
import struct
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import save_file

import circuitgraph as cg
from circuitgraph.build.features import _load_edges, _save_edges
from circuitgraph.build.modules import ModuleSums, load_sums, save_sums
from circuitgraph.community.behaviour import _load_rise
from circuitgraph.data.corpus import open_texts
from circuitgraph.data.prompts import _read_csv, _read_jsonl, _read_pair
from circuitgraph.dictionary.store import load_dictionary, save_dictionary
from circuitgraph.dictionary.train import open_run, standardise
from circuitgraph.dictionary.trainer import TrainConfig, load_state, make_trainer, save_state
from circuitgraph.label.fit import Fit
from circuitgraph.label.nodes import _load_fits, _save_fits
from circuitgraph.methods.compare import _open_table
from circuitgraph.methods.gates import GateState, _load_state, _save_state
from circuitgraph.model.loading import load_model, tiny_model
from families import hugging_face
from feature_oracles import draw
from savers import chain

pytestmark = pytest.mark.filterwarnings("ignore")

MODEL = tiny_model("llama", dtype=torch.float32)
SECONDS = float(os.environ.get("FUZZ_SECONDS", "30"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
PLACE = {"module": "m0", "reads": "output"}

SEEDS = [  # what files of any kind are replaced by before any bytes are edited
    *(b"", b"\x00", b"\xff\xfe", b"null", b"[]", b"{}", b"0", b'"text"', b"a,b\n1\n", b"- a\n- b\n"),
    *(b"[" * 100_000, b'{"a":' * 50_000, b"9" * 100_000, b'{"a": NaN, "a": Infinity}', b"\n" * 100_000),
    *(b"a: &a [*a]", b"a: !!python/object/apply:os.system [id]", b"a: !!timestamp 9999-99-99"),
    *(struct.pack("<Q", 2**62) + b"{}", struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 8) + b'{"a":[]}'),
    *(b"PK\x05\x06" + bytes(18), b"PK\x03\x04" + bytes(100), b"PAR1" + bytes(8) + b"PAR1"),
    *(b"\x93NUMPY\x01\x00\xff\xff", b"\x80\x04cos\nsystem\n(S'id'\ntR.", b"cos\nsystem\n(S'id'\ntR."),
]


# Writers: each writes the files of one kind, and returns how they are loaded, and how one sees that what was
# loaded is what was saved. Where files carry no hash of their content, other numbers may be loaded, and the
# second function checks that they hold together.


def works(dictionaries):
    "That dictionaries are functions of the right shapes with finite numbers."
    for dictionary in dictionaries:
        x = torch.ones(2, 16, dtype=getattr(dictionary, "W_dec", torch.ones(1)).dtype)
        acts = dictionary.encode(x)
        assert acts.shape == (2, dictionary.d_dict) and dictionary.decode(acts).shape == (2, 16)
    return True


def write_graph(folder):
    chain(6).save(folder)
    return lambda: cg.Graph.load(folder), lambda loaded: loaded == chain(6)


def write_dictionary(folder):
    save_dictionary(draw(MODEL, "m0"), folder / "m0", weights_hash=MODEL.weights_hash)
    return lambda: cg.load_dictionaries(folder, MODEL), lambda loaded: works(loaded.values())


def write_checkpoint_of_dictionary_learning(folder):
    state = {"encoder.weight": torch.randn(8, 16), "encoder.bias": torch.zeros(8)}
    state |= {"decoder.weight": torch.randn(16, 8), "bias": torch.zeros(16)}
    torch.save(state, folder / "ae.pt")
    trainer = {"dict_class": "AutoEncoder", "submodule_name": "mlp", "layer": 0}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
    return lambda: load_dictionary(folder), lambda loaded: works([loaded])


def write_transcoder(folder):
    matrices = {"W_enc": torch.randn(8, 16), "W_dec": torch.randn(8, 16)}
    save_file(matrices | {"b_enc": torch.zeros(8), "b_dec": torch.zeros(16)}, folder / "layer_0.safetensors")
    hooks = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}
    (folder / "config.yaml").write_text(yaml.safe_dump({"model_kind": "transcoder_set", **hooks}))
    return lambda: load_dictionary(folder / "layer_0.safetensors", MODEL), lambda loaded: works([loaded])


def write_arrays(folder):
    arrays = {"W_enc": np.ones((16, 8)), "W_dec": np.ones((8, 16)), "b_enc": np.ones(8), "b_dec": np.ones(16)}
    np.savez(folder / "params.npz", threshold=np.ones(8), **arrays)
    return lambda: load_dictionary(folder / "params.npz", **PLACE), lambda loaded: works([loaded])


def write_sums(folder):
    saved = ModuleSums(torch.ones(3, 5).double(), torch.ones(4).double(), 2)
    save_sums(folder, saved, "mine")

    def is_same(loaded):
        numbers = torch.equal(loaded.edges, saved.edges) and torch.equal(loaded.nodes, saved.nodes)
        return numbers and loaded.batches == 2

    return lambda: load_sums(folder, "mine"), is_same


def write_groups(folder):
    edges = pd.DataFrame({"source": np.arange(9), "weight": np.ones(9), "count": np.arange(9.0)})
    _save_edges(folder / "edges-0.parquet", edges)
    return lambda: _load_edges(folder / "edges-0.parquet"), edges.equals


def write_fits(folder):
    fits = [Fit(None, "it is rare", 12.5, 13.25), Fit(None, "", 1e-3, 0.0)]
    _save_fits(folder / "labels.json", fits)
    return lambda: _load_fits(folder / "labels.json"), lambda loaded: loaded == fits


def write_rises(folder):
    rise = np.arange(12.0, dtype=np.float32).reshape(3, 4)
    np.savez(folder / "rise.npz", rise=rise)
    return lambda: _load_rise(folder / "rise.npz"), lambda loaded: np.array_equal(loaded, rise)


def write_gates(folder):
    path = folder / "gates-0.npz"
    flags = torch.zeros(4, dtype=torch.bool)
    _save_state(path, GateState(np.arange(4), flags, flags, torch.zeros(4)))

    def is_same(loaded):
        return loaded.order.tolist() == [0, 1, 2, 3] and not loaded.score.any() and not loaded.kept.any()

    return lambda: _load_state(path), is_same


def write_training(folder):
    y = standardise(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))
    config = TrainConfig(d_dict=16, k=2, n_steps=9, batch_size=4)
    first, second = (make_trainer(config, y, torch.device("cpu")) for _ in range(2))
    save_state(first, folder / "m0.ckpt")
    saved = {name: tensor.clone() for name, tensor in first.sae.state_dict().items()}

    def load():
        load_state(second, folder / "m0.ckpt")
        return second.sae.state_dict()

    return load, lambda loaded: all(torch.equal(loaded[name], saved[name]) for name in saved)


def write_request(folder):
    request = {"weights_hash": "a", "corpus": "b", "k": 3}
    open_run(folder / "run", request)
    (folder / "run" / "m0").mkdir()
    return lambda: open_run(folder / "run", request), lambda loaded: loaded == folder / "run"


def write_table(folder):
    columns = ["task", "nodes", "value", "selection", "seed", "method", "request"]
    (folder / "rows.csv").write_text(",".join(columns) + "\nioi,head,mean,greedy,0,EAP,abc\n")
    return lambda: _open_table(folder / "rows.csv"), lambda loaded: set(columns) <= set(loaded)


def write_prompts(folder):
    texts = ["The cat sat", "The dog sat", " down"]
    names = ["clean", "corrupted", "answers"]
    (folder / "p.jsonl").write_text(json.dumps(dict(zip(names, texts, strict=True))) + "\n")
    (folder / "p.csv").write_text(",".join(names) + "\n" + ",".join(texts) + "\n")

    def load():
        rows = [*_read_jsonl(folder / "p.jsonl"), *_read_csv(folder / "p.csv")]
        return [_read_pair(row, separated=False) for _, row in rows]

    return load, lambda loaded: all(pair.clean and pair.corrupted and pair.answers for pair in loaded)


def write_text(folder):
    (folder / "text.txt").write_text("one two three four five six seven eight nine ten. " * 4)

    def load():
        texts = open_texts(folder / "text.txt")
        return list(texts.read(range(texts.n_documents)))

    return load, lambda loaded: all(isinstance(document.text, str) for document in loaded)


def write_model(folder):
    options = {"num_attention_heads": 2, "num_key_value_heads": 2}
    hugging_face("Llama", options).float().save_pretrained(folder)

    def is_whole(loaded):
        return bool(loaded(torch.zeros(1, 3, dtype=torch.long)).isfinite().all())

    return lambda: load_model(folder, dtype=torch.float32), is_whole


def edit(data, rng):
    "Some bytes of a file changed, dropped, repeated or put in."
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(5)
        if kind == 0 and data:
            data[min(at, len(data) - 1)] = rng.randrange(256)
        elif kind == 1:
            del data[at : at + rng.choice((1, 4, 100))]
        elif kind == 2:
            data[at:at] = data[at : at + rng.choice((1, 20))]
        elif kind == 3:
            data[at:at] = rng.choice(
                (b"\xff" * 8, b"[" * 9, b"9" * 30, b"NaN", b'"', b"null", b"-1", b"\x00")
            )
        else:
            del data[at:]
    return bytes(data)


# The watch


GIGABYTE = 2**30
FORBIDDEN = {"os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class"}
FORBIDDEN |= {"socket.connect", "os.rmdir", "shutil.rmtree"}
WATCH = {"on": False}


class Broken(BaseException):
    "What a file must not do; no handler of errors takes it."


def watch(event, args):
    if not WATCH["on"]:
        return
    is_text_run = event == "compile" and args[1] == "<string>"  # as sympy and eval do
    if is_text_run or event in FORBIDDEN:
        raise Broken(f"{event} {args}")


sys.addaudithook(watch)


def stop_hanging(*_):
    raise Broken("it takes more than 20 seconds")


@contextmanager
def watched():
    "Forbid to run code, to take a gigabyte more, and to take more than 20 seconds."
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held + GIGABYTE, before[1]))
    signal.signal(signal.SIGALRM, stop_hanging)
    signal.alarm(20)
    WATCH["on"] = True
    try:
        yield
    finally:
        WATCH["on"] = False
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, before)


def wants_memory(error):
    "Whether an error comes of one that says that memory is short."
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


# The campaign


def edit_files(whole, rng):
    "Files and their new bytes: first each is replaced by each seed, then some of its bytes are edited."
    for path in whole:
        for data in SEEDS:
            yield path, data
    while True:
        path = rng.choice(list(whole))
        yield path, edit(whole[path], rng)


WRITERS = [value for name, value in list(globals().items()) if name.startswith("write_")]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_edited_files_are_loaded_or_refused(tmp_path, write, record_property):
    load, is_good = write(tmp_path)
    assert is_good(load())
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size)
    whole = {path: path.read_bytes() for path in files}
    rng, n_tried = random.Random(f"{SEED} {write.__name__}"), 0
    end = time.monotonic() + SECONDS / len(WRITERS)
    for path, data in edit_files(whole, rng):
        path.write_bytes(data)
        n_tried += 1
        try:
            with watched():
                loaded = load()
            assert is_good(loaded), "it is not what was saved"
        except (ValueError, OSError) as error:
            assert str(error) and not wants_memory(error)
        except BaseException as error:
            raise AssertionError(f"{path.name} after {n_tried} edits: {data[:2000]!r}") from error
        finally:
            for name, content in whole.items():
                name.write_bytes(content)
        if n_tried >= 10 and time.monotonic() > end:
            break
    record_property("edited files", n_tried)
    sys.stdout.write(f"{write.__name__}: {n_tried} files\n")
