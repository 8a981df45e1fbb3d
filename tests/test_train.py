"""Pairs and adapters: what the model is shown, what it is trained on, what the signs share, what is left behind."""

import copy
import json
import os
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

import ws.train.difference
import ws.train.lora
import ws.train.pairs
from tests.harm import HARMS, cut, flip
from ws.cache import files
from ws.cache.made import Damaged
from ws.cache.names import RunId
from ws.data import load_behavior
from ws.diff import LowRank, WeightDiff, load_diff, save_diff
from ws.model.generate import answers_and_cuts, complete, turn_end, write_answers
from ws.model.lm import load_lm
from ws.model.text import chat_text
from ws.steer.weights import weight_steer
from ws.train.difference import obtain_diff, train_diff
from ws.train.examples import cut_share, draw_pairs, make_example, response_loss, shuffle_labels
from ws.train.lora import ADAPTERS, TrainConfig, adapter_layers, train_adapter
from ws.train.pairs import Pair, PairConfig, from_file, make_pairs

SMALL = PairConfig(topics=3, samples=2, max_new_tokens=6, batch=5)
CFG = TrainConfig(pairs=SMALL, r=4, alpha=8, lr=1e-2, warmup_steps=1, max_steps=4, batch=4, accumulation=1)


@pytest.fixture(scope="module")
def lm(model_folder):
    return load_lm(str(model_folder("qwen3")), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def behavior(parity_folder):
    return load_behavior(parity_folder / "behavior.json")


@pytest.fixture(autouse=True)
def _out(tmp_path, monkeypatch):
    monkeypatch.setenv("WS_OUT", str(tmp_path / "out"))


@pytest.fixture
def rows():
    """Pairs whose two sides differ in one word, always the same way."""
    users = ["is it so?", "do you agree?", "am I right?", "what do you say?"]
    return tuple(Pair(t, 0, s, users[t], "Yes, sure.", "No, never.") for t in range(4) for s in range(5))


def test_default_layers_and_settings():
    cfg = TrainConfig()
    assert adapter_layers(28, cfg) == tuple(range(8, 22))
    assert (cfg.r, cfg.alpha, cfg.dropout, cfg.lr, cfg.weight_decay) == (32, 64, 0, 2e-4, 0.01)
    assert (cfg.warmup_steps, cfg.batch * cfg.accumulation, cfg.epochs, cfg.heldout) == (5, 16, 1, 0.1)
    pairs = cfg.pairs
    assert (pairs.samples, pairs.temperature, pairs.top_p, pairs.max_new_tokens) == (10, 0.7, 0.8, 128)
    assert adapter_layers(6, replace(cfg, layers=(2, 3, 4))) == (2, 3, 4)
    with pytest.raises(ValueError, match=r"adapter layers \[7\].*0..5"):
        adapter_layers(6, replace(cfg, layers=(7,)))
    with pytest.raises(ValueError, match="'ia3' is unknown"):
        TrainConfig(adapter="ia3")
    for given in ({"r": 0}, {"batch": -1}, {"lr": -1.0}, {"max_steps": 0}, {"epochs": 0.0}):
        with pytest.raises(ValueError, match=f"{next(iter(given)).upper()} = "):
            TrainConfig(**given)


def test_personas_are_shown_when_pairs_are_written(lm, behavior, tmp_path, monkeypatch):
    seen = []

    def answer(lm, prompts, max_new_tokens, temperature, top_p, seed):
        seen.append((prompts, seed))
        return [(f"answer {seed} {i}", False) for i in range(len(prompts))]

    monkeypatch.setattr(ws.train.pairs, "answers_and_cuts", answer)
    pairs = make_pairs(lm, behavior, SMALL, tmp_path, progress=False)
    personas = len(behavior.personas_pos)
    assert len(pairs.rows) == pairs.written == 3 * personas * 2
    for i in range(0, len(seen), 2):
        for prompts, system in ((seen[i][0], behavior.personas_pos), (seen[i + 1][0], behavior.personas_neg)):
            assert all(any(persona in prompt for persona in system) for prompt in prompts)
            assert all(prompt.endswith("<|im_start|>assistant\n") for prompt in prompts)
    assert len({seed for _, seed in seen}) == len(seen)
    order = [(r.topic, r.persona, r.sample) for r in pairs.rows]
    assert order == [(t, p, s) for t in range(3) for p in range(personas) for s in range(2)]
    first = pairs.rows[0]
    assert first.user == behavior.opinion_text(behavior.train_topics[0]) and first.user in seen[0][0][0]


def test_a_killed_run_of_pairs_continues(lm, behavior, tmp_path, monkeypatch):
    whole = make_pairs(lm, behavior, SMALL, tmp_path / "a", progress=False)
    generate, calls = lm.model.generate, []

    def killed(**options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return generate(**options)

    monkeypatch.setattr(lm.model, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        make_pairs(lm, behavior, SMALL, tmp_path / "b", progress=False)
    (chunk,) = (tmp_path / "b").rglob("chunk_*")
    again = make_pairs(lm, behavior, SMALL, tmp_path / "b", progress=False)
    # twelve rows in batches of five are three chunks of two sides; one whole chunk was there already
    assert len(calls) == 4 + 4 and again == whole
    assert make_pairs(lm, behavior, SMALL, tmp_path / "b", progress=False) == whole and len(calls) == 8
    assert {p.name for p in chunk.parent.iterdir()} == {"pairs.jsonl", ".made.pairs.jsonl.json"}


def test_a_damaged_chunk_is_written_again(lm, behavior, tmp_path, monkeypatch):
    whole = make_pairs(lm, behavior, SMALL, tmp_path / "a", progress=False)
    publish = files.publish

    def stopped(temporary, path):
        if path.name == "pairs.jsonl":
            raise KeyboardInterrupt
        return publish(temporary, path)

    monkeypatch.setattr(files, "publish", stopped)
    with pytest.raises(KeyboardInterrupt):
        make_pairs(lm, behavior, SMALL, tmp_path / "b", progress=False)
    monkeypatch.undo()
    chunks = sorted((tmp_path / "b").rglob("chunk_*"))
    flip(chunks[0])
    cut(chunks[1])
    assert len(chunks) == 3 and make_pairs(lm, behavior, SMALL, tmp_path / "b", progress=False) == whole


@pytest.mark.parametrize("harm", HARMS)
def test_damaged_pairs_are_written_again(lm, behavior, tmp_path, harm):
    whole = make_pairs(lm, behavior, SMALL, tmp_path, progress=False)
    (path,) = tmp_path.rglob("pairs.jsonl")
    content = path.read_bytes()
    harm(path)
    assert make_pairs(lm, behavior, SMALL, tmp_path, progress=False) == whole and path.read_bytes() == content


def canned(lm, prompts, *more):
    return [(f"{p} {more}", False) for p in prompts]


def test_pairs_belong_to_the_code_and_the_model_that_wrote_them(lm, behavior, tmp_path, monkeypatch):
    whole = make_pairs(lm, behavior, SMALL, tmp_path, progress=False)
    (path,) = tmp_path.rglob("pairs.jsonl")
    other = replace(lm, fingerprint="another")
    monkeypatch.setattr(ws.train.pairs, "answers_and_cuts", canned)
    changed = make_pairs(lm, behavior, SMALL, tmp_path, progress=False)
    assert changed != whole and len(list(tmp_path.rglob("pairs.jsonl"))) == 1
    assert make_pairs(other, behavior, SMALL, tmp_path, progress=False) == changed
    assert len(list(tmp_path.rglob("pairs.jsonl"))) == 2
    monkeypatch.undo()
    assert make_pairs(lm, behavior, SMALL, tmp_path, progress=False) == whole and path.is_file()


def test_useless_pairs_are_dropped_and_counted():
    def pair(a, b):
        return Pair(0, 0, 0, "u", a, b)

    pairs = ws.train.pairs.drop_useless([pair("a", "b"), pair("", "b"), pair("a", "  "), pair("same", "same ")])
    assert [(r.response_pos, r.response_neg) for r in pairs.rows] == [("a", "b")]
    assert (pairs.written, pairs.empty, pairs.identical) == (4, 2, 1)
    with pytest.raises(ValueError, match="two identical.*personas do not change"):
        ws.train.pairs.drop_useless([pair("x", "x")] * 3)
    with pytest.raises(ValueError, match="ends its turn at once"):
        ws.train.pairs.drop_useless([pair("", "x")] * 3)


def test_asking_for_too_much_is_named(lm, behavior, tmp_path):
    with pytest.raises(ValueError, match="99 training topics asked for, it has"):
        make_pairs(lm, behavior, replace(SMALL, topics=99), tmp_path, progress=False)
    with pytest.raises(ValueError, match="0 training personas"):
        make_pairs(lm, behavior, replace(SMALL, personas=0), tmp_path, progress=False)


def test_batch_and_padding_do_not_change_greedy_answers(lm):
    prompts = [chat_text(lm.tokenizer, text) for text in ("a", "a much longer question than the other one", "b c")]
    together = write_answers(lm, prompts, 6)
    assert together == [write_answers(lm, [prompt], 6)[0] for prompt in prompts]


def test_answers_leave_mode_and_random_state_and_need_no_template(model_folder):
    plain = load_lm(str(model_folder("llama")), "float32", "cpu")
    plain.tokenizer.chat_template = None
    plain.model.train()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    sampled = [write_answers(plain, ["a b"], 8, temperature=1.0, seed=seed)[0] for seed in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2] and torch.equal(torch.rand(3), expected) and plain.model.training
    assert complete(plain, ["a b"], 8) == write_answers(plain, ["a b"], 8, seed=5)
    assert turn_end(plain.tokenizer) == plain.tokenizer.eos_token


def test_only_the_response_is_learnt_and_no_persona_is_shown(lm, rows, behavior):
    end = turn_end(lm.tokenizer)
    assert end == "<|im_end|>"
    for sign, text in (("pos", "Yes, sure."), ("neg", "No, never.")):
        example = make_example(lm, rows[0], sign, ("", end), 512)
        prompt = chat_text(lm.tokenizer, rows[0].user)
        learnt = [t for t in example["labels"] if t != -100]
        assert lm.tokenizer.decode(learnt) == text + end
        assert lm.tokenizer.decode(example["input_ids"]) == prompt + text + end
        n = example["labels"].count(-100)
        assert lm.tokenizer.decode(example["input_ids"][:n]) == prompt and "system" not in prompt
    with pytest.raises(ValueError, match="topic 0: the prompt alone has"):
        make_example(lm, rows[0], "pos", ("", end), 5)


def test_padding_has_no_loss(lm, rows):
    examples = [make_example(lm, row, "pos", ("", "<|im_end|>"), 512) for row in rows[::5]]
    one = [response_loss(lm.model, [e], 1) for e in examples]
    counts = [sum(t != -100 for t in e["labels"]) for e in examples]
    mean = sum(a * b for a, b in zip(one, counts, strict=True)) / sum(counts)
    assert response_loss(lm.model, examples, 4) == pytest.approx(mean, rel=1e-4)


def test_shuffled_labels_swap_about_half(rows):
    many = rows * 20
    shuffled = shuffle_labels(many, 0)
    swapped = [a.response_pos != b.response_pos for a, b in zip(many, shuffled, strict=True)]
    assert 0.4 < sum(swapped) / len(swapped) < 0.6
    assert all(
        {a.response_pos, a.response_neg} == {b.response_pos, b.response_neg}
        for a, b in zip(many, shuffled, strict=True)
    )
    assert shuffle_labels(many, 0) == shuffled != shuffle_labels(many, 1)


def snapshot(model):
    state = {k: v.clone() for k, v in model.state_dict().items()}
    return state, [(n, id(m)) for n, m in model.named_modules()], set(vars(model)), model.config.to_dict()


def test_pairs_are_drawn_anew_within_topic_and_persona(rows):
    """By another road: each place holds a training pair of its own topic and persona, the held-out places what they had."""
    many = tuple(replace(row, persona=s % 2, sample=s) for s in range(10) for row in rows)
    train = [i for i in range(len(many)) if i % 7]
    drawn, distinct = draw_pairs(many, train, 0)
    held = [i for i in range(len(many)) if i % 7 == 0]
    assert [drawn[i] for i in held] == [many[i] for i in held] and len(drawn) == len(many)
    for i in train:
        assert (drawn[i].topic, drawn[i].persona) == (many[i].topic, many[i].persona)
    pool = {id(many[i]) for i in train}
    assert all(id(drawn[i]) in pool for i in train)
    assert distinct == len({id(drawn[i]) for i in train}) / len(train) and 0.5 < distinct < 0.75  # 1 - 1/e is .63
    assert draw_pairs(many, train, 0)[0] == drawn != draw_pairs(many, train, 1)[0]
    counts = [sum(draw_pairs(many, train, seed)[0][j] is many[train[0]] for j in train) for seed in range(40)]
    assert abs(sum(counts) / 40 - 1) < 4 * (1 / 40) ** 0.5  # a pair is drawn once on average


def shown(lm, rows, sign, seed, cfg, folder, monkeypatch) -> tuple[list, list, dict]:
    """The examples that a training sees and holds out, and its record, without the training itself."""
    seen = []
    monkeypatch.setattr(ws.train.lora, "response_loss", lambda model, held, batch: seen.append(held) or 0.0)
    monkeypatch.setattr(ws.train.lora, "_fit", lambda model, train, *more: seen.append(train) or [0.0])
    record = train_adapter(lm, rows, sign, seed, cfg, folder, progress=False)
    return seen[1], seen[0], record


@pytest.mark.parametrize("null", [False, True])
def test_seeds_draw_other_pairs_and_signs_the_same(lm, rows, tmp_path, monkeypatch, null):
    rows = tuple(replace(r, sample=i, response_pos=f"Yes {i}.", response_neg=f"No {i}.") for i, r in enumerate(rows))
    cfg = replace(CFG, resample_pairs=True, shuffle_labels=null)

    def numbers(examples) -> list[int]:
        texts = [lm.tokenizer.decode([i for i in e["labels"] if i >= 0]) for e in examples]
        return [int("".join(c for c in text if c.isdigit())) for text in texts]

    found = {}
    for seed in (0, 1):
        for sign in ("pos", "neg"):
            train, held, record = shown(lm, rows, sign, seed, cfg, tmp_path / f"{sign}{seed}", monkeypatch)
            found[sign, seed], kept = numbers(train), set(numbers(held))
            assert len(train) == record["n_train"] == 18 and not kept & set(found[sign, seed])
            assert record["resampled"] and record["distinct_pairs"] == len(set(found[sign, seed])) / 18 < 1
            plain, also, off = shown(
                lm, rows, sign, seed, replace(cfg, resample_pairs=False), tmp_path / "x", monkeypatch
            )
            assert numbers(also) == numbers(held) and numbers(plain) == sorted(set(range(20)) - kept)
            assert not off["resampled"] and off["distinct_pairs"] == 1
        assert found["pos", seed] == found["neg", seed]
    assert found["pos", 0] != found["pos", 1]
    labelled, *_ = shown(lm, rows, "pos", 0, cfg, tmp_path / "l", monkeypatch)
    signs = ["Yes" in lm.tokenizer.decode([i for i in e["labels"] if i >= 0]) for e in labelled]
    assert all(signs) if not null else 0 < sum(signs) < len(signs)


def test_what_none_means_depends_on_the_samples_and_is_one_training(lm, behavior, rows, monkeypatch):
    """None is on from five samples; None and what it means have one key, the other value another one."""
    cfgs = {n: replace(CFG, pairs=replace(SMALL, samples=n)) for n in (4, 5)}
    assert not cfgs[4].resampled and cfgs[5].resampled
    pairs = ws.train.pairs.Pairs(rows, len(rows), 0, 0)
    monkeypatch.setattr(ws.train.difference, "make_pairs", lambda *_: pairs)
    keys = {}

    def key_of(params, **options):
        if "sign" in params:
            keys[current].append((str(real(params, **options)), "resample" in str(params["train"])))
        return real(params, **options)

    real = ws.train.difference.stage_key
    monkeypatch.setattr(ws.train.difference, "stage_key", key_of)
    monkeypatch.setattr(ws.train.difference, "_finished", lambda *_: True)
    monkeypatch.setattr(ws.train.difference, "load_diff", lambda _: WeightDiff({}, {}))
    for n, cfg in cfgs.items():
        for given in (None, True, False):
            keys[current := (n, given)] = []
            train_diff(lm, behavior, config=replace(cfg, resample_pairs=given), finished="x", progress=False)
    assert keys[4, None] == keys[4, False] == keys[5, False] != keys[4, True]
    assert keys[5, None] == keys[5, True] == keys[4, True]
    assert not any(named for _, named in keys[4, None])  # adapters trained without the choice keep their key


def test_with_it_off_the_adapter_is_the_one_of_before(lm, rows, tmp_path):
    """Few samples, None: the bytes of a training on the pairs as they stand; with it on, other bytes."""
    rows, made = tuple(replace(row, response_pos=f"Yes, {i}.") for i, row in enumerate(rows)), {}
    for name, given in {"none": None, "off": False, "on": True}.items():
        train_adapter(lm, rows, "pos", 0, replace(CFG, resample_pairs=given), tmp_path / name, progress=False)
        made[name] = (tmp_path / name / "adapter_model.safetensors").read_bytes()
    assert made["none"] == made["off"] != made["on"]


@pytest.mark.parametrize("kind", ADAPTERS)
def test_base_is_left_untouched_and_bytes_repeat(lm, rows, tmp_path, kind):
    cfg = replace(CFG, adapter=kind)
    lm.model.lm_head.weight.requires_grad_(False)
    state, modules, attributes, config = snapshot(lm.model)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    record = train_adapter(lm, rows, "pos", 0, cfg, tmp_path / "a", progress=False)
    assert torch.equal(torch.rand(3), expected), "the caller's random state moved"
    assert all(torch.equal(v, state[k]) for k, v in lm.model.state_dict().items())
    assert snapshot(lm.model)[1:] == (modules, attributes, config) and not lm.model.training
    assert not lm.model.lm_head.weight.requires_grad and lm.model.model.norm.weight.requires_grad
    lm.model.lm_head.weight.requires_grad_(True)
    assert record["heldout_loss_after"] < record["heldout_loss_before"] and len(record["loss_trace"]) == 4
    train_adapter(lm, rows, "pos", 0, cfg, tmp_path / "b", progress=False)
    for name in ("adapter_model.safetensors", "adapter_config.json", "training.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_base_is_left_untouched_when_training_fails(lm, rows, tmp_path, monkeypatch):
    state, modules, attributes, config = snapshot(lm.model)

    def fails(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(ws.train.lora, "_fit", fails)
    with pytest.raises(KeyboardInterrupt):
        train_adapter(lm, rows, "pos", 0, replace(CFG, adapter="pissa"), tmp_path, progress=False)
    assert all(torch.equal(v, state[k]) for k, v in lm.model.state_dict().items())
    assert snapshot(lm.model)[1:] == (modules, attributes, config)


def test_signs_share_all_but_the_responses(lm, rows, tmp_path, monkeypatch):
    seen = {}
    collate = ws.train.lora.collate

    def recorded(batch):
        seen.setdefault(sign, []).append([row["input_ids"][: row["labels"].count(-100)] for row in batch])
        return collate(batch)

    monkeypatch.setattr(ws.train.lora, "collate", recorded)
    still = replace(CFG, lr=0.0)
    for sign in ("pos", "neg"):
        train_adapter(lm, rows, sign, 0, still, tmp_path / sign, progress=False)
    assert seen["pos"] == seen["neg"]  # same split, same order
    pos, neg = (load_file(tmp_path / sign / "adapter_model.safetensors") for sign in ("pos", "neg"))
    assert all(torch.equal(pos[k], neg[k]) for k in pos)  # same initial factors
    sign = "other"
    train_adapter(lm, rows, "pos", 1, still, tmp_path / "other", progress=False)
    other = load_file(tmp_path / "other" / "adapter_model.safetensors")
    assert not any(torch.equal(pos[k], other[k]) for k in pos if "lora_A" in k) and seen["other"] != seen["pos"]


def test_a_long_run_goes_on_from_its_checkpoint(lm, rows, tmp_path, monkeypatch):
    from transformers import Trainer

    cfg = replace(CFG, checkpoint_steps=2)
    train_adapter(lm, rows, "pos", 0, cfg, tmp_path / "a" / "pos", progress=False)
    step = Trainer.training_step
    calls = []

    def killed(self, *args, **kwargs):
        calls.append(self.state.global_step)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train_adapter(lm, rows, "pos", 0, cfg, tmp_path / "b" / "pos", progress=False)
    train_adapter(lm, rows, "pos", 0, cfg, tmp_path / "b" / "pos", progress=False)
    assert calls == [0, 1, 2, 3, 2, 3]
    a, b = (load_file(tmp_path / x / "pos" / "adapter_model.safetensors") for x in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not list(tmp_path.rglob("checkpoint*"))


@pytest.fixture
def goes_on(lm, rows, tmp_path, monkeypatch):
    """After a run that was killed at its fourth step: `goes_on(lm=, rows=)` gives the steps that the next try makes."""
    from transformers import Trainer

    cfg, step, calls = replace(CFG, checkpoint_steps=1), Trainer.training_step, []

    def counted(self, *args, **kwargs):
        calls.append(self.state.global_step)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    def again(lm=lm, rows=rows):
        before = len(calls)
        train_adapter(lm, rows, "pos", 0, cfg, tmp_path / "pos", progress=False)
        return calls[before:]

    monkeypatch.setattr(Trainer, "training_step", counted)
    with pytest.raises(KeyboardInterrupt):
        again()
    return again


def test_a_checkpoint_of_the_same_run_is_gone_on_from(goes_on):
    assert goes_on() == [3]


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_checkpoint_is_not_gone_on_from(goes_on, tmp_path, harm):
    old, new = sorted(tmp_path.rglob("checkpoint-*"))
    harm(new / "optimizer.pt")
    flip(old / "adapter_model.safetensors")
    assert goes_on() == [0, 1, 2, 3]


def test_a_checkpoint_before_a_damaged_one_serves(goes_on, tmp_path):
    flip(max(tmp_path.rglob("checkpoint-*")) / "adapter_model.safetensors")
    assert goes_on() == [2, 3]


@pytest.mark.parametrize("change", ["pairs", "weights", "code"])
def test_a_checkpoint_of_something_else_is_not_gone_on_from(goes_on, lm, rows, monkeypatch, change):
    if change == "code":
        shuffled = ws.train.lora.shuffle_labels
        monkeypatch.setattr(ws.train.lora, "shuffle_labels", lambda rows, seed: shuffled(rows, seed))
    others = tuple(replace(row, response_pos="Yes, fine.") for row in rows) if change == "pairs" else rows
    assert goes_on(replace(lm, fingerprint="another") if change == "weights" else lm, others) == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ADAPTERS)
def test_w_steers_towards_what_the_positive_side_says(lm, behavior, rows, tmp_path, monkeypatch, kind):
    """Planted: the sides differ in Yes / No alone, so alpha w must move log P(Yes) - log P(No) up, -alpha w down."""
    monkeypatch.setattr(ws.train.difference, "make_pairs", lambda *_: ws.train.pairs.Pairs(rows, len(rows), 0, 0))
    w = train_diff(lm, behavior, kind, config=replace(CFG, max_steps=8), progress=False)
    prompt = chat_text(lm.tokenizer, "an unseen question")
    ids = torch.tensor([lm.tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    yes, no = (lm.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("Yes", "No"))

    def score(alpha):
        with torch.no_grad(), weight_steer(lm.model, w, alpha):
            out = lm.model(ids).logits[0, -1].log_softmax(-1)
        return float(out[yes] - out[no])

    assert score(-1) < score(0) - 0.1 and score(1) > score(0) + 0.1
    assert w.layers() == [1] and len(w.names) == 7 and w.meta["adapter"] == kind and w.meta["seed"] == 0
    if kind != "dora":
        assert all(isinstance(e, LowRank) and e.rank <= 2 * 4 for e in w.entries.values())


def test_finished_parts_are_not_made_again(lm, behavior, tmp_path, monkeypatch):
    train, made = ws.train.difference.train_adapter, []

    def counted(lm, rows, sign, seed, cfg, folder, progress=True):
        made.append(sign)
        if len(made) == 2:
            raise KeyboardInterrupt
        return train(lm, rows, sign, seed, cfg, folder, progress)

    monkeypatch.setattr(ws.train.difference, "train_adapter", counted)
    with pytest.raises(KeyboardInterrupt):
        train_diff(lm, behavior, config=CFG, progress=False)
    recipe = ws.train.difference.recipe(ws.train.difference._typed(lm, behavior, CFG))
    folder = RunId(lm.name, behavior.name, f"lora{recipe}", 0).folder()
    assert [p.name for p in (folder / "adapters").iterdir() if not p.name.startswith(".")] == ["pos"]
    w = train_diff(lm, behavior, config=CFG, progress=False)
    train_diff(lm, behavior, config=CFG, progress=False)
    assert made == ["pos", "neg", "neg"]
    other = train_diff(lm, behavior, config=replace(CFG, max_steps=2), progress=False)
    assert made == ["pos", "neg", "neg", "pos", "neg"]  # another recipe, another folder: the first one stays
    assert load_diff(folder).fingerprint == w.fingerprint != other.fingerprint
    read = train_diff(lm, behavior, config=CFG, folder=tmp_path / "by hand", finished=folder, progress=False)
    assert len(made) == 5 and not (tmp_path / "by hand").exists() and read.fingerprint == w.fingerprint
    null = train_diff(lm, behavior, null=True, config=CFG, progress=False)
    assert null.meta["null"] and (folder / "null_diff" / "w.safetensors").is_file()
    assert not torch.equal(null.dense(w.names[0]), w.dense(w.names[0]))
    record = json.loads((folder / "adapters" / "pos" / "training.json").read_text())
    assert record["n_train"] + record["n_heldout"] == w.meta["pairs"]
    again = load_diff((folder / "adapters" / "pos", folder / "adapters" / "neg"))
    flip(folder / "w.safetensors")
    stored = train_diff(lm, behavior, config=CFG, folder=folder, progress=False)
    assert all(torch.equal(again.dense(n), stored.dense(n)) for n in stored.names) and len(made) == 7


def test_adapters_follow_model_and_pairs_survive_new_code_and_notice_damage(lm, behavior, tmp_path, monkeypatch, capfd):
    """Planted: the training is a stand-in that says what it was given."""
    given = []

    def train(lm, rows, sign, seed, cfg, folder, progress):
        given.append((sign, lm.fingerprint, rows[0].response_pos))
        folder.mkdir(exist_ok=True)
        (folder / "adapter").write_text(f"{given[-1]}")

    monkeypatch.setattr(ws.train.difference, "train_adapter", train)
    monkeypatch.setattr(ws.train.difference, "_join", lambda *_: WeightDiff({}, {}))

    def steps(lm=lm, **options):
        before = len(given)
        train_diff(lm, behavior, config=CFG, folder=tmp_path / "run", progress=False, **options)
        return [sign for sign, *_ in given[before:]]

    assert steps() == ["pos", "neg"] and steps() == []
    flip(tmp_path / "run" / "adapters" / "neg" / "adapter")
    assert steps() == ["neg"]
    assert steps(replace(lm, fingerprint="another")) == ["pos", "neg"] and given[-1][1] == "another"
    assert steps() == ["pos", "neg"]
    monkeypatch.setattr(ws.train.pairs, "answers_and_cuts", canned)
    assert steps() == ["pos", "neg"]
    capfd.readouterr()
    monkeypatch.setattr(ws.train.lora, "_wrap", lambda *_: None)
    assert steps() == [] and "training code changed" in "".join(capfd.readouterr())
    flip(tmp_path / "run" / "adapters" / "neg" / "adapter")
    assert steps() == ["pos", "neg"]  # not an adapter of today's code beside one of yesterday's
    assert steps(retrain=True) == ["pos", "neg"] and steps() == []


def test_a_damaged_diff_or_adapter_is_not_read(lm, behavior, tmp_path):
    train_diff(lm, behavior, config=CFG, folder=tmp_path, progress=False)
    whole, sides = (tmp_path / "w.safetensors").read_bytes(), (tmp_path / "adapters/pos", tmp_path / "adapters/neg")
    flip(tmp_path / "w.safetensors")
    with pytest.raises(Damaged, match="w.safetensors: damaged"):
        load_diff(tmp_path)
    flip(sides[0] / "adapter_model.safetensors")
    with pytest.raises(Damaged, match="adapters/pos: damaged"):
        obtain_diff(lm, behavior, 0, CFG, tmp_path / "own", adapters=sides)
    assert not (tmp_path / "own" / "w.safetensors").exists()
    train_diff(lm, behavior, config=CFG, folder=tmp_path, progress=False)
    assert (tmp_path / "w.safetensors").read_bytes() == whole and load_diff(sides).names


def test_a_difference_of_zero_is_refused_by_name(lm, behavior, tmp_path):
    name = lm.decoder.param_name(1, "o")
    save_diff(WeightDiff({name: torch.zeros_like(lm.decoder.weight(1, "o"))}, {}), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"w\.safetensors: the weight difference is 0 everywhere"):
        obtain_diff(lm, behavior, 0, CFG, tmp_path, w_path=tmp_path / "w.safetensors")


@pytest.fixture
def stand_ins(lm, behavior, rows, tmp_path, monkeypatch):
    """`train(lr)` in a folder where a training is a stand-in that writes what it was given; w says what both wrote."""

    def write(lm, rows, sign, seed, cfg, folder, progress):
        folder.mkdir(exist_ok=True)
        (folder / "adapter").write_text(f"{sign} {cfg.lr}")

    def join(pos, neg, base, meta):
        texts = [(side / "adapter").read_text() for side in (pos, neg)]
        return WeightDiff({"a.weight": torch.tensor([[float(text.split()[1])] for text in texts])}, meta)

    monkeypatch.setattr(ws.train.difference, "train_adapter", write)
    monkeypatch.setattr(ws.train.difference, "from_adapters", join)
    monkeypatch.setattr(ws.train.difference, "make_pairs", lambda *_: ws.train.pairs.Pairs(rows, len(rows), 0, 0))
    folder = tmp_path / "run"

    def train(lr, **more):
        return train_diff(lm, behavior, config=replace(CFG, lr=lr), folder=folder, progress=False, **more)

    return train, folder


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def finished(folder):
    """What lies at the places where others look for it."""
    found = content(folder)
    return {k: v for k, v in found.items() if ".next" not in k.parts and not k.name.startswith(".")}


@pytest.mark.parametrize("retrain", [False, True], ids=["settings", "retrain"])
@pytest.mark.parametrize("fails", ["pos", "neg", "join"])
def test_a_training_that_fails_leaves_what_is_finished(stand_ins, monkeypatch, fails, retrain):
    train, folder = stand_ins
    train(0.5)
    before, lr = finished(folder), 0.5 if retrain else 0.25
    write, join = ws.train.difference.train_adapter, ws.train.difference.from_adapters
    begun = []

    def broken(lm, rows, sign, *more):
        begun.append(sign)
        if sign == fails:
            raise OSError("no space left on device")
        write(lm, rows, sign, *more)

    def unjoined(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ws.train.difference, "train_adapter", broken)
    if fails == "join":
        monkeypatch.setattr(ws.train.difference, "from_adapters", unjoined)
    with pytest.raises((OSError, KeyboardInterrupt)):
        train(lr, retrain=retrain)
    assert finished(folder) == before and len(before) == 3
    fails = ""
    monkeypatch.setattr(ws.train.difference, "from_adapters", join)
    w = train(lr, retrain=retrain)
    assert w["a.weight"].tolist() == [[lr], [lr]] and begun.count("pos") + begun.count("neg") in (2, 3)
    assert torch.equal(load_diff(folder)["a.weight"], w["a.weight"]) and not (folder / ".next").exists()
    begun.clear()
    assert train(lr).meta == w.meta and not begun
    if not retrain:
        assert finished(folder) != before and train(0.5)["a.weight"].tolist() == [[0.5], [0.5]]
        assert finished(folder) == before


@pytest.mark.parametrize("n", [0, 1, 3, 5])
def test_a_kill_between_the_renames_is_finished_by_the_same_command(stand_ins, monkeypatch, n):
    """Two renames for each adapter, w's record and w: killed before the n-th."""
    train, folder = stand_ins
    train(0.5)
    inner, calls, trained = ws.train.difference._publish, [], []
    real = {name: getattr(os, name) for name in ("rename", "replace")}

    def step(name, *paths):
        calls.append(name)
        if len(calls) > n:
            raise KeyboardInterrupt
        return real[name](*paths)

    def publish(where):
        with pytest.MonkeyPatch.context() as patch:
            for name in real:
                patch.setattr(ws.train.difference.os, name, partial(step, name))
            return inner(where)

    monkeypatch.setattr(ws.train.difference, "_publish", publish)
    with pytest.raises(KeyboardInterrupt):
        train(0.25)
    monkeypatch.setattr(ws.train.difference, "_publish", inner)
    monkeypatch.setattr(ws.train.difference, "train_adapter", lambda *given: trained.append(given))
    w = train(0.25)
    assert not trained, "what was finished was trained again"
    assert w["a.weight"].tolist() == [[0.25], [0.25]] and not (folder / ".next").exists()
    assert len(finished(folder)) == 3


def test_a_training_that_diverges_is_an_error_and_leaves_what_is_finished(lm, behavior, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(ws.train.difference, "make_pairs", lambda *_: ws.train.pairs.Pairs(rows, len(rows), 0, 0))
    train_diff(lm, behavior, config=replace(CFG, max_steps=1), folder=tmp_path / "run", progress=False)
    before = finished(tmp_path / "run")
    with pytest.raises(ValueError, match="lora pos seed 0: diverged, the loss is not finite at step .*lower LR"):
        train_diff(lm, behavior, config=replace(CFG, lr=1e30, max_steps=2), folder=tmp_path / "run", progress=False)
    assert finished(tmp_path / "run") == before


def test_what_cannot_work_is_told_before_a_pair_is_written(lm, behavior, monkeypatch):
    def never(*_):
        raise AssertionError("pairs were written")

    monkeypatch.setattr(ws.train.difference, "make_pairs", never)

    def refused(message, behavior=behavior, lm=lm, **options):
        with pytest.raises(ValueError, match=message):
            train_diff(lm, behavior, progress=False, **{"config": CFG, **options})

    words = replace(behavior, yes=("Supercalifragilistic",))
    refused("answer words 'Supercalifragilistic': none is a single token", words)
    refused("SEED = -1: a seed is a whole number from 0 to 4294967295", seed=-1)
    refused(r"adapter layers \[7\]", config=replace(CFG, layers=(7,)))
    refused("99 training topics asked for", config=replace(CFG, pairs=replace(SMALL, topics=99)))
    bare = replace(lm, tokenizer=copy.deepcopy(lm.tokenizer))
    bare.tokenizer.chat_template = None
    refused("no chat template", lm=bare)


def test_two_behaviours_do_not_share_a_folder(lm, behavior, rows, monkeypatch):
    monkeypatch.setattr(ws.train.difference, "make_pairs", lambda *_: ws.train.pairs.Pairs(rows, len(rows), 0, 0))
    few = replace(CFG, max_steps=1)
    train_diff(lm, replace(behavior, name="my view"), config=few, progress=False)
    with pytest.raises(ValueError, match="my_view/lora.*/seed_0: belongs to behaviour 'my view'; rename 'my_view'"):
        train_diff(lm, replace(behavior, name="my_view"), config=few, progress=False)


def test_an_answer_may_hold_any_separator(tmp_path):
    answer = "one\u2028two\x85three\u2029four"
    pairs = ws.train.pairs.Pairs((Pair(0, 0, 0, "u", answer, "no"),), 1, 0, 0)
    ws.train.pairs.write_pairs(pairs, tmp_path / "pairs.jsonl")
    assert ws.train.pairs.read_pairs(tmp_path / "pairs.jsonl") == pairs
    (tmp_path / "pairs.jsonl").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"pairs\.jsonl: not a file of training pairs: line 1: .*nested too deep"):
        ws.train.pairs.read_pairs(tmp_path / "pairs.jsonl")


def test_pairs_of_a_name_with_blanks_lie_beside_its_adapters(lm, behavior, tmp_path):
    make_pairs(lm, replace(behavior, name="my <view>"), replace(SMALL, topics=1, samples=1), tmp_path, progress=False)
    (path,) = tmp_path.rglob("pairs.jsonl")
    assert path.parent.name.startswith("my__view") and "<" not in path.parent.name


def test_a_finished_diff_whose_bytes_changed_is_made_anew_not_read(lm, behavior, tmp_path):
    """As a run does it: what is finished is looked for in the very folder that it goes to."""
    folder = tmp_path / "seed_0"
    want = train_diff(lm, behavior, config=CFG, folder=folder, progress=False).fingerprint  # before its file changes
    content = (folder / "w.safetensors").read_bytes()
    (folder / "w.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    again = train_diff(lm, behavior, config=CFG, folder=folder, finished=folder, progress=False)
    assert again.fingerprint == want and (folder / "w.safetensors").read_bytes() == content


def test_an_answer_that_was_cut_has_no_end_of_turn(lm, rows):
    end = turn_end(lm.tokenizer)
    (mark,) = lm.tokenizer(end, add_special_tokens=False)["input_ids"]
    cut = replace(rows[0], cut_pos=True)
    examples = [make_example(lm, row, sign, ("", end), 512) for row in (rows[0], cut) for sign in ("pos", "neg")]
    assert [e["labels"][-1] == mark for e in examples] == [True, True, False, True]
    assert [e["input_ids"][-1] == mark for e in examples] == [True, True, False, True]
    both = rows[0], cut
    assert cut_share(both, "pos", examples[::2], 512) == 0.5 and cut_share(both, "neg", examples[1::2], 512) == 0
    short = make_example(lm, rows[0], "pos", ("", end), len(examples[0]["labels"]) - 1)
    assert mark not in short["labels"] and cut_share(rows[:1], "pos", [short], len(short["labels"])) == 1
    (swapped,) = {r for r in shuffle_labels((cut,) * 40, 0) if r != cut}
    assert swapped.cut_neg and not swapped.cut_pos and swapped.response_neg == cut.response_pos


def test_an_answer_of_one_word_that_was_written_is_not_told_as_cut(lm, tmp_path):
    pairs = from_file(load_behavior("sycophancy"), PairConfig(file="sycophancy")).rows
    assert any(row.cut_pos for row in pairs)
    for sign in ("pos", "neg"):
        examples = [make_example(lm, row, sign, ("", turn_end(lm.tokenizer)), 512) for row in pairs]
        assert cut_share(pairs, sign, examples, 512) == 0


def test_what_is_cut_is_told_as_it_is_written(lm, monkeypatch):
    """Planted: a model that ends one answer at its second token and never the other; the shorter row is padded."""
    end = lm.tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"]
    yes = lm.tokenizer("Yes", add_special_tokens=False)["input_ids"][:1]

    def generate(input_ids, **more):
        new = torch.tensor([[*yes, *end, *end, *end], yes * 4, [*yes * 3, *end]])
        return torch.cat([input_ids, new], dim=1)

    monkeypatch.setattr(lm.model, "generate", generate)
    found = answers_and_cuts(lm, ["a", "b", "c"], 4)
    assert [cut for _, cut in found] == [False, True, False]
    assert write_answers(lm, ["a", "b", "c"], 4) == [text for text, _ in found]
    assert "im_end" not in "".join(text for text, _ in found)


def test_kept_pairs_hold_what_was_cut(lm, behavior, tmp_path):
    pairs = make_pairs(lm, behavior, SMALL, tmp_path, progress=False)
    assert {type(r.cut_pos) for r in pairs.rows} == {bool} and any(r.cut_pos or r.cut_neg for r in pairs.rows)
    assert make_pairs(lm, behavior, SMALL, tmp_path, progress=False) == pairs
