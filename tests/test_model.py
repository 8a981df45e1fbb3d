"""Loading and reading models of every served family; chat templates of every kind; padding."""

import json

import pytest
import torch
from conftest import CHATML, FAMILIES, random_model

from ws.cache import models, names
from ws.model.decoder import Decoder
from ws.model.lm import load_lm
from ws.model.text import chat_text, encode, last_index, position_ids


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_loads_from_a_folder_and_is_read_by_role(family, model_folder):
    lm = load_lm(str(model_folder(family)), "float32", "cpu")
    dec = lm.decoder
    assert (dec.n_layers, dec.d, dec.n_heads, dec.n_kv, dec.vocab) == (3, 48, 4, 2, 600)
    assert dec.linear(1, "o").weight.shape == (48, 4 * dec.head_dim)
    names = dict(lm.model.named_parameters())
    for role in ("q", "k", "v", "o", "gate", "up", "down"):
        assert torch.equal(names[dec.param_name(1, role)].float(), dec.weight(1, role))
    assert lm.name.startswith(model_folder(family).name + "-")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_norm_gains_are_what_the_block_really_applies(family, model_folder):
    """Scaling a normed direction by the reported gain gives the norm's own output, 1 + g of Gemma included."""
    lm = load_lm(str(model_folder(family)), "float32", "cpu")
    block = lm.decoder.blocks[1]
    x = torch.randn(5, 48)
    unit = x / x.square().mean(dim=1, keepdim=True).add(1e-6).sqrt()
    modules = {
        "attn_in": getattr(block, "input_layernorm", None),
        "mlp_in": getattr(block, "pre_feedforward_layernorm", None)
        or (None if family == "olmo2" else block.post_attention_layernorm),
        "attn_out": block.post_attention_layernorm if family in ("gemma2", "gemma3", "olmo2") else None,
        "mlp_out": getattr(block, "post_feedforward_layernorm", None),
    }
    for where, module in modules.items():
        gain = lm.decoder.norm_gain(1, where)
        expected = torch.ones(48) if module is None else module(x).detach() / unit
        assert torch.allclose(gain.expand_as(expected), expected, rtol=1e-3, atol=1e-4), where


def test_gpt2_is_refused_by_name():
    import transformers

    gpt2 = transformers.AutoModelForCausalLM.from_config(transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2))
    with pytest.raises(ValueError, match="GPT2LMHeadModel: no list of blocks with self_attn and mlp"):
        Decoder(gpt2)


def test_fused_projections_are_refused_with_what_is_missing():
    import transformers

    options = dict(hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=99)
    phi = transformers.AutoModelForCausalLM.from_config(transformers.Phi3Config(pad_token_id=0, **options))
    with pytest.raises(ValueError, match="lacks self_attn.q_proj, .*served are"):
        Decoder(phi)


def test_loading_errors_name_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such model folder"):
        load_lm(str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        load_lm(str(tmp_path))
    with pytest.raises(ValueError, match="DTYPE 'int8' is unknown"):
        load_lm("tiny", "int8")
    for device in ("cuda:99", "gpu"):
        with pytest.raises(ValueError, match=f"DEVICE '{device}' is not available here; choose among auto, cpu"):
            load_lm("tiny", device=device)


def test_a_model_that_is_nowhere_is_named(monkeypatch):
    def offline(*_, **__):
        raise OSError("no connection")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", offline)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", offline)
    with pytest.raises(
        FileNotFoundError, match="^MODEL_ID 'org/absent' at revision v2: no local folder.*: no connection$"
    ):
        load_lm("org/absent", revision="v2")


def test_dtype_and_fingerprint(model_folder):
    folder = str(model_folder("llama"))
    half, full = load_lm(folder, "bfloat16", "cpu"), load_lm(folder, "float32", "cpu")
    assert half.model.dtype == torch.bfloat16 and half.decoder.weight(0, "q").dtype == torch.float32
    assert half.fingerprint != full.fingerprint


def test_model_slug(tmp_path, model_folder):
    assert models.model_slug("tiny") == "tiny"
    assert models.model_slug("Qwen/Qwen3-0.6B") == "Qwen__Qwen3-0.6B"
    a, b = tmp_path / "a" / "m", tmp_path / "b" / "m"
    for folder, size in ((a, 1), (b, 2)):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"hidden_size": size}))
    assert models.model_slug(str(a)) != models.model_slug(str(b))
    assert names.RunId("m", "b", "lora", 3).folder(tmp_path) == tmp_path / "m" / "b" / "lora" / "seed_3"


class Templated:
    """The few members of a tokenizer that chat_text uses, with real jinja rendering."""

    def __new__(cls, tokenizer, template):
        import copy

        clone = copy.deepcopy(tokenizer)
        clone.chat_template = template
        return clone


def test_plain_chatml(tokenizer):
    assert chat_text(tokenizer, "hi", "be kind") == (
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    done = chat_text(tokenizer, "hi", assistant="yes")
    assert done == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"


def test_thinking_is_switched_off(tokenizer):
    thinking = CHATML + "{% if enable_thinking is not defined or enable_thinking %}<think>{% else %}<quiet>{% endif %}"
    text = chat_text(Templated(tokenizer, thinking), "hi")
    assert "<quiet>" in text and "<think>" not in text


def test_a_template_that_rejects_the_system_role_gets_it_before_the_users_text(tokenizer):
    strict = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    text = chat_text(Templated(tokenizer, strict), "hi", "be kind")
    assert text == "<user>be kind\n\nhi</><assistant>"


def test_a_template_that_drops_the_system_role_gets_it_too(tokenizer):
    deaf = "{% for m in messages %}{% if m['role'] != 'system' %}<{{ m['role'] }}>{{ m['content'] }}</>{% endif %}{% endfor %}"
    assert "be kind" in chat_text(Templated(tokenizer, deaf), "hi", "be kind")


def test_an_error_that_is_the_templates_own_is_not_swallowed(tokenizer):
    broken = "{{ messages[0]['content'].nothing() }}"
    with pytest.raises(Exception, match="nothing"):
        chat_text(Templated(tokenizer, broken), "hi")


def test_no_template_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="no chat template"):
        chat_text(Templated(tokenizer, None), "hi")


def test_encode_pads_either_side_and_last_finds_the_same_token(tokenizer):
    texts = ["hello", "a much longer text than that", "mid length text"]
    right = encode(tokenizer, texts, True)
    left = encode(tokenizer, texts, True, padding_side="left")
    for i in range(3):
        a = right[0][i, last_index(right[1])[i]]
        b = left[0][i, last_index(left[1])[i]]
        assert a == b == tokenizer(texts[i])["input_ids"][-1]
        assert position_ids(left[1])[i, last_index(left[1])[i]] == position_ids(right[1])[i, last_index(right[1])[i]]
    assert encode(tokenizer, texts, True, max_length=4)[0].shape == (3, 4)
    with pytest.raises(ValueError, match="no text to encode"):
        encode(tokenizer, [], True)


def test_sink_token_is_bos_or_else_eos(model_folder, tokenizer):
    lm = load_lm(str(model_folder("qwen3")), device="cpu")
    assert lm.decoder.sink_token(tokenizer) == tokenizer.eos_token_id == 2


def test_unembedding_bias_is_reported():
    model = random_model("llama")
    assert Decoder(model).unembed_bias() is None
    model.lm_head = torch.nn.Linear(48, 600, bias=True)
    assert Decoder(model).unembed_bias().shape == (600,)
