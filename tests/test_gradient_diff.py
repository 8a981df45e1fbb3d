"""The gradient as a weight difference: its sign, norms and rank; the strength at which two differences move the model as far."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

import ws
from ws.diff import LowRank, WeightDiff
from ws.diff.algebra import dot, random_as, scaled_as
from ws.gradient.diff import as_diff, contrasts, gradient_diff
from ws.model.text import answer_frame, chat_text
from ws.steer.kl import kl_from_base, matched_alpha
from ws.steer.weights import weight_steer
from ws.train.examples import collate, label_loss, make_example
from ws.train.pairs import PairConfig, from_file


@pytest.fixture(scope="module")
def lm():
    return ws.load_lm("tiny")


@pytest.fixture(scope="module")
def behavior():
    return ws.load_behavior("sycophancy")


@pytest.fixture(scope="module")
def rows(behavior):
    return from_file(behavior, PairConfig(file="sycophancy")).rows[:12]


@pytest.fixture(scope="module")
def w():
    return ws.load_diff("tiny")


@pytest.fixture(scope="module")
def texts(lm, behavior):
    return [chat_text(lm.tokenizer, behavior.probe_text(t.claim)) for t in behavior.heldout_topics]


def loss_of(model, lm, rows, sign):
    made = collate([make_example(lm, row, sign, answer_frame(lm.tokenizer), 512) for row in rows])
    labels = made.pop("labels")
    loss, count = label_loss(model, made, labels)
    return loss / count


def one_step(lm, rows, sign, names, lr=1.0):
    """A step of SGD on a LoRA whose B is 0, as what it adds to the weights; and each A."""
    torch.manual_seed(3)
    at = "|".join(name.removesuffix(".weight").replace(".", r"\.") for name in names)
    adapted = get_peft_model(lm.model, LoraConfig(r=4, lora_alpha=8, target_modules=f"({at})"))
    try:
        loss_of(adapted, lm, rows, sign).backward()
        B = {n: p for n, p in adapted.named_parameters() if "lora_B" in n}
        torch.optim.SGD(B.values(), lr).step()
        found = {}
        for n, p in B.items():
            A = adapted.get_parameter(n.replace("lora_B", "lora_A")).detach().clone()
            name = n.removeprefix("base_model.model.").replace(".lora_B.default", "")
            found[name] = 2.0 * p.detach() @ A, A
    finally:
        adapted.unload()
        lm.model.requires_grad_(True)
    return found


def test_one_step_of_training_from_zero_is_the_gradient_behind_a_projection(lm, rows, w):
    """`w_1 = lr s^2 D A^T A`, with a plus: of the step of both sides, pos minus neg."""
    names = [n for n in w if ".3." in n]
    D = contrasts(lm, rows, w.select(names.__contains__), progress=False)[0]
    pos, neg = (one_step(lm, rows, sign, names) for sign in ("pos", "neg"))
    assert set(D) == set(names) == set(pos)
    for name in names:
        (up, A), (down, B) = pos[name], neg[name]
        assert torch.equal(A, B)
        step, want = up - down, 4.0 * D[name] @ A.T @ A
        assert float((step - want).norm() / want.norm()) < 1e-3, name
        assert float((step * D[name]).sum()) > 0


def test_it_moves_the_losses_the_way_training_does(lm, rows, w):
    u = gradient_diff(lm, rows, w, progress=False)
    small = u.scale(0.02)
    moved = {}
    for sign in ("pos", "neg"):
        with torch.no_grad():
            before = float(loss_of(lm.model, lm, rows, sign))
            with weight_steer(lm.model, small, 1.0):
                moved[sign] = float(loss_of(lm.model, lm, rows, sign)) - before
    assert moved["pos"] - moved["neg"] < -1e-4


def test_norms_are_those_of_w_and_the_rank_is_what_is_asked_for(lm, rows, w):
    own = w.select(lambda n: ".2." in n)
    full = gradient_diff(lm, rows, own, progress=False)
    assert set(full) == set(own) and all(isinstance(e, torch.Tensor) for e in full.entries.values())
    D = contrasts(lm, rows, own, 2, progress=False)
    assert len(D) == 3 and abs(dot(D[0], D[1])) < 0.95 * (dot(D[0], D[0]) * dot(D[1], D[1])) ** 0.5
    for rank in (1, 8, None):
        u = as_diff(D[0], own, rank)
        for name in own:
            assert u.norm(name) == pytest.approx(own.norm(name), rel=1e-5)
            s = torch.linalg.svdvals(u[name].double())
            if rank:
                assert u.rank(name) == rank and float(s[rank]) < 1e-5 * float(s[0])
                best = torch.linalg.svd(D[0][name].double())
                assert abs(float(best.U[:, 0] @ u[name].double() @ best.Vh[0])) == pytest.approx(float(s[0]), rel=1e-4)
    assert all(float((full[n] - as_diff(D[0], own)[n]).abs().max()) < 1e-6 for n in own)
    with pytest.raises(ValueError, match="rank 0: must be at least 1, or None"):
        as_diff(D[0], own, 0)
    with pytest.raises(ValueError, match="has no matrix of q, k"):
        contrasts(lm, rows, WeightDiff({"model.norm.weight": torch.ones(128)}), progress=False)
    with pytest.raises(ValueError, match="no pair to take a gradient of"):
        gradient_diff(lm, [], own, progress=False)


def test_a_kept_gradient_is_read_back(lm, rows, w, tmp_path):
    own = w.select(lambda n: ".2." in n)
    first = contrasts(lm, rows[:4], own, 1, cache=tmp_path, progress=False)
    file = next((tmp_path / "gradients").glob("dense_pairs_*.safetensors"))
    made = file.stat().st_mtime_ns
    again = contrasts(lm, rows[:4], own, 1, cache=tmp_path, progress=False)
    assert all(torch.equal(a[n], b[n]) for a, b in zip(first, again, strict=True) for n in a)
    assert file.stat().st_mtime_ns == made


def test_scaled_and_random_differences(w):
    u = random_as(w, 0)
    assert all(u.norm(n) == pytest.approx(w.norm(n), rel=1e-4) for n in w)
    assert abs(dot(u, w)) / w.total_norm() ** 2 < 0.01 and not torch.equal(random_as(w, 1)[w.names[0]], u[w.names[0]])
    name = w.names[0]
    with pytest.raises(ValueError, match="share no parameter"):
        scaled_as(WeightDiff({"b": torch.ones(2)}), w)
    with pytest.raises(ValueError, match=f"{name}: is 0 and cannot be scaled"):
        scaled_as(WeightDiff({name: torch.zeros(w.shape(name))}), w)
    assert set(scaled_as(WeightDiff({name: w[name], "b": torch.ones(2)}), w)) == {name}


def test_kl_is_the_mean_over_all_positions(lm, w, texts):
    kl = kl_from_base(lm, texts)
    before = {n: p.detach().clone() for n, p in lm.model.named_parameters()}
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([lm.tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            base = lm.model(ids).logits[0].double().log_softmax(-1)
            with weight_steer(lm.model, w, 0.5):
                now = lm.model(ids).logits[0].double().log_softmax(-1)
        total, count = total + float((now.exp() * (now - base)).sum()), count + len(base)
    assert kl(w, 0.5) == pytest.approx(total / count, rel=1e-4)
    assert kl(w, 0.0) == pytest.approx(0, abs=1e-6)
    assert kl(w, 0.02) / kl(w, 0.01) == pytest.approx(4, rel=0.1)  # alpha^2 near 0
    assert all(torch.equal(before[n], p) for n, p in lm.model.named_parameters())
    with pytest.raises(ValueError, match="no text to take the KL on"):
        kl_from_base(lm, [])


def test_kl_is_met_within_a_hundredth_or_refused_with_the_curve(lm, rows, w, texts):
    kl = kl_from_base(lm, texts[:4])
    target, u = kl(w, 1.0), gradient_diff(lm, rows, w, rank=8, progress=False)
    alpha, met = matched_alpha(lambda a: kl(u, a), target)
    assert met == pytest.approx(target, rel=0.01) and kl(u, alpha) == pytest.approx(met, rel=1e-6)
    assert matched_alpha(lambda a: kl(w, a), target) == (1.0, target)
    for power in (0.5, 2.0, 3.0):
        alpha, _ = matched_alpha(lambda a, p=power: 5 * a**p, 0.3)
        assert 5 * alpha**power == pytest.approx(0.3, rel=0.01)
    with pytest.raises(
        ValueError, match=r"a KL of 2 nats is not reached; alpha: KL is 1: 0\.5, .*choose a smaller target"
    ):
        matched_alpha(lambda a: a**2 / (1 + a**2), 2.0)
    with pytest.raises(ValueError, match="is not reached"):
        matched_alpha(lambda a: np.nan, 2.0)
    with pytest.raises(ValueError, match="cannot be matched: it must be above 0"):
        matched_alpha(lambda a: a, 0.0)


def test_factors_stay_factors(w):
    low = WeightDiff({n: LowRank(torch.ones(w.shape(n)[0], 2), torch.ones(2, w.shape(n)[1])) for n in w})
    assert all(isinstance(e, LowRank) for e in scaled_as(low, w).entries.values())
