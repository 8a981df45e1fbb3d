"""A head on a live model: exact effect on the logits, nothing at theta = 0, gone on exit, refusals."""

import pytest
import torch

from tests.conftest import random_model
from ws.model.generate import complete
from ws.model.lm import load_lm
from ws.theta import heads as H
from ws.theta import report
from ws.theta.fitted import ThetaFits
from ws.theta.live import check_plain_logits, wear
from ws.theta.states import prompt_text

NAMES = ["cvh", "unconditional", "svd_cvh", "svd_unconditional", "lm_head_cvh", "lm_head_svd", "lm_head_random"]


@pytest.fixture(scope="module")
def llama():
    return random_model("llama")


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 600, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NAMES)
def test_worn_head_adds_gamma_times_its_logit_delta(llama, ids, name):
    W = llama.get_output_embeddings().weight.detach()
    head = H.all_heads(W, D=8, alpha=0.3)[name]
    theta = torch.randn(8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        base, h = llama(ids).logits, llama.model(ids).last_hidden_state
        with wear(llama, head, theta, gamma=0.5):
            worn = llama(ids).logits
        after = llama(ids).logits
    assert torch.allclose(worn, base + 0.5 * head.logit_delta(h, theta, W), atol=1e-4)
    assert (worn - base).abs().max() > 1e-3
    assert torch.equal(after, base)


@pytest.mark.parametrize("name", ["cvh", "unconditional", "lm_head_random"])
def test_each_text_of_a_batch_wears_its_own_theta(llama, ids, name):
    head = H.all_heads(llama.get_output_embeddings().weight.detach(), D=8, alpha=3.0)[name]
    thetas = torch.randn(2, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), wear(llama, head, thetas, gamma=0.5):
        together = llama(ids).logits
        written = llama.generate(ids, max_new_tokens=4, do_sample=False)
    for i, theta in enumerate(thetas):
        with torch.no_grad(), wear(llama, head, theta, gamma=0.5):
            assert torch.allclose(llama(ids[i : i + 1]).logits[0], together[i], atol=1e-4)
            assert torch.equal(llama.generate(ids[i : i + 1], max_new_tokens=4, do_sample=False)[0], written[i])
    with wear(llama, head, thetas), pytest.raises(ValueError, match="2 thetas for a batch of 1 texts"):
        llama(ids[:1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_theta_zero_is_bit_identical_to_no_head(ids, name, dtype):
    model = random_model("qwen3").to(dtype)
    W = model.get_output_embeddings().weight.detach()
    head = H.all_heads(W, D=8, alpha=0.3)[name]
    with torch.no_grad():
        base = model(ids).logits
        with wear(model, head, torch.zeros(8), gamma=0.5):
            assert torch.equal(model(ids).logits.view(torch.uint8), base.view(torch.uint8))
        with wear(model, head, torch.full((8,), 0.3), gamma=0.5):
            assert model(ids).logits.dtype == dtype and not torch.equal(model(ids).logits, base)


def test_generation_runs_with_a_head_and_the_hook_is_gone_after_an_exception(llama, ids):
    """A shift along one word's unembedding row, large enough, makes every generated token that word."""
    W, word = llama.get_output_embeddings().weight.detach(), 77
    head = H.Unconditional((W[word] / W[word].norm())[:, None].clone(), alpha=1.0)
    base = llama.generate(ids, max_new_tokens=4, do_sample=False)
    with wear(llama, head, torch.tensor([1e4])):
        worn = llama.generate(ids, max_new_tokens=4, do_sample=False)
    assert (worn[:, ids.shape[1] :] == word).all()
    with pytest.raises(RuntimeError, match="inside"):
        with wear(llama, head, torch.tensor([1e4])):
            raise RuntimeError("inside")
    assert torch.equal(llama.generate(ids, max_new_tokens=4, do_sample=False), base)


def test_the_unembedding_s_bias_stays(ids):
    model = random_model("llama")
    module = model.get_output_embeddings()
    module.bias = torch.nn.Parameter(torch.randn(600, generator=torch.Generator().manual_seed(4)))
    W, theta = module.weight.detach(), torch.ones(8)
    for head in H.all_heads(W, D=8, alpha=0.3).values():
        with torch.no_grad():
            base, h = model(ids).logits, model.model(ids).last_hidden_state
            with wear(model, head, theta):
                assert torch.allclose(model(ids).logits, base + head.logit_delta(h, theta, W), atol=1e-4)
        assert torch.allclose(base, h @ W.T + module.bias, atol=1e-4)


def test_what_does_not_fit_is_refused_before_anything_is_hooked(llama):
    W = llama.get_output_embeddings().weight.detach()
    head = H.cvh(48, 8)
    capped = random_model("gemma2")
    wrong = [
        (capped, head, torch.ones(8), "Gemma2.*final_logit_softcapping = 30"),
        (llama, head, torch.ones(7), r"theta has shape \(7,\), expected \(8,\)"),
        (llama, head, torch.full((8,), torch.nan), "not finite"),
        (llama, H.cvh(50, 8), torch.ones(8), "width 50, the model's is 48"),
        (llama, H.lm_head_random(599, 48, 8), torch.ones(8), "vocabulary of 599, the model has 600"),
    ]
    for model, bad, theta, message in wrong:
        with pytest.raises(ValueError, match=message):
            with wear(model, bad, theta):
                pass
        assert not model.get_output_embeddings()._forward_pre_hooks
    with pytest.raises(ValueError, match="vocabulary of 599"):
        H.lm_head_random(599, 48, 8).readout(W)
    with pytest.raises(ValueError, match="width 47"):
        H.unconditional(48, 8).features(torch.ones(3, 47))
    llama.config.logit_scale = 0.0625
    with pytest.raises(ValueError, match="logit_scale = 0.0625"):
        check_plain_logits(llama)
    del llama.config.logit_scale
    assert check_plain_logits(random_model("gemma3")) is not None


def test_samples_of_all_strengths_at_once_are_those_of_one_theta_after_another(monkeypatch):
    """More users than go into a batch, prompts of other lengths, two heads; strong enough that other tokens come."""
    lm = load_lm("tiny")
    heads = H.all_heads(lm.decoder.unembed(), D=8, alpha=40.0)
    users = [f"u{i}" for i in range(5)]
    gen = torch.Generator().manual_seed(3)
    thetas = {(u, n): torch.randn(8, generator=gen) for u in users for n in ("cvh", "lm_head_random")}

    class Drawn(ThetaFits):
        def __init__(self):
            self.__dict__["heads"] = heads

        def theta(self, user, head, solver="adam"):
            return thetas[user, head]

    found = Drawn()
    prompts = {u: "Is it so? " * (i + 1) for i, u in enumerate(users)}
    monkeypatch.setattr(report, "TOGETHER", 2)
    table = report.samples(lm, prompts, found, ["cvh", "lm_head_random"], [0.5, 2.0], 6)
    columns = ["cvh, gamma 0.5", "cvh, gamma 2", "lm_head_random, gamma 0.5", "lm_head_random, gamma 2"]
    assert table.columns == ["user", "prompt", "base", *columns] and table["user"].to_list() == users
    changed = 0
    for i, user in enumerate(users):
        asked = [prompt_text(lm, prompts[user])]
        assert table["base"][i] == complete(lm, asked, 6)[0]
        for column in columns:
            name, _, gamma = column.partition(", gamma ")
            with wear(lm.model, heads[name], thetas[user, name], float(gamma)):
                assert table[column][i] == complete(lm, asked, 6)[0], (user, column)
            changed += table[column][i] != table["base"][i]
    assert changed > 5
