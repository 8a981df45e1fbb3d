"""Shared fixtures: run-time checked shapes for all of ws, small random models of several families, the parity data."""

import signal
import sys
from pathlib import Path

import pytest
import torch
from checked import install

install()
sys.modules.setdefault("rfc3987_syntax", None)  # as `ws.runs.need` has it, for tests that import nbformat first

DATA = Path(__file__).parent / "data"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


LONG = "notebooks howto train theta_cumulants audit wheel verdict causal_batch gradient causal engine delta".split()


def pytest_collection_modifyitems(items):
    """Files that take longest come first, so that workers end together (`--dist loadfile`)."""
    place = {f"test_{name}.py": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONG)))


@pytest.fixture(scope="session", autouse=True)
def _quiet():
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.set_num_threads(1)


@pytest.fixture
def pythons_own_handler():
    """KeyboardInterrupt on SIGINT, whatever another test's imports made of it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def parity_folder() -> Path:
    """The project's copy of the reference model, diff, behaviour and numbers."""
    return DATA / "parity"


@pytest.fixture(scope="session")
def tokenizer(parity_folder):
    """Byte-level BPE of 600 tokens with a ChatML template and no BOS."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(parity_folder / "model")


FAMILIES = {
    "qwen3": ("Qwen3Config", {"head_dim": 24, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {}),
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {}),
    "gemma2": ("Gemma2Config", {"head_dim": 24}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 24}),
    "olmo2": ("Olmo2Config", {}),
}


def random_model(family: str, layers: int = 3, d: int = 48, vocab: int = 600, seed: int = 0, **more):
    """A small random model of a served family: d wide, 4 heads, 2 key/value heads."""
    import transformers

    name, options = FAMILIES[family]
    config = getattr(transformers, name)(
        hidden_size=d,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=2 * d,
        vocab_size=vocab,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
        **{**options, **more},
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():  # random gains: a norm whose gain is one would hide a missing gain
        for n, p in model.named_parameters():
            if "norm" in n:
                p.add_(0.2 * torch.randn_like(p))
            elif p.ndim == 2:
                p.mul_(3.0)
    return model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer):
    """`model_folder(family, **options)`: a saved random model with the parity tokenizer, as a user's local folder."""
    made = {}

    def make(family: str, **options) -> Path:
        key = (family, tuple(sorted(options.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(f"model_{family}")
            random_model(family, **options).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make
