"""Labels against definitions: programs, their fit, the two tests, the labelled model, and bad input."""

import gzip
import json
from dataclasses import replace

import joblib
import numpy as np
import pytest
import torch
from scipy.optimize import nnls

from circuitgraph.build.build import build_graph
from circuitgraph.community.links import add_history
from circuitgraph.cut import cut_model
from circuitgraph.dictionary.store import save_dictionary
from circuitgraph.files import hash_content
from circuitgraph.graph.figures import plot_layers
from circuitgraph.graph.viewer import list_choices
from circuitgraph.label.evidence import find_evidence, join_descriptions, name_features, quoted_tokens
from circuitgraph.label.evidence import read_descriptions, score_descriptions
from circuitgraph.label.fit import LabelConfig, Reader, data_bits, draw_positions, fit_program, fit_threshold
from circuitgraph.label.heads import RULES, label_heads, make_patterns, rule_patterns
from circuitgraph.label.moves import describe_moves, name_class
from circuitgraph.label.nodes import explain, label_nodes, list_parents, read_programs, run_part
from circuitgraph.label.nodes import score_programs, split_text, swap_codes
from circuitgraph.label.programs import MARKED, SELECTORS, Count, Positions, Program, Threshold
from circuitgraph.label.programs import load_program
from circuitgraph.label.programs import save_program
from circuitgraph.label.replaced import choose_programs, judge_labelled, keep_read_edges, refit_program
from circuitgraph.label.replaced import refit_programs, run_labelled, run_replaced
from circuitgraph.label.scores import SCORES, ScoreConfig, score_heads, score_inputs
from circuitgraph.label.summands import Summands, read_writes
from circuitgraph.model.blocks import apply_norm, freeze_block, run_attention
from circuitgraph.model.loading import load_model, tiny_model
from circuitgraph.options import Judging, Pruning, Run
from feature_oracles import all_dictionaries, draw, module_by_hand
from known_features import KNOWN_FEATURES
from oracles import random_tokens

QUIET = Run(progress=False)


@pytest.fixture(scope="module")
def logic():
    "The model of ANDs and ORs, its graph, and a text."
    known = KNOWN_FEATURES["AND and OR in superposition"]()
    graph = build_graph(known.model, known.tokens, known.dictionaries, pruning=Pruning(None), run=QUIET)
    return known, graph, known.tokens.repeat(8, 1)


@pytest.fixture(scope="module")
def labelled(logic):
    known, graph, text = logic
    return label_nodes(graph, known.model, text, known.dictionaries, run=QUIET)


# Programs


def select_by_hand(x, tokens, selector, mark):
    "What a selector reads, position by position."
    out = np.zeros_like(x)
    for s, row in enumerate(tokens):
        for t in range(len(row)):
            for i in range(x.shape[2]):
                column = x[s, : t + 1, i]
                if selector == "same":
                    out[s, t, i] = x[s, t, i]
                elif selector == "mean":
                    out[s, t, i] = column.mean()
                elif selector == "last active":
                    active = np.flatnonzero(column)
                    out[s, t, i] = column[active[-1]] if len(active) else 0
                elif selector in MARKED:
                    marked = [u for u in range(t + 1) if mark[s, u]]
                    out[s, t, i] = x[s, marked[-1], i] if marked else 0
                elif selector == "induction":
                    earlier = [u for u in range(t) if row[u] == row[t]]
                    out[s, t, i] = x[s, earlier[-1] + 1, i] if earlier else 0
                else:
                    back = t - int(selector.split()[1])
                    out[s, t, i] = x[s, back, i] if back >= 0 else 0
    return out


@pytest.mark.parametrize("selector", SELECTORS)
def test_a_selector_reads_what_it_says(selector):
    generator = np.random.default_rng(0)
    tokens = generator.integers(4, size=(3, 12))
    x = generator.random((3, 12, 2)) * (generator.random((3, 12, 2)) < 0.4)
    text = Positions(tokens)
    mark = generator.random((3, 12)) < 0.3 if selector in MARKED else None
    assert np.allclose(text.select(x, selector, mark), select_by_hand(x, tokens, selector, mark))
    if selector not in ("mean", "last active"):
        place, exists = text.flat_source(selector, mark)
        flat = x.reshape(-1, 2)[place] * exists[:, None]
        assert np.array_equal(flat.reshape(x.shape), text.select(x, selector, mark))


def test_a_program_reads_where_it_looks():
    tokens = np.array([[5, 1, 7, 2, 5, 3]])
    acts = np.array(
        [[[0.0, 0], [2, 0], [0, 3], [4, 0], [0, 0], [6, 5]]]
    )  # of a parent, and of another feature
    after = Program(Threshold((1.0, 0.5), 0.0), ("m0/1",), "last token", (1, 2))
    assert after.run(acts[:, :, :1], Positions(tokens)).tolist() == [[0, 2.5, 2.5, 4.5, 4.5, 4.5]]
    following = Program(Threshold((1.0,), 0.5), ("m0/1",), "following", follows="m0/2")
    assert following.reads == ("m0/1", "m0/2")
    assert following.run(acts, Positions(tokens)).tolist() == [[0.5, 0.5, 0.5, 0.5, 0.5, 6.5]]
    assert load_program(save_program(following)) == following and "@last m0/2" in following.write()
    with pytest.raises(ValueError, match="follows a feature if its selector"):
        Program(Threshold((1.0,), 0.5), ("m0/1",), "same", follows="m0/2")
    with pytest.raises(ValueError, match="needs tokens"):
        Program(Threshold((1.0,), 0.5), ("m0/1",), "last token")


@pytest.mark.parametrize("kind", MARKED)
def test_where_a_reader_looks_is_found(kind):
    "A reader copies a parent from the last of two tokens, or from the last position of another feature."
    generator = np.random.default_rng(0)
    shape = (500, 32)
    tokens = generator.integers(60, size=shape)
    parents = np.where(generator.random((*shape, 6)) < 0.3, generator.uniform(0.5, 1.5, (*shape, 6)), 0)
    mark = np.isin(tokens, (7, 9)) if kind == "last token" else parents[:, :, 1] > 1.3
    parents[:, :, 1] *= parents[:, :, 1] > 1.3
    last = np.maximum.accumulate(np.where(mark, np.arange(32), -1), axis=1)
    acts = np.take_along_axis(parents[:, :, 4], np.maximum(last, 0), 1) * (last >= 0)
    names = tuple(f"m0/{i}" for i in range(6))
    counted = np.tile(np.arange(32) > 0, 500)
    reader = Reader(acts.ravel(), names, parents, Positions(tokens), counted)
    program = fit_program(reader, SELECTORS, n_vocab=60).program
    assert program.selector == kind and "m0/4" in program.parents
    assert program.follows == ("m0/1" if kind == "following" else "")
    assert kind == "following" or {7, 9} <= set(program.tokens)
    predicted = program.run(parents[:, :, [names.index(name) for name in program.reads]], reader.text)
    assert 1 - (predicted - acts).var() / acts.var() > 0.9


def test_bad_programs_are_refused():
    with pytest.raises(ValueError, match="selector must be one of"):
        Positions(np.zeros((1, 2), dtype=int)).select(np.zeros((1, 2, 1)), "next")
    with pytest.raises(ValueError, match="must read the 1 inputs"):
        Program(Threshold((1.0, 2.0), 0.0), ("m0/1",))
    for text in ("", "[]", "{}", json.dumps({"name": "Lambda", "function": {}, "parents": [], "tokens": []})):
        with pytest.raises(ValueError, match="must hold a program"):
            load_program(text)


# Bits


def test_data_bits_are_those_of_the_empirical_code():
    acts = np.array([0, 0, 0, 0, 1.0, 1.5, 2.0, 0.5])
    predicted = np.array([0, 0, 0, 0.7, 1.1, 1.4, 2.0, 0])
    unit = acts[acts > 0].std() / 10
    log2 = np.log2
    firing = (
        -3 * log2(3 / 4) - log2(1 / 4) - log2(1 / 4) - 3 * log2(3 / 4)
    )  # 3 of 4 where on, 1 of 4 elsewhere
    errors = np.array([0.1, 0.1, 0.0])
    sigma = np.sqrt((errors**2).mean())
    magnitude = 3 * log2(np.sqrt(2 * np.pi * np.e) * sigma / unit)
    assert np.isclose(data_bits(acts, predicted), firing + magnitude)
    doubled = data_bits(np.tile(acts, 2), np.tile(predicted, 2))
    assert np.isclose(doubled, data_bits(acts, predicted, np.full(8, 2.0)))


def test_drawn_positions_stand_for_all():
    generator = np.random.default_rng(0)
    fires, tokens = generator.random(9000) < 0.02, generator.integers(500, size=9000)
    counted = generator.random(9000) < 0.9
    rows, weight = draw_positions(fires, tokens, counted, 20_000)
    assert counted[rows].all() and len(set(rows)) == len(rows)
    assert set(np.flatnonzero(fires & counted)) <= set(rows)
    assert np.isclose(weight.sum(), counted.sum())
    assert np.isclose(weight[fires[rows]].sum(), (fires & counted).sum())


def test_a_threshold_finds_a_not():
    x = np.concatenate([np.zeros(400), np.linspace(0.5, 1.5, 100)])[:, None]
    y = np.where(x[:, 0] == 0, 1.0, 0.0)
    rule = fit_threshold(x, y, np.ones(500))
    assert rule.weights[0] < 0 and np.allclose(rule(x), y, atol=1e-2)


# Labels of a model that is known


def test_labels_of_known_features_are_exact(labelled):
    programs = read_programs(labelled)
    assert set(programs) == {f"m1/{j}" for j in range(12)}
    for j in range(12):
        pair = {f"m0/{j - j % 2}", f"m0/{j - j % 2 + 1}"}
        program = programs[f"m1/{j}"]
        assert set(program.parents) == pair and not program.tokens
        assert isinstance(program.function, Count) and program.function.k == 2 - j % 2
    nodes = labelled.nodes.set_index("name").loc[list(programs)]
    assert (nodes[["r2", "f1"]] > 0.999).all(axis=None)
    intervened = nodes[["r2_intervened", "f1_intervened"]].dropna()
    assert len(intervened) > 6 and (intervened > 0.999).all(axis=None)


def test_a_correlate_passes_on_text_and_fails_when_parents_are_swapped(logic):
    "The token says when an AND fires, but the module reads features: swapping these tells the two apart."
    known, graph, text = logic
    cut = cut_model(known.model, known.dictionaries)
    cause = {f"m1/{2 * k}": Program(Count(2, 2, 1.0), (f"m0/{2 * k}", f"m0/{2 * k + 1}")) for k in range(6)}
    correlate = {f"m1/{2 * k}": Program(Count(1, 1, 1.0), (), tokens=(3 * k + 2,)) for k in range(6)}
    options = {"share": 0.5, "run": Run(batch_size=12, progress=False)}
    assert (score_programs(cut, cause, text, run=QUIET)["r2"] > 0.999).all()
    assert (score_programs(cut, correlate, text, run=QUIET)["r2"] > 0.999).all()
    assert (score_programs(cut, cause, text, **options)["r2"] > 0.999).all()
    assert (score_programs(cut, correlate, text, **options)["r2"] < 0.9).all()


@pytest.mark.parametrize("module", ["m1", "a1"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox"])
@torch.no_grad()
def test_a_module_is_run_on_its_changed_input(name, module):
    model = tiny_model(name, dtype=torch.float64)
    tokens = random_tokens(model, 2, 6)
    dictionaries = all_dictionaries(model, gate="relu")
    cut = cut_model(model, dictionaries)
    writes = read_writes(cut, tokens)
    codes, streams = writes.codes, writes.streams
    part = next(part for part in cut.parts if part.module == module)
    before = {p.module: codes[p.module] for p in cut.parts if p.dictionary and p.first < part.n_before}
    swapped = swap_codes(before, 0.4, torch.Generator().manual_seed(0))
    x = cut.trace(tokens).reads[module].clone()
    change = torch.zeros_like(x)
    for writer, code in before.items():
        W_dec = dictionaries[writer].W_dec
        for j in range(code.shape[-1]):
            change += (swapped[writer] - code)[:, :, j, None] * W_dec[j]
    assert change.abs().max() > 0.1 and not change[:, 0].any()
    ports = ("mlp",) if module[0] == "m" else ("q", "k", "v")
    output = module_by_hand(model, module[0], 1, {port: x + change for port in ports})[0]
    expected = dictionaries[module].encode(output)
    code, read = run_part(cut, part, tokens, streams[1], change)
    assert torch.allclose(code, expected, atol=1e-9) and torch.allclose(read, x + change, atol=1e-9)


def test_swapped_codes_are_those_of_other_positions():
    codes = {"m0": torch.arange(48.0).view(2, 4, 6), "a1": torch.rand(2, 4, 3)}
    swapped = swap_codes(codes, 0.5, torch.Generator().manual_seed(1))
    is_moved = (swapped["m0"] != codes["m0"]).flatten(0, 1)
    assert 0 < is_moved.any(0).sum() < 6
    assert (swapped["m0"][:, 0] == codes["m0"][:, 0]).all()
    for j in range(6):
        assert set(swapped["m0"][..., j].flatten().tolist()) == set(codes["m0"][..., j].flatten().tolist())
    assert torch.equal(swap_codes(codes, 0.0, torch.Generator())["a1"], codes["a1"])


# Parents that are no features


def summand_by_hand(model, part, x, y):
    "What a term y of the stream x adds to what an encoder reads: position by position, head by head."
    block = model.layers[part.layer]
    norm = block.ln1 if part.kind == "attn" else block.ln2
    centred = x - x.mean(-1, keepdim=True) if norm.kind == "layer" else x
    sigma = (centred.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    own = y - y.mean(-1, keepdim=True) if norm.kind == "layer" else y
    normed = own * sigma * norm.weight
    if part.kind == "mlp":
        return normed
    attn, out = block.attn, torch.zeros_like(x)
    pattern = freeze_block(model, part.layer, x)["pattern"]
    group = model.n_heads // model.n_kv_heads
    for s in range(x.shape[0]):
        for t in range(x.shape[1]):
            for h in range(model.n_heads):
                for u in range(t + 1):
                    v = attn.W_V[h // group] @ normed[s, u]
                    out[s, t] += pattern[s, h, t, u] * (attn.W_O[:, h] @ v)
    return out


@pytest.mark.parametrize("module", ["m1", "a1"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox"])
@torch.no_grad()
def test_a_summand_is_what_a_node_adds(name, module):
    model = tiny_model(name, dtype=torch.float64)
    reads = "normed" if module == "m1" else "output"
    cut = cut_model(model, {module: draw(model, module, reads=reads, gate="relu")})
    writes = read_writes(cut, random_tokens(model, 2, 6))
    part = next(part for part in cut.parts if part.module == module)
    summands = Summands(cut, writes)
    for node in ("embed", "a0", "m0"):
        by_hand = summand_by_hand(model, part, writes.reads[module], writes.whole[node])
        assert torch.allclose(summands.carry(module, node), by_hand, atol=1e-9)
        W_enc = part.dictionary.W_enc
        assert torch.allclose(summands.add(module, node, [3, 1]), by_hand @ W_enc[:, [3, 1]], atol=1e-9)


@pytest.fixture(scope="module")
def transcoded():
    "A transcoder whose features are sums of two nodes above 0, and a program for each that says so."
    model = tiny_model("llama", dtype=torch.float64)
    dictionary = draw(model, "m0", reads="normed", gate="relu")
    programs = {}
    b_enc = (
        dictionary.b_enc if dictionary.b_in is None else dictionary.b_enc - dictionary.b_in @ dictionary.W_enc
    )
    for j in range(dictionary.d_dict):
        programs[f"m0/{j}"] = Program(Threshold((1.0, 1.0), float(b_enc[j])), ("embed", "a0"))
    return model, dictionary, programs


def test_sums_over_nodes_pass_both_tests_and_stand_for_the_features(transcoded):
    model, dictionary, programs = transcoded
    cut, tokens = cut_model(model, {"m0": dictionary}), random_tokens(model, 12, 8)
    for share in (0.0, 0.5):
        scores = score_programs(cut, programs, tokens, share, writers="all", run=QUIET)
        assert (scores["r2"] > 0.999).all() and (scores["f1"] > 0.999).all()
    one = {
        name: replace(program, function=replace(program.function, weights=(1.0, 0.5)))
        for name, program in programs.items()
    }
    assert (score_programs(cut, one, tokens, 0.5, writers="all", run=QUIET)["r2"] < 0.99).all()
    assert torch.allclose(run_replaced(cut, programs, tokens), model(tokens), atol=1e-5)
    assert (run_replaced(cut, one, tokens) - model(tokens)).abs().max() > 1e-3


def test_whole_parents_are_found_and_can_be_left_out(transcoded):
    model, dictionary, _ = transcoded
    tokens, dictionaries = random_tokens(model, 60, 8), {"m0": dictionary}
    graph = build_graph(model, tokens[:4], dictionaries, pruning=Pruning(None), run=QUIET)
    config = LabelConfig(writers="all")
    labelled = label_nodes(graph, model, tokens, dictionaries, config=config, run=QUIET)
    nodes = labelled.nodes[labelled.nodes["program"] != ""]
    assert len(nodes) > dictionary.d_dict / 2
    assert (nodes[["r2", "r2_intervened"]] > 0.99).all(axis=None)
    for program in read_programs(labelled).values():
        assert set(program.parents) == {"embed", "a0"}
        assert program.function.weights == pytest.approx((1.0, 1.0), abs=1e-3)
    alone = label_nodes(graph, model, tokens, dictionaries, run=QUIET)
    assert (
        alone.nodes.loc[alone.nodes["kind"] == "feature", "no_label"] == "no parents that are features"
    ).all()
    evidence = find_evidence(labelled, nodes["name"].iloc[0], model, tokens[:8], dictionaries, run=QUIET)
    agreeing = evidence[evidence["case"] == "agrees"]
    assert np.allclose(agreeing["activation"], agreeing["predicted"], rtol=0.1)


def test_a_graph_can_name_the_folder_of_its_dictionaries(transcoded, tmp_path):
    model, dictionary, _ = transcoded
    tokens, dictionaries = random_tokens(model, 60, 8), {"m0": dictionary}
    save_dictionary(dictionary, tmp_path / "dictionaries/m0")
    graph = build_graph(model, tokens[:4], dictionaries, pruning=Pruning(None), run=QUIET)
    options = {"config": LabelConfig(writers="all"), "run": QUIET}
    named = label_nodes(graph, model, tokens, tmp_path / "dictionaries", **options)
    given = label_nodes(graph, model, tokens, dictionaries, **options)
    assert read_programs(named) == read_programs(given)
    named.save(tmp_path / "graph")
    logits = run_labelled(model, type(named).load(tmp_path / "graph"), tokens[:2])
    assert torch.equal(logits, run_labelled(model, given, tokens[:2], dictionaries))
    assert len(read_programs(named)) > dictionary.d_dict / 2
    assert torch.allclose(logits, model(tokens[:2]), atol=1e-6)  # the programs are exact
    with pytest.raises(ValueError, match="graph does not say where they are"):
        run_labelled(model, given, tokens[:2])


# The labelled model


@pytest.mark.parametrize("module", ["m0", "a1"])
@torch.no_grad()
def test_replaced_features_are_those_of_hooks(module):
    "Constants in the place of features, through the bridge's own hooks."
    model = tiny_model("llama", dtype=torch.float64)
    tokens = random_tokens(model, 2, 6)
    dictionary = draw(model, module, gate="relu")
    cut = cut_model(model, {module: dictionary})
    chosen = {f"{module}/1": 0.3, f"{module}/4": 0.0}

    def replace_features(output, hook):  # noqa: ARG001
        code = dictionary.encode(output)
        for name, value in chosen.items():
            j = int(name.split("/")[1])
            output[:, 1:] += (value - code[:, 1:, j, None]) * dictionary.W_dec[j]
        return output

    place = {"m0": "blocks.0.hook_mlp_out", "a1": "blocks.1.hook_attn_out"}[module]
    expected = model.bridge.run_with_hooks(tokens, fwd_hooks=[(place, replace_features)])
    # the bridge takes norms in single precision
    assert torch.allclose(run_replaced(cut, chosen, tokens), expected, atol=1e-5)
    assert torch.allclose(run_replaced(cut, {}, tokens), model.bridge(tokens), atol=1e-5)
    assert (expected - model.bridge(tokens)).abs().max() > 1e-3


@torch.no_grad()
def test_dropped_errors_leave_the_reconstruction():
    model = tiny_model("llama", dtype=torch.float64)
    tokens = random_tokens(model, 2, 6)
    dictionary = draw(model, "m0", reads="normed", gate="relu")  # a transcoder with a skip path
    cut = cut_model(model, {"m0": dictionary})

    def reconstruct(output, hook):  # noqa: ARG001
        x = cut.trace(tokens).reads["m0"]
        norm = model.layers[0].ln2
        read = x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight
        new = dictionary.decode(dictionary.encode(read)) + read @ dictionary.W_skip.T
        return torch.cat([output[:, :1], new[:, 1:]], 1)

    expected = model.bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_mlp_out", reconstruct)])
    assert torch.allclose(run_replaced(cut, {}, tokens, error=False), expected, atol=1e-5)
    assert (expected - model.bridge(tokens)).abs().max() > 1e-3


def test_later_labels_read_earlier_ones(logic):
    "A label on m0 that is wrong changes what the label on m1 says."
    known, _, _ = logic
    cut = cut_model(known.model, known.dictionaries)
    reader = Program(Count(2, 2, 1.0), ("m0/0", "m0/1"))
    tokens = known.tokens
    of_model = run_replaced(cut, {"m1/0": reader}, tokens)
    rolled = run_replaced(cut, {"m0/0": 0.0, "m1/0": reader}, tokens)
    by_hand = run_replaced(cut, {"m0/0": 0.0, "m1/0": 0.0}, tokens)  # without m0/0 the AND never fires
    assert torch.allclose(rolled, by_hand, atol=1e-6)
    assert (rolled - of_model).abs().max() > 1e-3


def test_the_labelled_model_of_known_features_is_the_model(logic, labelled):
    known, _, _ = logic
    own = known.model(known.tokens).detach()
    logits = run_labelled(known.model, labelled, known.tokens, known.dictionaries)
    assert torch.allclose(logits, own, atol=1e-4 * float(own.abs().max()))
    options = {"shares": [0.25, 1.0], "judging": Judging(run=QUIET)}
    table = judge_labelled(known.model, labelled, known.tokens, known.dictionaries, **options)
    rise = table.set_index(["share", "replaced_by"])["rise"]
    assert abs(rise[1.0, "program"]) < 1e-3 and rise[1.0, "silence"] > 1 and rise[1.0, "average"] > 1
    assert rise[0.25, "silence"] < rise[1.0, "silence"]
    assert len(choose_programs(labelled, 0.25)) == 6


# Requests


def test_a_stopped_search_goes_on_to_the_same_labels(logic, tmp_path):
    known, graph, text = logic
    whole = label_nodes(graph, known.model, text, known.dictionaries, run=QUIET)
    run = Run(progress=False, checkpoint=tmp_path)
    label_nodes(graph, known.model, text, known.dictionaries, run=run)
    (path,) = tmp_path.glob("labels-*.json")
    rows = json.loads(path.read_text())["fits"]
    rows[0]["bits_none"] += 100  # a mark, to see that the file is read
    path.write_text(json.dumps({"sha256": hash_content(json.dumps(rows)), "fits": rows}))
    again = label_nodes(graph, known.model, text, known.dictionaries, run=run)
    assert (again.nodes["bits"] - whole.nodes["bits"]).abs().max() == 100
    assert again.nodes["program"].equals(whole.nodes["program"])
    config = LabelConfig(seed=1)
    other = label_nodes(graph, known.model, text, known.dictionaries, config=config, run=run)
    assert len(list(tmp_path.glob("labels-*.json"))) == 2 and len(other.nodes) == len(whole.nodes)


def test_any_number_of_processes_finds_the_same(logic):
    known, graph, text = logic
    one = label_nodes(graph, known.model, text, known.dictionaries, run=QUIET)
    with joblib.parallel_config(n_jobs=2):
        two = label_nodes(graph, known.model, text, known.dictionaries, run=QUIET)
    assert one.nodes.equals(two.nodes)


def test_labels_are_saved_and_explained(labelled, tmp_path):
    labelled.save(tmp_path / "graph")
    loaded = type(labelled).load(tmp_path / "graph")
    programs = read_programs(loaded)
    assert programs == read_programs(labelled)
    assert {save_program(one) for one in programs.values()} == set(labelled.nodes["program"]) - {""}
    lines = explain(loaded, "m1/0").splitlines()
    assert lines[0].startswith("m1/0 = ") and "R2 1.00" in lines[1]
    assert lines[2].endswith("no label (no parents that are features)") and len(lines) == 4


def test_features_that_cannot_be_labelled_say_why(logic):
    known, graph, text = logic
    options = {"config": LabelConfig(min_active=10_000), "run": QUIET}
    nodes = label_nodes(graph, known.model, text, known.dictionaries, **options).nodes.set_index("name")
    assert (nodes["program"] == "").all()
    assert "fewer than 10000" in nodes["no_label"]["m1/0"]
    assert nodes["no_label"]["m0/0"] == "no parents that are features"
    strict = LabelConfig(min_saved=0.999)
    nodes = label_nodes(graph, known.model, text, known.dictionaries, config=strict, run=QUIET).nodes
    assert "no program saves" in nodes.set_index("name")["no_label"]["m1/0"]


def test_bad_requests_are_refused(logic, labelled):
    known, graph, text = logic
    model, dictionaries = known.model, known.dictionaries
    requests = {
        "at least 2 sequences": lambda: label_nodes(graph, model, text[:1], dictionaries, run=QUIET),
        "got 'm1/99'": lambda: label_nodes(graph, model, text, dictionaries, nodes=["m1/99"], run=QUIET),
        "dictionaries": lambda: label_nodes(graph, model, text, {"m0": dictionaries["m0"]}, run=QUIET),
        "goes with a graph of features": lambda: label_nodes(
            build_graph(model, known.tokens, "layer", run=QUIET), model, text, {}, run=QUIET
        ),
        "must be labelled": lambda: run_labelled(model, graph, text, dictionaries),
        r"share must lie in \[0, 1\]": lambda: run_labelled(model, labelled, text, dictionaries, share=2.0),
        "node must be one of": lambda: explain(labelled, "m7/3"),
        "n_used must be at most 10": lambda: LabelConfig(n_used=11),
        "min_saved must lie": lambda: LabelConfig(min_saved=1.0),
        "n_parents must be at least 1": lambda: LabelConfig(n_parents=0),
        "writers must be one of features, all": lambda: LabelConfig(writers="modules"),
        "graph must be one of": lambda: label_nodes(
            graph, tiny_model("llama"), text, dictionaries, run=QUIET
        ),
    }
    for message, request in requests.items():
        with pytest.raises(ValueError, match=message):
            request()


# Heads


class Words:
    "A tokenizer of six words, of which two are signs and one is a line break."

    words = ("a", " b", ".", "\n", " --", "x.y")

    def __len__(self):
        return len(self.words)

    def batch_decode(self, rows):
        return [self.words[i] for (i,) in rows]


def rule_by_hand(rule, row, t, marks):
    "The pattern of a rule for one query, position by position; marks are sets of tokens."
    pattern = np.zeros(len(row))
    if rule.startswith("near"):
        pattern[: t + 1] = [0.5 ** ((t - u) / int(rule.split()[1])) for u in range(t + 1)]
        return pattern / pattern.sum()
    kind, _, mark = rule.removesuffix("s").rpartition(" ")
    if mark in marks:
        so_far = [u for u in range(t + 1) if row[u] in marks[mark]]
        before = [u for u in so_far if u < t]
        places = so_far if kind == "mean of" else before[-1:]
        pattern[places or range(t + 1)] = 1
        return pattern / pattern.sum()
    name, _, rest = rule.partition(", or ")
    earlier = [u for u in range(t) if row[u] == row[t]]
    found = {
        "first": 0,
        "same": t,
        "repeat": earlier[-1] if earlier else None,
        "induction": earlier[-1] + 1 if earlier else None,
    } | {f"back {k}": t - k if t >= k else None for k in range(1, 9)}
    if name == "mean" or (rest and found[name] is None):
        pattern[: t + 1] = 1 / (t + 1)
    else:
        pattern[found[name] or 0] = 1
    return pattern


@pytest.mark.parametrize("rule", RULES)
def test_the_pattern_of_a_rule_is_what_it_says(rule):
    model = replace(tiny_model("llama"), tokenizer=Words())
    marks = {"sign": {2, 4}, "newline": {3}}
    tokens = torch.randint(6, (3, 11), generator=torch.Generator().manual_seed(0))
    patterns = rule_patterns(model, tokens)[RULES.index(rule)].numpy()
    for s, row in enumerate(tokens.tolist()):
        by_hand = np.stack([rule_by_hand(rule, row, t, marks) for t in range(len(row))])
        assert np.allclose(patterns[s], by_hand)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox"])
@torch.no_grad()
def test_a_label_is_the_least_squares_mixture(name):
    "Against a solver that sees the outputs of every position, written through W_O."
    model = tiny_model(name, dtype=torch.float64)
    tokens = random_tokens(model, 4, 9)
    heads = label_heads(model, tokens, n_rules=2, run=QUIET)
    patterns = rule_patterns(model, tokens).double()
    for row in heads.itertuples():
        x = cut_model(model, "head").trace(tokens).reads[f"a{row.layer}"]
        attn = model.layers[row.layer].attn
        z = run_attention(model, row.layer, x, x, x)[:, row.head]
        shape = (-1, model.n_heads, -1, -1)
        of_rules = [
            run_attention(model, row.layer, x, x, x, pattern=p[:, None].expand(shape)) for p in patterns
        ]
        target, *columns = (
            y[:, 1:] @ attn.W_O[:, row.head].T for y in (z, *(z[:, row.head] for z in of_rules))
        )
        rules = [RULES.index(rule) for rule in row.weights]
        if not rules:
            continue
        design = torch.stack([columns[i].flatten() for i in rules], 1).numpy()
        weights, left = nnls(design, target.flatten().numpy())
        assert np.allclose(list(row.weights.values()), weights, atol=1e-6)
        assert np.isclose(row.explained, 1 - left**2 / float(target.square().sum()), atol=1e-6)


@torch.no_grad()
def test_replaced_patterns_are_those_of_hooks():
    model = tiny_model("llama", dtype=torch.float64)
    tokens = random_tokens(model, 2, 7)
    heads = label_heads(model, tokens, run=QUIET)
    mixture = {"back 1": 0.7, "first": 0.2}
    heads["weights"] = [mixture] * len(heads)
    pattern = sum(w * rule_patterns(model, tokens)[RULES.index(rule)] for rule, w in mixture.items()).double()

    def set_pattern(given, hook):  # noqa: ARG001
        given[:, 1, 1:] = pattern[:, 1:]
        return given

    hooks = [("blocks.0.attn.hook_pattern", set_pattern)]
    expected = model.bridge.run_with_hooks(tokens, fwd_hooks=hooks)
    assert (expected - model.bridge(tokens)).abs().max() > 1e-3
    logits = make_patterns(model, heads, ["a0.h1"]).run(model, tokens)
    assert torch.allclose(logits, expected, atol=1e-5)
    own = make_patterns(model, heads, []).run(model, tokens)
    assert torch.allclose(own, model.bridge(tokens), atol=1e-5)


def test_bad_requests_for_heads_are_refused():
    model = tiny_model("llama")
    tokens = random_tokens(model, 2, 6)
    heads = label_heads(model, tokens, run=QUIET)
    with pytest.raises(ValueError, match="by must be one of"):
        make_patterns(model, heads, ["a0.h0"], by="median")
    with pytest.raises(ValueError, match="corpus|tokens"):
        label_heads(model, tokens.float(), run=QUIET)


# What heads move


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_contents_are_tables_of_mean_values(name):
    "Against loops over positions, heads and tokens."
    model = replace(tiny_model(name, dtype=torch.float64), tokenizer=Words())
    alike = [[0, 5], [1], [2, 4], [3], [2, 4], [0, 5]]  # tokens of the class of each token
    tokens = torch.randint(6, (16, 7), generator=torch.Generator().manual_seed(0))
    made_on, tried_on = split_text(tokens)
    group, moved = model.n_heads // model.n_kv_heads, describe_moves(model, tokens, run=QUIET)
    reads = {id(text): cut_model(model, "head").trace(text).reads for text in (made_on, tried_on)}
    for row in moved.itertuples():
        attn = model.layers[row.layer].attn

        def values(text, h=row.head // group, layer=row.layer, attn=attn):
            normed = apply_norm(model.layers[layer].ln1, reads[id(text)][f"a{layer}"])
            return normed @ attn.W_V[h].T + (0 if attn.b_V is None else attn.b_V[h])

        v, first = values(made_on), values(made_on)[:, 0].mean(0)
        later = {token: v[:, 1:][made_on[:, 1:] == token] for token in range(6)}
        mean = v[:, 1:].flatten(0, 1).mean(0)
        tables = {"constant": dict.fromkeys(range(6), mean), "class": {}, "token": {}}
        for t, found in later.items():
            of_class = torch.cat([later[other] for other in alike[t]])
            tables["class"][t] = (of_class.sum(0) + 4 * mean) / (len(of_class) + 4)
            tables["token"][t] = (found.sum(0) + 4 * tables["class"][t]) / (len(found) + 4)
        x = reads[id(tried_on)][f"a{row.layer}"]
        pattern = freeze_block(model, row.layer, x)["pattern"][:, row.head]
        own = (pattern @ values(tried_on))[:, 1:] @ attn.W_O[:, row.head].T
        for by, table in tables.items():
            rows = [[first if u == 0 else table[int(t)] for u, t in enumerate(text)] for text in tried_on]
            given = torch.stack([torch.stack(one) for one in rows])
            said = (pattern @ given)[:, 1:] @ attn.W_O[:, row.head].T
            explained = 1 - float((own - said).square().sum() / own.square().sum())
            assert getattr(row, by if by != "class" else "_5") == pytest.approx(explained, abs=1e-4)


# Scores


def facts_by_hand(row, t, u, words):
    "The scores of one position for one query; words are the texts of the tokens."
    kinds = [name_class(words[token]) for token in row]
    starts = [kind not in ("rest of a word", "capital", "number") for kind in kinds]
    earlier = [s for s in range(t) if row[s] == row[t]]

    def last(kind):
        before = [s for s in range(t) if kinds[s] == kind]
        return bool(before) and before[-1] == u

    facts = {f"back {t - u}": t - u < 9, "first": u == 0, "repeat": u in earlier}
    facts |= {"back 9 to 12": 9 <= t - u <= 12, "last repeat": u in earlier[-1:]}
    facts |= {"induction": u > 0 and row[u - 1] == row[t], kinds[u]: True}
    facts |= {"last line break": last("line break"), "last sign": last("sign")}
    facts |= {"same word": u < t and not any(starts[u + 1 : t + 1]), f"first, from {kinds[t]}": u == 0}
    return {name for name, holds in facts.items() if holds}


def test_scores_hold_where_they_say():
    model = replace(tiny_model("llama"), tokenizer=Words())
    tokens = torch.randint(6, (3, 13), generator=torch.Generator().manual_seed(0))
    inputs = score_inputs(model, tokens)
    for s, row in enumerate(tokens.tolist()):
        for t in range(len(row)):
            for u in range(t + 1):
                found = {SCORES[k] for k in inputs[s, t, u].nonzero().flatten().tolist()}
                assert found == facts_by_hand(row, t, u, Words.words), (s, t, u)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox"])
@torch.no_grad()
def test_scored_heads_are_those_of_hooks(name):
    model = tiny_model(name, dtype=torch.float64)
    tokens = random_tokens(model, 3, 8)
    with torch.enable_grad():
        scored = score_heads(model, tokens, ScoreConfig(n_steps=5), run=QUIET)
    layer, total = scored.layers[0], torch.zeros(3, 8, 8, dtype=torch.float64)
    for k in range(len(SCORES)):
        total += layer.weights[1, k] * score_inputs(model, tokens)[..., k]
    pattern = total.masked_fill(torch.ones(8, 8).triu(1).bool(), -torch.inf).softmax(-1)

    def set_pattern(given, hook):  # noqa: ARG001
        given[:, 1, 1:] = pattern[:, 1:]
        return given

    def set_mix(z, hook):  # noqa: ARG001
        z[:, 1:, 1] = z[:, 1:, 1] * layer.gain[1] + layer.constant[1]
        return z

    hooks = [("blocks.0.attn.hook_pattern", set_pattern), ("blocks.0.attn.hook_z", set_mix)]
    expected = model.bridge.run_with_hooks(tokens, fwd_hooks=hooks)
    assert (expected - model.bridge(tokens)).abs().max() > 1e-3
    assert torch.allclose(scored.choose(["a0.h1"]).run(model, tokens), expected, atol=1e-5)


@torch.no_grad()
def test_gain_and_constant_are_a_regression():
    "Against least squares over what the head writes at every position."
    model = tiny_model("llama", dtype=torch.float64)
    tokens = random_tokens(model, 6, 8)
    with torch.enable_grad():
        scored = score_heads(model, tokens, ScoreConfig(n_steps=3), run=QUIET)
    x = cut_model(model, "head").trace(tokens).reads["a1"]
    pattern, W_O = scored.layers[1].pattern(score_inputs(model, tokens)), model.layers[1].attn.W_O
    own, said = (run_attention(model, 1, x, x, x, pattern=p)[:, :, 1:] for p in (None, pattern))
    for head, row in enumerate(scored.table.query("layer == 1").itertuples()):
        y, y_hat = (z[:, head] @ W_O[:, head].T for z in (own, said))
        constants = torch.eye(model.d_model, dtype=y.dtype).repeat(y.shape[0] * y.shape[1], 1)
        design = torch.cat([y_hat.reshape(-1, 1), constants], 1)
        solution = torch.linalg.lstsq(design, y.flatten()).solution
        left = (y.flatten() - design @ solution).square().sum() / y.square().sum()
        assert float(scored.layers[1].gain[head]) == pytest.approx(float(solution[0]), rel=1e-6)
        assert row.explained == pytest.approx(1 - float(left), abs=1e-6)


# Figures


def test_a_label_stands_where_a_node_is_hovered(logic, labelled):
    _, graph, _ = logic
    label = labelled.nodes.set_index("name")["label"]["m1/0"]
    shown = [text for trace in plot_layers(labelled, 10).data for text in trace.text or ()]
    assert sum(label in text for text in shown if text.startswith("m1/0<br>")) == 1
    assert not any(label in text for trace in plot_layers(graph, 10).data for text in trace.text or ())


# The rulers


def test_edges_that_programs_do_not_read_are_dropped(labelled):
    kept = keep_read_edges(labelled)
    programs = read_programs(labelled)
    ends = zip(labelled.edges["source"].astype(str), labelled.edges["target"].astype(str), strict=True)
    expected = [
        name
        for name, (writer, reader) in zip(labelled.edge_names, ends, strict=True)
        if reader not in programs or writer in programs[reader].parents
    ]
    assert kept.edge_names == expected and 0 < len(kept) < len(labelled)


def test_refitted_is_the_best_weighted_sum():
    generator = np.random.default_rng(0)
    parents = np.maximum(generator.normal(size=(50, 20, 3)), 0).astype(np.float32)
    total = parents @ np.array([2.0, -1.0, 0.5], dtype=np.float32)
    acts = np.where(total > 0.4, total, 0).ravel()
    text = Positions(generator.integers(9, size=(50, 20)))
    reader = Reader(acts, ("m0/0", "m0/1", "m0/2"), parents, text, np.ones(1000, dtype=bool))
    program = refit_program(reader, "same")
    assert np.allclose(program.function.weights, [2, -1, 0.5], atol=0.05)
    assert np.abs(program.run(parents, text).ravel() - acts).max() < 0.5
    assert ((program.run(parents, text).ravel() > 0) == (acts > 0)).mean() > 0.99


def test_linear_fits_read_the_largest_parents(logic, labelled):
    known, _, text = logic
    refitted = refit_programs(labelled, known.model, text, known.dictionaries, n_parents=3, run=QUIET)
    of_fit, largest = read_programs(refitted), list_parents(labelled, 3)
    assert set(of_fit) == set(read_programs(labelled))
    assert all(list(program.parents) == largest[name] for name, program in of_fit.items())


# Evidence, names and descriptions


def test_evidence_lists_the_positions_of_each_case(logic, labelled):
    known, _, _ = logic
    programs = labelled.nodes.set_index("name")["program"].copy()
    programs["m1/1"] = programs["m1/0"]  # the AND in the place of the OR
    wrong = add_history(labelled, "wrong", program=programs.to_numpy())
    n = known.tokens.numel()
    table = find_evidence(
        wrong, "m1/1", known.model, known.tokens, known.dictionaries, n=n, run=QUIET
    ).set_index(["sequence", "position"])
    codes = read_writes(cut_model(known.model, known.dictionaries), known.tokens).codes
    of_and, of_or = codes["m1"][..., 0], codes["m1"][..., 1]
    both, one = (of_and > 0) & (of_or > 0), (of_or > 0) & (of_and == 0)
    for case, expected in {"agrees": both, "missed": one}.items():
        expected[:, 0] = False
        found = table.index[table["case"] == case].tolist()
        assert sorted(found) == [tuple(at) for at in expected.nonzero().tolist()]
    assert not (table["case"] == "false alarm").any()


def test_evidence_needs_a_program(logic, labelled):
    known, _, _ = logic
    with pytest.raises(ValueError, match="feature with a program, got 'm0/0'"):
        find_evidence(labelled, "m0/0", known.model, known.tokens, known.dictionaries, run=QUIET)


def test_short_names_hold_the_tokens_that_carry_enough(logic, labelled):
    known, _, _ = logic
    options = {"run": QUIET}
    every = name_features(labelled, known.model, known.tokens, known.dictionaries, least=0.01, **options)
    none = name_features(labelled, known.model, known.tokens, known.dictionaries, least=1.01, **options)
    short = every.nodes.set_index("name")["short_name"]
    assert short["m0/0"].startswith('"') and short["logits"] == ""
    assert none.nodes.set_index("name")["short_name"]["m0/0"] == ""
    assert list_choices(every)[f"m0/0: {short['m0/0']}"] == "m0/0"


def test_a_feature_that_is_never_active_is_not_named_by_tokens(logic, labelled):
    known, _, _ = logic
    codes = read_writes(cut_model(known.model, known.dictionaries), known.tokens).codes
    silent = (codes["m0"][:, 1:, 0] == 0).all(1)
    text = known.tokens[silent]
    assert len(text)
    named = name_features(labelled, known.model, text, known.dictionaries, run=QUIET)
    assert named.nodes.set_index("name")["short_name"]["m0/0"] == ""


def test_descriptions_are_read_from_both_forms(tmp_path, labelled):
    table = tmp_path / "labels.csv"
    table.write_text('name,description\nm1/0,"both, at once"\nm9/9,elsewhere\n')
    lines = tmp_path / "batch-0.jsonl.gz"
    with gzip.open(lines, "wt") as file:
        file.write('{"modelId": "x", "layer": "1-mlp", "index": "0", "description": "both, at once"}\n\n')
    assert read_descriptions(table)["m1/0"] == "both, at once"
    assert read_descriptions(lines, {"1-mlp": "m1"}) == {"m1/0": "both, at once"}
    with pytest.raises(ValueError, match="module of '1-mlp'"):
        read_descriptions(lines)
    table.write_text("node,text\nm1/0,x\n")
    with pytest.raises(ValueError, match="rows with name and description"):
        read_descriptions(table)
    joined = join_descriptions(labelled, {"m1/0": "both"})
    assert joined.nodes.set_index("name")["description"]["m1/0"] == "both"
    with pytest.raises(ValueError, match="must name nodes of the graph"):
        join_descriptions(labelled, {"m9/9": "elsewhere"})


class OneWord:
    "A tokenizer of whole numbers."

    def encode(self, text, **_):
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(map(str, ids))


def test_a_description_that_quotes_tokens_takes_the_tests(logic, labelled):
    known, _, text = logic
    model = replace(known.model, tokenizer=OneWord())
    codes = read_writes(cut_model(known.model, known.dictionaries), text).codes
    fires = codes["m1"][:, 1:, 0] > 0  # the AND of the first pair
    when = sorted(set(text[:, 1:][fires].tolist()))
    described = join_descriptions(labelled, {"m1/0": f'the word "{when[0]}"', "m1/1": "an OR"})
    scores = score_descriptions(described, model, text, known.dictionaries, run=QUIET)
    assert scores.loc["m1/0", "n_tokens"] == 1 and np.isnan(scores.loc["m1/1", "r2"])
    # F1 by hand, on the same half
    _, rest = split_text(text)
    codes = read_writes(cut_model(known.model, known.dictionaries), rest).codes
    own, said = codes["m1"][:, 1:, 0] > 0, rest[:, 1:] == when[0]
    assert scores.loc["m1/0", "f1"] == pytest.approx(2 * (own & said).sum() / (own.sum() + said.sum()))
    with pytest.raises(ValueError, match="must have descriptions"):
        score_descriptions(labelled, model, text, known.dictionaries, run=QUIET)
    with pytest.raises(ValueError, match="must have a tokenizer"):
        score_descriptions(described, known.model, text, known.dictionaries, run=QUIET)


def test_quoted_tokens_are_single_tokens_with_and_without_a_space():
    model = load_model("smollm2-135m")
    forms = [model.tokenizer.encode(form)[0] for form in ("the", " the")]
    assert quoted_tokens('the word "the", and “counterrevolutionaries”', model) == tuple(sorted(forms))
    assert quoted_tokens("an article", model) == ()
