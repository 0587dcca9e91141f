"""Files with edited bytes are loaded, or refused as what they are: no crash, no hang, no other error.

Each kind gets a share of FUZZ_SECONDS, by default 14. FUZZ_SECONDS=600 runs for ten minutes, and FUZZ_SEED
names another seed.
"""

import json
import os
import random
import time

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

import circuitgraph as cg
from circuitgraph.build.modules import load_sums, save_sums, ModuleSums
from circuitgraph.dictionary.store import load_dictionary, save_dictionary
from circuitgraph.dictionary.train import open_run
from circuitgraph.methods.compare import _open_table
from circuitgraph.methods.gates import GateState, _load_state, _save_state
from circuitgraph.model.loading import tiny_model
from feature_oracles import draw
from savers import chain

pytestmark = pytest.mark.filterwarnings("ignore")

MODEL = tiny_model("llama", dtype=torch.float32)
SECONDS = float(os.environ.get("FUZZ_SECONDS", "14"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
PLACE = {"module": "m0", "reads": "output"}


def write_graph(folder):
    chain(6).save(folder)
    return lambda: cg.Graph.load(folder)


def write_dictionary(folder):
    save_dictionary(draw(MODEL, "m0"), folder / "m0", weights_hash=MODEL.weights_hash)
    return lambda: cg.load_dictionaries(folder, MODEL)


def write_checkpoint_of_dictionary_learning(folder):
    state = {"encoder.weight": torch.randn(8, 16), "encoder.bias": torch.zeros(8)}
    state |= {"decoder.weight": torch.randn(16, 8), "bias": torch.zeros(16)}
    torch.save(state, folder / "ae.pt")
    trainer = {"dict_class": "AutoEncoder", "submodule_name": "mlp", "layer": 0}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
    return lambda: load_dictionary(folder)


def write_transcoder(folder):
    matrices = {"W_enc": torch.randn(8, 16), "W_dec": torch.randn(8, 16)}
    save_file(matrices | {"b_enc": torch.zeros(8), "b_dec": torch.zeros(16)}, folder / "layer_0.safetensors")
    hooks = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}
    (folder / "config.yaml").write_text(yaml.safe_dump({"model_kind": "transcoder_set", **hooks}))
    return lambda: load_dictionary(folder / "layer_0.safetensors", MODEL)


def write_arrays(folder):
    arrays = {"W_enc": np.ones((16, 8)), "W_dec": np.ones((8, 16)), "b_enc": np.ones(8), "b_dec": np.ones(16)}
    np.savez(folder / "params.npz", threshold=np.ones(8), **arrays)
    return lambda: load_dictionary(folder / "params.npz", **PLACE)


def write_sums(folder):
    save_sums(folder, ModuleSums(torch.ones(3, 5).double(), torch.ones(4).double(), 2), "mine")
    return lambda: load_sums(folder, "mine")


def write_gates(folder):
    path = folder / "gates-0.npz"
    flags = torch.zeros(4, dtype=torch.bool)
    _save_state(path, GateState(np.arange(4), flags, flags, torch.zeros(4)))
    return lambda: _load_state(path)


def write_request(folder):
    request = {"weights_hash": "a", "corpus": "b", "k": 3}
    open_run(folder / "run", request)
    (folder / "run" / "m0").mkdir()
    return lambda: open_run(folder / "run", request)


def write_table(folder):
    columns = ["task", "nodes", "value", "selection", "seed", "method", "request"]
    (folder / "rows.csv").write_text(",".join(columns) + "\nioi,head,mean,greedy,0,EAP,abc\n")
    return lambda: _open_table(folder / "rows.csv")


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


WRITERS = [value for name, value in list(globals().items()) if name.startswith("write_")]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_edited_files_are_loaded_or_refused(tmp_path, write):
    load = write(tmp_path)
    load()
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size)
    whole = {path: path.read_bytes() for path in files}
    rng, n_tried = random.Random(SEED), 0
    end = time.monotonic() + SECONDS / len(WRITERS)
    while n_tried < 10 or time.monotonic() < end:
        path = rng.choice(files)
        path.write_bytes(edit(whole[path], rng))
        n_tried += 1
        try:
            load()
        except (ValueError, OSError) as error:
            assert str(error)
        except BaseException as error:
            raise AssertionError(
                f"{path.name} after {n_tried} edits: {path.read_bytes()[:2000]!r}"
            ) from error
        finally:
            for name, data in whole.items():
                name.write_bytes(data)
