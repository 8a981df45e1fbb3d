"""Gradients of the base model against autograd, finite differences and one step of training; what is read off them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import ws
from ws.diff import LowRank
from ws.gradient import accumulate
from ws.gradient.accumulate import weighted_gradients
from ws.gradient.capture import chosen, in_halves, leading, pair_gradients, side_weights, signs
from ws.gradient.predict import contrast, jackknife, predict, wording_grid
from ws.gradient.sketch import diff_sketch, projection, text_sketches
from ws.model.text import answer_frame
from ws.subspaces.algebra import left_svd
from ws.subspaces.protocol import load_protocol
from ws.train.examples import collate, label_loss, make_example
from ws.train.pairs import PairConfig, WrittenPair, from_file

LAYERS = (2, 3)


@pytest.fixture(scope="module")
def lm():
    return ws.load_lm("tiny")


@pytest.fixture(scope="module")
def rows():
    return from_file(ws.load_behavior("sycophancy"), PairConfig(file="sycophancy")).rows[:8]


def examples(lm, rows):
    frame = answer_frame(lm.tokenizer)
    return [make_example(lm, row, sign, frame, 512) for sign in ("pos", "neg") for row in rows]


def by_autograd(lm, rows, sign):
    """Mean loss over response tokens and its gradient, by role, the usual way."""
    made = [make_example(lm, row, sign, answer_frame(lm.tokenizer), 512) for row in rows]
    batch = collate(made)
    labels = batch.pop("labels")
    weights = {(l, role): lm.decoder.linear(l, role).weight for l in LAYERS for role in ("o", "down", "q", "up")}
    loss, count = label_loss(lm.model, batch, labels)
    found = torch.autograd.grad(loss / count, list(weights.values()))
    return float(loss.detach() / count), dict(zip(weights, found, strict=True))


def least_cos(A, B):
    """Cosine of the largest principal angle."""
    return float(torch.linalg.svdvals(A.double().T @ B.double()).min())


def tokens_of(made):
    return torch.tensor([float(sum(t != -100 for t in e["labels"])) for e in made]).reshape(2, -1)


def test_sums_are_autograds_and_batches_change_nothing(lm, rows, monkeypatch):
    made = examples(lm, rows)
    weights = side_weights(tokens_of(made), signs(len(rows), 0))
    one_by_one = dict.fromkeys(((l, r) for l in LAYERS for r in ("o", "down", "q", "up")), weights)
    sums, losses = weighted_gradients(lm, made, one_by_one, progress=False)
    for s, sign in enumerate(("pos", "neg")):
        loss, grads = by_autograd(lm, rows, sign)
        mine = losses[s * len(rows) : (s + 1) * len(rows)].sum() / tokens_of(made)[s].sum()
        assert float(mine) == pytest.approx(loss, rel=1e-5)
        for one, grad in grads.items():
            assert float((sums[one][s] - grad).norm() / grad.norm()) < 1e-4, (sign, one)
    monkeypatch.setattr(accumulate, "TOKENS", 1)
    again, _ = weighted_gradients(lm, made, one_by_one, progress=False)
    assert all(float((again[one] - sums[one]).norm() / sums[one].norm()) < 1e-4 for one in sums)


def test_finite_differences_agree(lm, rows):
    made = examples(lm, rows[:3])
    weights = side_weights(tokens_of(made), signs(3, 0))
    one = (3, "down")
    sums, _ = weighted_gradients(lm, made, {one: weights}, progress=False)
    D = sums[one][1] - sums[one][0]
    W, step = lm.decoder.linear(*one).weight, 2e-2 / D.norm()

    def gap():
        with torch.no_grad():
            return sum(s * by_loss(lm, rows[:3], sign) for sign, s in (("pos", -1), ("neg", 1)))

    before = W.detach().clone()
    try:
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                W.copy_(before + sign * step * D)
            values.append(gap())
    finally:
        with torch.no_grad():
            W.copy_(before)
    assert (values[0] - values[1]) / (2 * float(step)) == pytest.approx(float(D.square().sum()), rel=5e-3)


def by_loss(lm, rows, sign):
    batch = collate([make_example(lm, row, sign, answer_frame(lm.tokenizer), 512) for row in rows])
    labels = batch.pop("labels")
    loss, count = label_loss(lm.model, batch, labels)
    return float(loss) / count


def test_shuffles_are_the_gradients_of_swapped_pairs(lm, rows):
    found = pair_gradients(lm, rows, LAYERS, shuffles=2, progress=False)
    assert (
        found.kinds == ["contrast", "sum", "half 0", "half 1", "null 0", "null 1"]
        and found.n == 8
        and found.layers == [2, 3]
    )
    swaps = signs(len(rows), 2)
    assert not torch.equal(swaps[0], swaps[1])
    swapped = tuple(
        replace(r, response_pos=r.response_neg, response_neg=r.response_pos, cut_pos=r.cut_neg, cut_neg=r.cut_pos)
        if s < 0
        else r
        for r, s in zip(rows, swaps[1], strict=True)
    )
    want = pair_gradients(lm, swapped, LAYERS, shuffles=0, progress=False)
    for l in LAYERS:
        a, b = (left_svd(x.roots[kind, "write", l], 4).B for x, kind in ((found, "null 1"), (want, "contrast")))
        assert least_cos(a, b) > 1 - 1e-4
    assert {side for kind, side, _ in found.roots if kind == "null 1"} == {"write"}


def test_halves_are_the_parts_of_half_of_the_pairs(lm, rows):
    G = pair_gradients(lm, rows, LAYERS, shuffles=0, progress=False)
    made = examples(lm, rows)
    weights = side_weights(tokens_of(made), signs(len(rows), 0))
    halves = in_halves(weights[1] - weights[0], [(row.persona, 0) for row in rows])
    assert torch.equal(halves.sum(0), weights[1] - weights[0]) and ((halves != 0).sum(1) == len(rows)).all()
    for one, side in (((2, "o"), "write"), ((3, "q"), "read")):
        sums, _ = weighted_gradients(lm, made, {one: halves}, progress=False)
        assert G.norms[one] == pytest.approx(float(sums[one].sum(0).norm()), rel=1e-5)
        for i, kind in enumerate(("half 0", "half 1")):
            space = left_svd(sums[one][i] if side == "write" else sums[one][i].T, 1).B
            held = left_svd(G.roots[kind, side, one[0]], 24).B
            assert float((held.T @ space).norm()) > 0.9, (one, kind)
    swapped = [replace(r, response_pos=r.response_neg, response_neg=r.response_pos) for r in rows]
    first = in_halves(torch.ones(len(rows)), [0] * len(rows))[0] > 0
    one_wording = [replace(r if keep else s, persona=0) for r, s, keep in zip(rows, swapped, first, strict=True)]
    against = pair_gradients(lm, [replace(r, persona=0) for r in rows], LAYERS, shuffles=0, progress=False).agree
    turned = pair_gradients(lm, one_wording, LAYERS, shuffles=0, progress=False).agree
    assert abs(turned["write"] + against["write"]) < 0.2 and set(turned) == {
        "write",
        "read",
    }  # one half's labels turned


def test_wordings_are_shared_out_between_halves():
    groups = [w for w in range(5) for _ in range(8)] + [9, 9, 9]
    first = in_halves(torch.ones(len(groups)), groups)[0] > 0
    counts = [int(first[[g == w for g in groups]].sum()) for w in range(5)]
    assert counts == [4] * 5 and int(first.sum()) == 22


def test_one_step_of_lora_from_zero_moves_w_along_the_gradient(lm, rows):
    """w = lr s^2 D A^T A after one SGD step on both adapters: its left space is that of D A^T, and D's own where A is square."""
    from peft import LoraConfig, get_peft_model

    l, rank = 3, 192  # as wide as o's input
    G = pair_gradients(lm, rows, [l], shuffles=0, progress=False)
    sides = {}
    for sign in ("pos", "neg"):
        torch.manual_seed(0)
        name = lm.decoder.param_name(l, "o").removesuffix(".weight")
        adapted = get_peft_model(lm.model, LoraConfig(r=rank, lora_alpha=rank, target_modules=name.replace(".", r"\.")))
        try:
            A, B = (p for n, p in adapted.named_parameters() if p.requires_grad)
            with torch.no_grad():
                A.copy_(torch.linalg.qr(torch.randn(rank, rank, generator=torch.Generator().manual_seed(1))).Q)
            batch = collate([make_example(lm, row, sign, answer_frame(lm.tokenizer), 512) for row in rows])
            labels = batch.pop("labels")
            loss, count = label_loss(adapted, batch, labels)
            grad = torch.autograd.grad(loss / count, B)[0]
            sides[sign] = (-grad @ A).detach()
        finally:
            adapted.unload()
            lm.model.requires_grad_(True)
    w = sides["pos"] - sides["neg"]
    made = examples(lm, rows)
    sums, _ = weighted_gradients(
        lm, made, {(l, "o"): side_weights(tokens_of(made), signs(len(rows), 0))}, progress=False
    )
    D = sums[l, "o"][1] - sums[l, "o"][0]
    assert float((w * D).sum() / (w.norm() * D.norm())) > 1 - 1e-4
    assert least_cos(left_svd(w, 8).B, left_svd(G.diff[lm.decoder.param_name(l, "o")], 8).B) > 1 - 1e-4


def test_the_model_is_left_as_it_was(lm, rows, monkeypatch):
    frozen = lm.decoder.linear(0, "q").weight.requires_grad_(False)
    lm.model.train()
    try:
        before = {n: (p.detach().clone(), p.requires_grad) for n, p in lm.model.named_parameters()}
        pair_gradients(lm, rows[:2], LAYERS, shuffles=0, progress=False)
        monkeypatch.setattr(accumulate, "logits_at", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pair_gradients(lm, rows[:2], LAYERS, shuffles=0, progress=False)
        assert lm.model.training and all(p.grad is None for p in lm.model.parameters())
        assert all(
            torch.equal(p, before[n][0]) and p.requires_grad == before[n][1] for n, p in lm.model.named_parameters()
        )
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())
    finally:
        frozen.requires_grad_(True)
        lm.model.eval()


def test_a_planted_response_is_given_back(lm, rows):
    """Where the unembedding reads a few directions of the last block's output, that is where the gradient lies."""
    last = lm.decoder.n_layers - 1
    unembed, norm = lm.decoder.logits_module().weight, lm.decoder.final_norm
    S = torch.linalg.qr(torch.randn(128, 4, generator=torch.Generator().manual_seed(3))).Q
    before = unembed.detach().clone(), norm.weight.detach().clone()
    embed = lm.decoder.embed_tokens.weight
    tied = embed is unembed
    try:
        with torch.no_grad():
            if tied:
                lm.decoder.logits_module().weight = torch.nn.Parameter(before[0] @ S @ S.T)
            else:
                unembed.copy_(before[0] @ S @ S.T)
            norm.weight.fill_(1.0)
        found = pair_gradients(replace(lm, fingerprint=""), rows, [last], shuffles=0, progress=False)
    finally:
        with torch.no_grad():
            if tied:
                lm.decoder.logits_module().weight = unembed
            else:
                unembed.copy_(before[0])
            norm.weight.copy_(before[1])
    assert least_cos(left_svd(found.roots["contrast", "write", last], 8).B, S) > 0.99


def test_gradients_are_kept_and_read_back(lm, rows, tmp_path):
    first = pair_gradients(lm, rows, LAYERS, shuffles=1, cache=tmp_path, progress=False)
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "gradients").glob("pairs_*.safetensors")}
    again = pair_gradients(lm, rows, LAYERS, shuffles=1, cache=tmp_path, progress=False)
    assert again.norms == first.norms and again.losses == first.losses and again.n == first.n
    assert all(torch.equal(again.roots[one], first.roots[one]) for one in first.roots)
    assert again.diff.fingerprint == first.diff.fingerprint
    assert len(files) == 1 and files == {p: p.stat().st_mtime_ns for p in files}
    for other in ({"fold_gain": True}, {"shuffles": 2}):
        pair_gradients(lm, rows, LAYERS, **{"shuffles": 1} | other, cache=tmp_path, progress=False)
    pair_gradients(lm, rows[1:], LAYERS, shuffles=1, cache=tmp_path, progress=False)
    assert len([*(tmp_path / "gradients").glob("pairs_*.safetensors")]) == 4


def test_what_has_no_gradient_is_refused(lm, rows):
    with pytest.raises(ValueError, match="no pair to take a gradient of"):
        pair_gradients(lm, (), LAYERS, progress=False)
    with ws.weight_steer(lm.model, ws.load_diff("tiny"), 1.0), pytest.raises(ValueError, match="is being steered"):
        pair_gradients(lm, rows, LAYERS, progress=False)
    hook = lm.decoder.blocks[0].register_forward_hook(lambda *_: None)
    try:
        with pytest.raises(ValueError, match="a forward hook is set"):
            pair_gradients(lm, rows, LAYERS, progress=False)
    finally:
        hook.remove()


def test_a_draw_of_pairs_is_seeded_and_in_order(rows):
    some = chosen(rows, 5)
    assert some == chosen(rows, 5) and len(some) == 5 and [r.sample for r in some] == sorted(r.sample for r in some)
    assert chosen(rows, 5, seed=1) != some and chosen(rows, 99) == tuple(rows)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40)])
def test_leading_is_the_best_of_its_rank(shape):
    M = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    U, s, Vh = torch.linalg.svd(M)
    want = (U[:, :5] * s[:5]) @ Vh[:5]
    assert torch.allclose(leading(M, 5).dense(), want, atol=1e-4)


def test_sketches_keep_inner_products(lm, rows):
    made = examples(lm, rows)
    targets = [(l, r) for l in LAYERS for r in ("o", "down", "q", "up")]
    each = dict.fromkeys(targets, torch.eye(len(made)))
    sums, _ = weighted_gradients(lm, made, each, progress=False)
    found, _ = text_sketches(lm, made, targets, progress=False)
    exact = sum(s.double().flatten(1) @ s.double().flatten(1).T for s in sums.values())
    rough = torch.cat([found[one] for one in targets], dim=1).double()
    size = exact.diagonal().sqrt()
    assert float(((rough @ rough.T - exact) / size[:, None] / size).abs().max()) < 0.15
    w = ws.load_diff("tiny")
    inner = float(sum((sums[one][0].double() * w[lm.decoder.param_name(*one)].double()).sum() for one in targets))
    sketched = sum(float(found[one][0] @ diff_sketch(lm, w, targets)[one]) for one in targets)
    norm = sum(w.norm(lm.decoder.param_name(*one)) ** 2 for one in targets) ** 0.5
    assert abs(sketched - inner) / (float(size[0]) * norm) < 0.05
    P = projection("x", 50, 32)
    assert torch.allclose(P @ P.T, 50 / 32 * torch.eye(32), atol=1e-5)
    dense = ws.WeightDiff({n: e.dense() if isinstance(e, LowRank) else e for n, e in w.entries.items()})
    one = targets[0]
    assert torch.allclose(diff_sketch(lm, dense, [one])[one], diff_sketch(lm, w, [one])[one], atol=1e-5)


def planted(wording: float, n: int = 8, m: int = 4) -> tuple:
    """Inner products of texts whose pairs' difference is `behaviour + wording * (that wording's own)` and some noise."""
    g = np.random.default_rng(0)
    topics, wordings = (a.ravel() for a in np.meshgrid(range(n), range(m)))
    own = g.standard_normal((m, 400))
    pair = np.ones(400) * (1 - wording) + wording * own[wordings] + 0.3 * g.standard_normal((n * m, 400))
    F = np.concatenate([-pair / 2, pair / 2])
    rows = [
        WrittenPair(int(t), int(v), i, "u", "a", "b") for i, (t, v) in enumerate(zip(topics, wordings, strict=True))
    ]
    return F @ F.T, rows, np.ones((2, n * m))


def test_the_wording_grid_finds_what_was_planted():
    for wording, low, high in ((0.0, -0.05, 0.05), (1.0, 0.9, 1.1)):
        table, share = wording_grid(*planted(wording))
        assert low < share < high, table
        swapped = table.filter(pairs="labels shuffled").row(0, named=True)
        assert swapped["low"] < 0 < swapped["high"] and table["splits"].min() == 100
    low, high = jackknife(*planted(1.0, n=20))
    assert low > 0.5 and high > low and np.isnan(jackknife(*planted(1.0, m=2))[0])
    K, rows, tokens = planted(0.5)
    one = [replace(row, persona=0) for row in rows]
    table, share = wording_grid(K, one, tokens)
    assert np.isnan(share) and table["splits"].to_list()[:3] == [0, 0, 0]


def test_contrast_weighs_each_side_by_its_tokens():
    tokens = np.array([[2.0, 4.0], [1.0, 3.0]])
    assert contrast(np.array([1.0, 1.0]), tokens).tolist() == [-1 / 6, -1 / 6, 1 / 4, 1 / 4]
    assert contrast(np.array([1.0, -1.0]), tokens).tolist() == [-1 / 5, 1 / 5, 1 / 5, -1 / 5]
    assert contrast(np.array([0.0, 1.0]), tokens).tolist() == [0, -1 / 4, 0, 1 / 3]


def test_a_prediction_says_where_w_will_act(lm, tmp_path):
    pairs = PairConfig(file="sycophancy", topics=4)
    config = ws.TrainConfig(pairs, lr=2e-3, max_steps=8)
    w = ws.train_diff(lm, "sycophancy", config=config, folder=tmp_path / "w", progress=False)
    found = predict(lm, pairs, against=w, most=24, progress=False)
    assert found.parts["share"].sum() == pytest.approx(1.0) and found.parts["share_w"].sum() == pytest.approx(1.0)
    assert set(found.parts["role"]) == {"q", "k", "v", "o", "gate", "up", "down"} and found.n == 24
    assert found.against["cos"] > found.against["null_high"] and found.against["p"] < 0.01
    assert "cos(D, w) =" in found.text and "w learnt these labels" in found.text
    found.save(tmp_path / "found")
    assert {p.name for p in (tmp_path / "found").iterdir()} == {"predict_parts.tsv", "predict_grid.tsv", "predict.md"}
    g = torch.Generator().manual_seed(0)
    noise = w.map(lambda _, e: LowRank(torch.randn(e.B.shape, generator=g), torch.randn(e.A.shape, generator=g)))
    blind = predict(lm, pairs, against=noise, most=24, progress=False)
    assert (
        blind.against["null_low"] <= blind.against["cos"] <= blind.against["null_high"] and "**inside**" in blind.text
    )


def test_gradient_candidates_take_part_where_pairs_are_given(lm, tmp_path):
    w, few = ws.load_diff("tiny"), PairConfig(file="sycophancy", topics=2)
    found = ws.explain(lm, w, protocol="v7b", pairs=few, candidates=["write"], progress=False, cache=tmp_path)
    assert "grad_contrast" not in set(found.summary["subspace"])  # the caller chose the candidates
    names = [
        "write",
        "grad_contrast",
        "grad_sum",
        "grad_null_1",
        "grad_contrast_read",
        "grad_contrast_heldout_topics",
        "grad_probe",
    ]
    names.append("grad_other_behavior")
    rows = (
        {
            "question": f"I like number {i}.",
            "answer_matching_behavior": answers[0],
            "answer_not_matching_behavior": answers[1],
        }
        for i, answers in enumerate([(" Yes", " No"), (" No", " Yes")] * 20)
    )
    (tmp_path / "tidy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tidy = tmp_path / "tidy.jsonl"
    found = ws.explain(lm, w, pairs=few, candidates=names, others=[tidy], progress=False, cache=tmp_path)
    R = {r["subspace"]: r for r in found.summary.iter_rows(named=True)}
    assert {*names, "grad_null"} - {"grad_null_1"} <= set(R) and "grad_null_1" not in R  # shown as one row
    assert R["grad_contrast"]["kind"] == "A-hypothesis" and R["grad_null"]["kind"] == "control"
    sees = {
        "write": "weights",
        "grad_contrast": "pairs",
        "grad_contrast_heldout_topics": "other pairs",
        "grad_probe": "prompts",
    }
    assert {name: R[name]["sees"] for name in sees} == sees and R["dW_left_basis_ceiling"]["sees"] == "w"
    assert R["grad_other_behavior"]["kind"] == "control" and R["grad_other_behavior"]["sees"] == "other pairs"
    assert "of 24 other behaviours" in found.setting["gradients"]
    assert found.setting["gradients"].startswith("of 24 of 24 training pairs, 62 of 62 held-out topics, 10 of 10 other")
    about = {c["name"]: c["sees"] for c in found.candidates}
    assert about["grad_contrast"] == ["weights", "pairs"] and about["grad_contrast_heldout_topics"] == [
        "weights",
        "other pairs",
    ]
    with pytest.raises(ValueError, match="see the training pairs: give them"):
        ws.explain(lm, w, protocol=replace(load_protocol("v7b"), sources=("gradient",)), progress=False, cache=tmp_path)


def test_own_pairs_and_the_verdict_by_what_candidates_see(lm, tmp_path):
    """From the training's own record to a verdict with and without gradient candidates."""
    config = ws.TrainConfig(PairConfig(file="sycophancy", topics=2), lr=2e-3, max_steps=4)
    names, found = ["write", "mlp_write", "grad_contrast", "grad_contrast_heldout_topics", "grad_sum"], {}
    for seed in (0, 1):
        w = ws.train_diff(lm, "sycophancy", seed=seed, config=config, folder=tmp_path / f"w{seed}", progress=False)
        assert w.meta["pairs_of"] == {"file": "sycophancy", "topics": 2}
        found[seed] = ws.explain(lm, w, pairs="own", candidates=names, progress=False, cache=tmp_path / "cache")
    assert found[0].setting["gradient_pairs"]["topics"] == 2 and found[0].bases == found[1].bases
    several = ws.compare_seeds(found, lm, boot=50, n_null=50, cache=tmp_path / "cache")
    halves = several.subspaces.filter(compared="text halves")
    assert set(halves["object"]) == {"grad_contrast", "grad_contrast_heldout_topics"}
    assert (
        len(halves) == 2 * 4 and halves.filter(object="grad_contrast_heldout_topics")["overlap"].is_between(0, 1).all()
    )
    assert list(several.races) == ["without gradients", "weights", "other pairs", "pairs"]
    assert several.races["without gradients"].n_contenders == 2 and several.verdict.n_contenders == 4
    assert several.races["pairs"].n_contenders == several.races["other pairs"].n_contenders == 1
    told = several.conclusion()
    assert "- with gradient candidates (4 contenders): " in told
    assert "- without them (2 contenders): " in told and "- sees other pairs" in told
    assert "sees" in several.leading.columns
    for run in found.values():
        run.setting["gradient_texts"] = "others"
    changed = ws.compare_seeds(found, lm, boot=50, n_null=50, cache=tmp_path / "cache")
    assert "the pairs have changed since the sweeps; sweep every seed again" in changed.conclusion()
    assert {"grad_contrast", "grad_contrast_heldout_topics"} <= set(changed.unstable)
    quick = {"protocol": "v7", "progress": False, "cache": tmp_path / "cache"}
    lost = ws.WeightDiff(w.entries, {**w.meta, "pairs_hash": "0" * 12})
    for one, why in ((lost, "have changed since"), (ws.WeightDiff(w.entries), "does not say which pairs")):
        plain = ws.explain(lm, one, pairs="own", candidates=["write"], **quick)
        assert why in plain.setting["gradients"] and why in plain.conclusion()
    for odd in ("sycophancy", {"topics": "all"}, {"nope": 1}):
        plain = ws.explain(lm, ws.WeightDiff(w.entries, {**w.meta, "pairs_of": odd}), pairs="own", candidates=["write"],
                           **quick)  # fmt: skip
        assert "names no pairs" in plain.setting["gradients"]
    foreign = PairConfig(file="sycophancy", topics=3)
    plain = ws.explain(lm, w, pairs=foreign, candidates=["grad_contrast"], **quick)
    assert "not the pairs that w was trained on" in plain.setting["gradients"]
    assert plain.summary.filter(subspace="grad_contrast")["sees"].item() == "other pairs"
    gone = ws.WeightDiff(w.entries, {**w.meta, "pairs_of": {"file": str(tmp_path / "gone.jsonl")}})
    plain = ws.explain(lm, gone, pairs="own", candidates=["write"], **quick)
    assert "gone.jsonl" in plain.setting["gradients"]
    assert ws.explain(lm, w, pairs="none", candidates=["write"], **quick).setting["gradients"] == ""


def test_the_command_predicts(tmp_path, monkeypatch, capsys):
    from ws.cli import answered

    monkeypatch.setenv("WS_TYPED_IN", str(tmp_path))
    assert answered(["predict", "sycophancy", "--most", "12", "--save", "here"]) == 0
    told = capsys.readouterr().out
    assert "From 12 pairs" in told and (tmp_path / "here" / "predict.md").read_text().strip() in told
    (tmp_path / "file").write_text("")
    for bad in (["gone.jsonl"], ["sycophancy", "--most", "-5"], ["sycophancy", "--save", "file"]):
        assert answered(["predict", *bad]) == 2
        assert capsys.readouterr().err.count("\n") == 1, bad


def test_bases_follow_the_answer_words_and_the_gradients_code(lm, tmp_path):
    """What a kept basis depends on beside the texts."""
    from ws.gradient.sets import GradientSets
    from ws.subspaces.candidate import get
    from ws.subspaces.kept import composed_of

    behavior, protocol = ws.load_behavior("sycophancy"), load_protocol("v7b")
    assert "grad_contrast" not in {c.name for c in ws.candidates("v7b")}
    pairs = PairConfig(file="sycophancy")
    sets = [
        GradientSets(lm, b, protocol, pairs, LAYERS, tmp_path, progress=False)
        for b in (behavior, replace(behavior, yes=("true",), no=("false",)))
    ]
    assert sets[0].content != sets[1].content and sets[0].names == [
        "training pairs",
        "held-out topics",
        "probes",
        "answer",
    ]
    assert GradientSets(lm, behavior, protocol, pairs, LAYERS, tmp_path).content == sets[0].content
    few = GradientSets(lm, behavior, protocol, replace(pairs, wordings=("yesno", "true")), LAYERS, tmp_path)
    assert "other wordings" in few.names and few.content != sets[0].content
    assert composed_of(get("grad_contrast"))[1] != composed_of(get("write"))[1]
    with pytest.raises((ValueError, TypeError)):  # a letter is no wording
        PairConfig(wordings="yesno")
