"""Delta SVD: reference numbers, planted updates, both modes, intervals, sharded hooks, errors, files, comparison."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import random_model
from looks import check_looks
from safetensors import safe_open
from safetensors.torch import load_file

from ws.cache import keys, made
from ws.delta import figures as draw
from ws.delta import report
from ws.delta.bootstrap import UNKNOWN, bootstrap, bootstrap_weights, group_parts, sketch_basis
from ws.delta.calibration import SHIPPED, as_documents, as_stream, bootstrap_groups, load_calibration
from ws.delta.measure import delta_svd, layer_numbers
from ws.delta.phases import (
    LAYERS_64,
    Capture,
    Phase,
    capture_of,
    expected_cos,
    left_out_quantile,
    phase_of,
    phases,
    simulate_capture,
    verdict,
)
from ws.delta.spectrum import eff_rank, eigen, fix_signs, krylov_top, right_gram, spectrum, spectrum_of_gram
from ws.model.decoder import Decoder
from ws.model.lm import LM, load_lm

TEXTS = [
    f"Passage {i}: the {w} is near the river, and {i} times {i} makes {i * i}."
    for i, w in enumerate(["mill", "barn", "inn", "tree", "well"])
]


@pytest.fixture(scope="module")
def lm(parity_folder):
    return load_lm(str(parity_folder / "model"), "float32", "cpu")


@pytest.fixture(scope="module")
def texts(parity_folder):
    return load_calibration(parity_folder / "delta_svd" / "calibration.json")


def wrapped(model, tokenizer) -> LM:
    return LM(model, tokenizer, Decoder(model), "random")


def run_of(lm, texts, **options):
    return delta_svd(lm, texts, **{"boot": 0, "progress": False, **options})


def decaying(n: int, d: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g) @ torch.diag(torch.linspace(1, 0, d) ** 3 + 0.02) + 0.3


# --- reference numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("final_norm", [False, True])
def test_equals_the_reference(lm, texts, parity_folder, tmp_path, final_norm):
    reference = json.loads(
        (parity_folder / "delta_svd" / f"expected_final_norm_{str(final_norm).lower()}.json").read_text()
    )
    run = run_of(lm, texts, final_norm=final_norm)
    run.save(tmp_path)
    result = json.loads((tmp_path / "delta_svd.json").read_text())

    cos = reference.pop("abs_top1_cos_adjacent")
    assert np.abs(result["top1_cos_adjacent"]) == pytest.approx(cos, rel=1e-4, abs=1e-6)
    assert set(result) == {*reference, "model", "top1_cos_adjacent"}
    for key in ("num_layers", "hidden", "n_calib_tokens"):
        assert result[key] == reference[key]
    for got, want in zip(result["per_layer"], reference["per_layer"], strict=True):
        assert set(got) == set(want)
        for key in set(want) - {"phase"}:
            assert got[key] == pytest.approx(want[key], rel=1e-4), (got["L"], key)
        assert got["phase"] == want["phase"]
    assert set(result["phases"]) == set(reference["phases"])
    for name, want in reference["phases"].items():
        got = result["phases"][name]
        assert set(got) == set(want)
        assert got.get("capture", {}) == pytest.approx(want.get("capture", {}), rel=1e-4)
        for key in ("n", "intra", "cross"):
            assert got[key] == pytest.approx(want[key], rel=1e-4)


# --- planted updates -------------------------------------------------------------------------------------------------


def plant(model, directions: torch.Tensor):
    """Hooks by which every block adds `c_1 v_1 + c_2 v_2` with random orthogonal coefficients of equal energy."""
    handles = []
    for l, block in enumerate(model.model.layers):

        def hook(_module, args, _output, l=l):
            h = args[0]
            g = torch.Generator().manual_seed(l)
            rows = torch.linalg.qr(torch.randn(h.shape[1] - 1, 2, generator=g))[0]
            rows = torch.cat([torch.full((1, 2), 50.0), rows])  # the first token must not count
            return h + (rows @ directions[l])[None]

        handles.append(block.register_forward_hook(hook))
    return handles


@pytest.mark.parametrize("mode", ["stream", "documents"])
def test_planted_rank_two_update_is_found(tokenizer, mode):
    model = random_model("qwen3", layers=3)
    g = torch.Generator().manual_seed(7)
    planted = torch.linalg.qr(torch.randn(3, 48, 2, generator=g))[0].transpose(1, 2)
    handles = plant(model, planted)
    try:
        run = run_of(wrapped(model, tokenizer), ["\n\n".join(TEXTS)], mode=mode)
    finally:
        for handle in handles:
            handle.remove()
    for l, layer in enumerate(run.layers):
        assert layer.eff_rank == pytest.approx(2, abs=1e-4)
        assert layer.top_singvals[:3] == pytest.approx((1, 1, 0), abs=1e-4)
        found = layer.directions[:2]
        assert torch.allclose(found.T @ found, planted[l].T @ planted[l], atol=1e-4)
        assert layer.frob == pytest.approx(2**0.5, rel=1e-4)


def test_a_block_that_adds_nothing_has_zeros_and_no_nan(tokenizer, tmp_path):
    model = random_model("qwen2", layers=2)
    handle = model.model.layers[1].register_forward_hook(lambda _m, args, _o: args[0].clone())
    run = run_of(wrapped(model, tokenizer), TEXTS, boot=20)
    handle.remove()
    still = run.layers[1]
    assert (still.frob, still.eff_rank, still.top1_frac, still.rel_step_mean) == (0, 0, 0, 0)
    assert not still.directions.any()
    run.save(tmp_path)
    assert "NaN" not in (tmp_path / "delta_svd.json").read_text()


def test_numbers_are_those_of_the_definition(lm, texts):
    """Against hidden states taken from the model's own outputs and a full SVD."""
    run = run_of(lm, texts, final_norm=True, top_k=3)
    ids = torch.tensor([lm.tokenizer("\n\n".join(texts))["input_ids"]])
    with torch.no_grad():
        states = lm.model(input_ids=ids, output_hidden_states=True).hidden_states
    for l, layer in enumerate(run.layers):
        h, delta = states[l][0, 1:], (states[l + 1] - states[l])[0, 1:]
        step = delta.norm(dim=1) / h.norm(dim=1)
        cos = torch.cosine_similarity(delta, h, dim=1)
        s = torch.linalg.svdvals(delta.double())
        p = s.square() / s.square().sum()
        assert layer.rel_step_mean == pytest.approx(step.mean().item(), rel=1e-5)
        assert layer.rel_step_std == pytest.approx(step.std(correction=0).item(), rel=1e-4)
        assert layer.parallel_frac == pytest.approx(cos.abs().mean().item(), rel=1e-4)
        assert layer.cos_delta_h_mean == pytest.approx(cos.mean().item(), abs=1e-5)
        assert layer.eff_rank == pytest.approx(torch.exp(-(p * p.log()).sum()).item(), rel=1e-4)
        assert layer.top10_frac == pytest.approx(p[:10].sum().item(), rel=1e-5)
        assert len(layer.top_singvals) == 3
        assert layer.directions.shape == (8, lm.decoder.d)  # captures need 8 whatever TOP_K shows


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "olmo2"])
def test_first_block_starts_from_what_the_model_feeds_it(family, tokenizer):
    """Gemma scales its embeddings; the sum of all updates leads from there to the last raw state in every family."""
    model = random_model(family)
    lm = wrapped(model, tokenizer)
    run = run_of(lm, TEXTS)
    ids = as_stream(tokenizer, TEXTS, 2048)[0].ids[None]
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert run.layers[0].h_norm_mean == pytest.approx(states[0][0, 1:].norm(dim=1).mean().item(), rel=1e-5)
    assert run.layers[1].frob == pytest.approx((states[2] - states[1])[0, 1:].norm().item(), rel=1e-5)


# --- modes -----------------------------------------------------------------------------------------------------------


def test_documents_of_one_text_equal_the_stream(lm):
    joined = "\n\n".join(TEXTS)
    stream = run_of(lm, TEXTS)
    documents = run_of(lm, [joined], mode="documents")
    for a, b in zip(stream.layers, documents.layers, strict=True):
        assert b.top_singvals == pytest.approx(a.top_singvals, rel=1e-4)
        for key in ("eff_rank", "frob", "rel_step_mean", "rel_step_std", "parallel_frac", "top3_frac"):
            assert getattr(b, key) == pytest.approx(getattr(a, key), rel=1e-4)
        assert torch.allclose(a.directions[:3], b.directions[:3], atol=1e-3)


def test_documents_do_not_depend_on_batches_and_drop_every_first_token(lm, texts):
    one, many = (run_of(lm, texts, mode="documents", batch_size=b) for b in (1, 4))
    lengths = [len(s.ids) for s in as_documents(lm.tokenizer, texts, 2048)]
    assert one.n_calib_tokens == sum(lengths)
    for a, b in zip(one.layers, many.layers, strict=True):
        assert b.eff_rank == pytest.approx(a.eff_rank, rel=1e-4)
        assert b.token_norm_mean == pytest.approx(a.token_norm_mean, rel=1e-5)
    norms = []
    for s in as_documents(lm.tokenizer, texts, 2048):
        with torch.no_grad():
            states = lm.model(input_ids=s.ids[None], output_hidden_states=True).hidden_states
        norms.append((states[1] - states[0])[0, 1:].norm(dim=1))
    assert one.layers[0].token_norm_mean == pytest.approx(torch.cat(norms).mean().item(), rel=1e-5)


def test_documents_intervals_equal_the_stream_ones_where_the_tokens_are_the_same(lm):
    stream = run_of(lm, TEXTS, boot=50)
    documents = run_of(lm, ["\n\n".join(TEXTS)], mode="documents", boot=50)  # under 8 passages: runs of tokens, both
    assert stream.bootstrap_unit == documents.bootstrap_unit
    for a, b in zip(stream.layers, documents.layers, strict=True):
        assert b.eff_rank_interval.low == pytest.approx(a.eff_rank_interval.low, rel=1e-3)
        assert b.top1_frac_interval.high == pytest.approx(a.top1_frac_interval.high, rel=1e-3)


def test_a_dispatched_model_gives_the_same_numbers(lm, texts, tmp_path, parity_folder):
    """Blocks kept on disk and moved in by accelerate's own hooks, as `device_map` does it for several devices."""
    from accelerate import disk_offload

    offloaded = load_lm(str(parity_folder / "model"), "float32", "cpu")
    disk_offload(offloaded.model, str(tmp_path), execution_device=torch.device("cpu"))
    moved = LM(offloaded.model, lm.tokenizer, Decoder(lm.model), lm.name)
    object.__setattr__(moved.decoder, "blocks", offloaded.model.model.layers)
    object.__setattr__(moved.decoder, "final_norm", offloaded.model.model.norm)
    assert next(offloaded.model.parameters()).device.type == "meta"
    for a, b in zip(
        run_of(lm, texts, final_norm=True).layers, run_of(moved, texts, final_norm=True).layers, strict=True
    ):
        assert a.top_singvals == b.top_singvals


def test_bfloat16_model_is_read_in_float32(parity_folder, lm, texts):
    half = load_lm(str(parity_folder / "model"), "bfloat16", "cpu")
    a, b = run_of(lm, texts), run_of(half, texts)
    assert b.directions.dtype == torch.float32
    for x, y in zip(a.layers, b.layers, strict=True):
        assert y.frob == pytest.approx(x.frob, rel=0.05)


# --- spectrum --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(200, 90), (90, 200), (150, 150), (40, 300)])
def test_spectrum_equals_the_full_svd(n, d):
    delta = decaying(n, d)
    found = spectrum(delta, 8)
    _, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
    assert found.singvals == pytest.approx(s.numpy(), rel=1e-4, abs=1e-6 * s[0].item())
    assert torch.allclose(
        (found.directions.double() * v[:8]).sum(dim=1).abs(), torch.ones(8, dtype=torch.float64), atol=1e-6
    )
    gram = spectrum_of_gram(right_gram(delta), delta.double().sum(dim=0), 8)
    assert torch.allclose(gram.directions, found.directions, atol=1e-5)


def test_krylov_vectors_equal_the_direct_ones():
    gram = right_gram(decaying(900, 700))
    _, direct = eigen(gram, 8)
    krylov = krylov_top(gram, 8)
    assert torch.allclose((direct * krylov).sum(dim=0).abs(), torch.ones(8, dtype=torch.float64), atol=1e-9)
    flat = torch.eye(300, dtype=torch.float64) + 1e-9 * right_gram(decaying(400, 300))  # close eigenvalues
    assert torch.allclose(krylov_top(flat, 8).T @ krylov_top(flat, 8), torch.eye(8, dtype=torch.float64), atol=1e-9)


def test_signs_follow_the_mean_update_then_the_largest_component():
    delta = decaying(60, 40)
    assert (spectrum(delta, 8).directions.double() @ delta.double().sum(dim=0) > 0).all()
    flipped = spectrum(-delta, 8).directions
    assert torch.allclose(flipped, -spectrum(delta, 8).directions, atol=1e-5)
    both = torch.cat([delta, -delta])  # no mean: the largest component decides, so the sign of the data does not matter
    rows = fix_signs(torch.linalg.svd(both.double())[2][:8], both.double().sum(dim=0))
    assert (rows.gather(1, rows.abs().argmax(dim=1, keepdim=True)) > 0).all()


def test_eff_rank_of_equal_shares_is_their_number():
    assert eff_rank(np.full(5, 0.2)) == pytest.approx(5)
    assert eff_rank(np.array([1.0, 1e-13])) == 1.0
    assert eff_rank(np.zeros(3)) == 0.0


def test_layer_numbers_use_population_deviations():
    found = spectrum(decaying(30, 20), 8)
    values = np.arange(10.0).reshape(2, 5)
    sums = np.stack([values.sum(axis=0), (values**2).sum(axis=0)])
    layer = layer_numbers(0, 6, sums, 2, found, 8, (UNKNOWN, UNKNOWN))
    assert (layer.token_norm_mean, layer.token_norm_std, layer.rel_step_std) == pytest.approx((2.5, 2.5, 2.5))


# --- bootstrap -------------------------------------------------------------------------------------------------------


def test_bootstrap_draws_equal_the_spectra_of_resampled_rows():
    """Where the sketch holds everything, a draw is exactly the spectrum of the rows drawn."""
    delta, count = decaying(96, 40), 12
    group = torch.arange(96) // 8
    parts = group_parts(delta, sketch_basis(delta), group, count, False)
    weights = bootstrap_weights(count, 60, seed=3)
    assert weights.sum(axis=1) == pytest.approx(count)
    full = spectrum(delta, 8)
    rank, top1 = bootstrap(full, parts, weights)
    ranks, tops = [], []
    for w in weights:
        rows = delta.repeat_interleave(torch.tensor(w).long()[group], dim=0)
        shares = spectrum(rows, 8).shares
        ranks.append(np.log(eff_rank(shares)))
        tops.append(shares[0])
    nats = np.log(eff_rank(full.shares))
    want = np.exp(nats + np.quantile(ranks - np.mean(ranks), [0.025, 0.975]))
    assert (rank.low, rank.high) == pytest.approx(tuple(want), rel=1e-4)
    want = full.shares[0] + np.quantile(tops - np.mean(tops), [0.025, 0.975])
    assert (top1.low, top1.high) == pytest.approx(tuple(want), rel=1e-4)


def test_bootstrap_in_a_sketch_is_near_the_exact_one():
    """A quarter of the energy lies outside 64 of 300 directions; passages differ in their spectra, as texts do."""
    g, count = torch.Generator().manual_seed(0), 30
    scale = (torch.linspace(1, 0, 300) + 0.1) * torch.exp(torch.randn(count, 1, 300, generator=g))
    delta = (torch.randn(count, 20, 300, generator=g) * scale).reshape(-1, 300)
    group = torch.arange(600) // 20
    full, weights = spectrum(delta, 8), bootstrap_weights(count, 100, seed=0)
    exact, _ = bootstrap(full, group_parts(delta, torch.eye(300), group, count, False), weights)
    parts = group_parts(delta, sketch_basis(delta, 64), group, count, True)
    sketched, _ = bootstrap(full, parts, weights)
    assert 1 - parts.grams.diagonal(dim1=1, dim2=2).sum() / parts.energy.sum() > 0.2
    width = exact.high - exact.low
    assert abs(sketched.low - exact.low) < 0.1 * width
    assert abs(sketched.high - exact.high) < 0.1 * width
    halves = [group_parts(delta[i], sketch_basis(delta, 64), group[i], count, True) for i in (group < 9, group >= 9)]
    assert torch.allclose(halves[0].plus(halves[1]).images, parts.images, rtol=1e-4, atol=1e-4)


def test_bootstrap_covers():
    """95 % intervals of eff_rank hold its mean over data sets of the same size in 90 to 100 of 100."""
    g = torch.Generator().manual_seed(0)
    count, weights = 20, bootstrap_weights(20, 100, 0)
    values, intervals = [], []
    for _ in range(100):
        scale = torch.linspace(1, 0.1, 24) * torch.exp(0.6 * torch.randn(count, 1, 24, generator=g))
        delta = (torch.randn(count, 12, 24, generator=g) * scale).reshape(-1, 24)
        full = spectrum(delta, 8)
        intervals.append(
            bootstrap(full, group_parts(delta, torch.eye(24), torch.arange(240) // 12, count, False), weights)[0]
        )
        values.append(eff_rank(full.shares))
    truth = np.mean(values)
    assert 90 <= sum(i.low <= truth <= i.high for i in intervals) <= 100


def test_bootstrap_is_seeded_and_switched_off_by_zero(lm, texts):
    a, b, c = (run_of(lm, texts, boot=30, seed=s).layers[2].eff_rank_interval for s in (0, 0, 1))
    assert a == b
    assert a != c
    assert a.low < run_of(lm, texts).layers[2].eff_rank < a.high
    assert np.isnan(run_of(lm, texts).layers[2].eff_rank_interval.low)


def test_bootstrap_units(tokenizer):
    few = as_stream(tokenizer, TEXTS, 2048)
    groups, unit = bootstrap_groups(few)
    assert unit == "16 contiguous runs of tokens"
    assert (groups[0].passage.diff() >= 0).all()
    many = as_documents(tokenizer, TEXTS * 20, 2048)
    groups, unit = bootstrap_groups(many)
    assert unit == "32 groups of passages (100 passages)"
    assert len({s.passage[0].item() for s in groups}) == 32


# --- phases ----------------------------------------------------------------------------------------------------------


def test_phase_tables():
    assert [phase_of(l, 64) for l in (0, 6, 7, 9, 10, 31, 32, 46, 47, 58, 59, 63)] == [
        "A",
        "A",
        "B",
        "B",
        "C",
        "C",
        "D",
        "D",
        "E",
        "E",
        "tail",
        "tail",
    ]
    assert [phase_of(l, 100) for l in (0, 10, 11, 14, 15, 49, 50, 74, 75, 91, 92)] == [
        "A",
        "A",
        "B",
        "B",
        "C",
        "C",
        "D",
        "D",
        "E",
        "E",
        "tail",
    ]
    assert sum(map(len, LAYERS_64.values())) == 59
    with pytest.raises(ValueError, match="layer 6"):
        phase_of(6, 6)


def test_capture_equals_the_svd_and_left_out_chance_is_8_over_d():
    frames = torch.linalg.qr(torch.randn(5, 60, 8, generator=torch.Generator().manual_seed(0)))[0].transpose(1, 2)
    u = torch.linalg.svd(frames.reshape(-1, 60).double().T, full_matrices=False)[0][:, :8]
    want = (frames[:, 0].double() @ u).square().sum(dim=1)
    assert torch.allclose(capture_of(frames[:, 0], frames), want, atol=1e-10)

    directions = torch.linalg.qr(torch.randn(40, 128, 8, generator=torch.Generator().manual_seed(1)))[0].transpose(1, 2)
    left = [c.left_out for p in phases(directions) for c in p.captures]
    assert np.mean(left) == pytest.approx(8 / 128, abs=4 * np.std(left) / len(left) ** 0.5)


@pytest.mark.parametrize(("d", "n", "want"), [(5120, 3, 0.36), (5120, 7, 0.167), (128, 3, 0.48), (128, 7, 0.30)])
def test_simulated_chance(d, n, want):
    assert simulate_capture(d, n, draws=20).mean() == pytest.approx(want, rel=0.1)


def test_planted_shared_subspace_is_told_from_specialised_layers():
    """Layers 15..49 draw their directions from one 8-dimensional space; the rest are random."""
    d, g = 256, torch.Generator().manual_seed(2)
    space = torch.linalg.qr(torch.randn(d, 8, generator=g))[0]
    frames = []
    for l in range(100):
        mix = torch.linalg.qr(torch.randn(8, 8, generator=g))[0]
        own = torch.linalg.qr(torch.randn(d, 8, generator=g))[0]
        frames.append((space @ mix if phase_of(l, 100) == "C" else own).T)
    found = phases(torch.stack(frames))
    by_name = {p.name: p for p in found}
    assert by_name["C"].left_out == pytest.approx(1, abs=1e-6)
    assert by_name["E"].left_out < by_name["E"].left_out_high
    assert by_name["C"].outside == pytest.approx(8 / d, abs=0.02)
    said = verdict(found, [10.0] * 100, d)
    assert said["shared_C"].startswith("supported:")
    assert said["specialised_E"].startswith("supported:")
    assert f"{8 / d:.3f}" in said["shared_C"]
    assert f"{expected_cos(d):.3f}" in said["shared_C"]


def test_random_directions_support_no_shared_subspace():
    wrong = 0
    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        frames = torch.linalg.qr(torch.randn(12, 128, 8, generator=g))[0].transpose(1, 2)
        wrong += not verdict(phases(frames), [5.0] * 12, 128)["shared_C"].startswith("not supported")
    assert wrong <= 2  # the threshold is the 95 % quantile of chance
    assert left_out_quantile(8, 3) == 1.0


def test_verdict_words():
    def phase(name, left, outside, layers):
        captures = tuple(Capture(l, left, left) for l in layers)
        return Phase(name, tuple(layers), 0.5, 0.1, captures, outside, 0.3, 0.35, 0.1)

    ranks = [4.0] * 9
    c, e = phase("C", 0.7, 0.2, [1, 2, 3]), phase("E", 0.4, 0.2, [6, 7])
    assert verdict([c, e], ranks, 100)["specialised_E"].startswith("supported in part")
    assert verdict([phase("C", 0.7, 0.8, [1, 2, 3]), e], ranks, 100)["shared_C"].startswith("supported in part")
    assert verdict([phase("C", 0.3, 0.2, [1, 2, 3]), e], ranks, 100)["specialised_E"].startswith("not supported")
    lonely = verdict([phase("C", 0.7, 0.2, [1, 2, 3]), Phase("E", (7,), 1.0, 0.1)], ranks, 100)
    assert lonely["specialised_E"].startswith("cannot be tested: phase E has 1 layer ")
    assert verdict([], ranks, 100)["shared_C"].startswith("cannot be tested: phase C has 0 layers")


# --- input -----------------------------------------------------------------------------------------------------------


def test_calibration_files(tmp_path):
    files = {
        "a.txt": "one\ntwo\n\n\n  \nthree\n",
        "a.json": json.dumps(["one\ntwo", {"kind": "fact", "text": "three"}, " "]),
        "a.jsonl": '"one\\ntwo"\n\n{"text": "three"}\n',
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
        assert load_calibration(tmp_path / name) == ["one\ntwo", "three"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("e.txt", " \n\n", "e.txt: the calibration file is empty"),
        ("e.json", "", "e.json: the calibration file is empty"),
        ("e.jsonl", "", "e.jsonl: the calibration file is empty"),
        ("e.json", "[1]", "e.json: entry 0: expected a string"),
        ("e.json", "{}", "expected a JSON list of passages, found dict"),
        ("e.json", "[", "e.json: not JSON"),
        ("e.jsonl", '{"text": "a"}\n{"txt": "b"}', "e.jsonl: line 2: expected a string"),
        ("e.csv", "a", "not '.csv'"),
    ],
)
def test_bad_calibration_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_calibration(tmp_path / name)


def test_shipped_passages():
    shipped = load_calibration()
    assert len(shipped) >= 25
    assert len(set(shipped)) == len(shipped)
    kinds = {entry["kind"] for entry in json.loads(SHIPPED.read_text(encoding="utf-8"))}
    assert len(kinds) >= 9  # facts, arithmetic, algebra, code, SQL, stories, dialogue, translation, other scripts
    assert any(not text.isascii() for text in shipped)


def test_missing_calibration_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.txt"):
        load_calibration(tmp_path / "nowhere.txt")


def test_too_little_text_and_bad_options(lm):
    for texts, mode in ([""], "stream"), ([], "documents"), (["a"], "stream"), (["a", "b", "c"], "documents"):
        with pytest.raises(ValueError, match="at least 3 tokens are needed"):
            run_of(lm, texts, mode=mode)
    with pytest.raises(ValueError, match="MODE 'both' is unknown"):
        run_of(lm, TEXTS, mode="both")
    with pytest.raises(ValueError, match="TOP_K 0"):
        run_of(lm, TEXTS, top_k=0)


def test_states_that_are_not_finite_name_their_block(tokenizer):
    model = random_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="model.layers.1: hidden states are not finite in float32"):
        run_of(wrapped(model, tokenizer), TEXTS)
    assert not any(block._forward_hooks for block in model.model.layers)


def test_long_text_is_cut_and_said(lm):
    run = run_of(lm, TEXTS, max_length=40)
    whole = len(lm.tokenizer("\n\n".join(TEXTS))["input_ids"])
    assert (run.n_calib_tokens, run.n_cut_tokens) == (40, whole - 40)
    assert f"{whole - 40} tokens of 1 sequence were cut off at max_length 40." in report.reading_notes(run)
    documents = run_of(lm, TEXTS, mode="documents", max_length=20)
    assert documents.n_cut_sequences == len(TEXTS)


def test_stream_tokens_know_their_passage(tokenizer):
    sequence = as_stream(tokenizer, TEXTS, 2048)[0]
    back = ["".join(tokenizer.decode(sequence.ids[sequence.passage == i])) for i in range(len(TEXTS))]
    assert [text.strip() for text in back] == TEXTS

    class Slow:
        is_fast = False

        def __call__(self, text):
            return tokenizer(text)

    slow = as_stream(Slow(), TEXTS, 2048)[0]
    assert torch.equal(slow.ids, sequence.ids)
    assert (slow.passage != sequence.passage).float().mean() < 0.02


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(lm, texts, tmp_path_factory):
    target = tmp_path_factory.mktemp("delta") / "first"
    run_of(lm, texts, boot=20).save(target)
    return target


def test_two_runs_write_the_same_bytes(lm, texts, folder, tmp_path):
    run_of(lm, texts, boot=20).save(tmp_path)
    names = sorted(p.name for p in folder.iterdir())
    assert names == sorted(p.name for p in tmp_path.iterdir())
    assert len(names) == 8
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_a_run_reads_a_file_and_tells_what_it_writes(lm, texts, parity_folder, tmp_path):
    run = run_of(lm, parity_folder / "delta_svd" / "calibration.json")
    assert torch.equal(run.directions, run_of(lm, texts).directions)
    assert run_of(lm, None, max_length=40).n_calib_tokens == 40  # the shipped passages
    folder = run.save(tmp_path / "run")
    assert len(run.table()) == len(run.layers)
    assert (folder / "delta_svd_conclusion.md").read_text() == run.conclusion()
    assert [p.name for p in run.phases] == list(json.loads((folder / "delta_svd.json").read_text())["phases"])


def test_directions_and_tables_on_disk(folder):
    directions = load_file(folder / "delta_svd.safetensors")["directions"]
    assert directions.shape == (6, 8, 128)
    assert torch.allclose(directions @ directions.transpose(1, 2), torch.eye(8).expand(6, 8, 8), atol=1e-5)
    with safe_open(folder / "delta_svd.safetensors", "pt") as handle:
        assert "about" in handle.metadata()
    result, layers = report.read_folder(folder)
    assert layers["eff_rank"].to_list() == pytest.approx([e["eff_rank"] for e in result["per_layer"]])
    assert (layers["eff_rank_low"] <= layers["eff_rank"]).all()
    assert (folder / "delta_svd_conclusion.md").read_text().count("chance") >= 3


def test_a_failed_write_leaves_the_old_result(lm, texts, folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "copy")
    before = (tmp_path / "copy" / "delta_svd.safetensors").read_bytes()

    def broken(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(report, "save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        run_of(lm, texts[:5]).save(tmp_path / "copy")
    assert (tmp_path / "copy" / "delta_svd.safetensors").read_bytes() == before
    assert not list((tmp_path / "copy").glob(".tmp-*"))


def test_comparison(folder, model_folder, tmp_path):
    other = load_lm(str(model_folder("llama", layers=3)), "float32", "cpu")
    run_of(other, TEXTS).save(tmp_path / "other")
    table = report.compare([folder, tmp_path / "other"])
    assert table.height == 9
    assert table["depth"].to_list()[6:] == pytest.approx([0, 1 / 3, 2 / 3])
    assert table["model"].n_unique() == 2
    shutil.copytree(folder, tmp_path / "again")
    assert report.compare([folder, tmp_path / "again"])["model"].n_unique() == 2
    shutil.copytree(folder, tmp_path / ".tmp-here-1-2-3.mine")  # a run in progress is named as it will be
    table_of_mine = report.compare([folder, tmp_path / ".tmp-here-1-2-3.mine"])
    assert f"({tmp_path.name}/mine)" in "".join(table_of_mine["model"].unique())
    record = tmp_path / "again" / "delta_svd.ipynb"
    record.write_text("")
    made.mark_made(record, keys.Key("p", "i", "s"), {"outputs": {"delta_svd.json": "another"}})
    with pytest.raises(made.Damaged, match="delta_svd.json: damaged"):
        report.compare([folder, tmp_path / "again"])
    made.sidecar(record).unlink()
    assert len(draw.comparison(table).axes) == 2
    with pytest.raises(ValueError, match="at least two"):
        report.compare([folder])
    with pytest.raises(ValueError, match="given twice"):
        report.compare([folder, folder])
    with pytest.raises(FileNotFoundError, match="not a delta SVD result folder"):
        report.compare([folder, tmp_path])
    (tmp_path / "again" / "delta_svd.json").write_text("{}")
    with pytest.raises(ValueError, match="lacks model, num_layers, per_layer"):
        report.compare([folder, tmp_path / "again"])


def test_figures_show_every_layer(folder, tmp_path):
    from ws.show.figures import save
    from ws.show.tables import read_table

    layers, rows = (read_table(folder / f"delta_svd_{name}.tsv") for name in ("per_layer", "phases"))
    captures, cos = (read_table(folder / f"delta_svd_{name}.tsv") for name in ("capture", "cos"))
    made = {
        "rel_step": draw.rel_step(layers),
        "eff_rank": draw.eff_rank(layers),
        "spectrum": draw.top_spectrum(layers),
        "parallel": draw.parallel(layers, 128),
        "cos": draw.cos_heatmap(cos.drop("layer").to_numpy(), 128),
        "capture": draw.capture(captures, rows, 6, 128),
    }
    for name, figure in made.items():
        check_looks(figure)
        ax = figure.axes[0]
        assert ax.get_xlabel() == "layer", name
        assert ax.get_ylabel(), name
        assert {"A", "C", "D", "E"} <= {t.get_text() for t in ax.texts}, name
        assert all(path.stat().st_size > 1000 for path in save(figure, tmp_path / name))
    assert made["spectrum"].axes[0].lines[0].get_ydata() == pytest.approx(layers["top1_frac"].to_numpy(), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.json", "[" * 100_000, "nested too deep"),
        ("c.jsonl", '{"text": "a"}\n' + "[" * 100_000, "line 2: not JSON that can be read: nested too deep"),
        ("c.txt", "a" * 100_001, "passage 0: has 100,001 characters, at most 100,000"),
        ("c.txt", "a\n\n" * 100_001, "holds 100,001 passages"),
        ("c.json", " " * (65 << 20), "at most 67.1 MB are read"),
    ],
    ids=range(5),
)
def test_a_calibration_file_has_limits(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_calibration(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)
