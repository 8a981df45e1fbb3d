"""The textbook v7 sweep of bench/textbook.py gives the scores of `ws.explain`."""

import torch
import transformers

from bench import textbook
from ws.data import load_behavior


def test_the_textbook_sweep_gives_the_scores_of_explain(tmp_path, tokenizer):
    """On a random model with grouped heads, more than 8 of them, and a dense low-rank w on its two middle layers."""
    config = transformers.Qwen3Config(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=12, num_key_value_heads=4, head_dim=16,
        intermediate_size=256, vocab_size=600, tie_word_embeddings=True, pad_token_id=0, bos_token_id=None, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model, w = transformers.Qwen3ForCausalLM(config).float().eval(), {}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(p + 0.2 * torch.randn_like(p) if p.ndim == 1 else 3 * p)
            if p.ndim == 2 and ("layers.1." in name or "layers.2." in name):
                w[name] = 0.01 * torch.randn(len(p), 10) @ torch.randn(10, p.shape[1])
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    table, largest = textbook.check(tmp_path, w, load_behavior("sycophancy"), draws=8)
    assert len(table) == 4 * 44 and set(largest) == set(textbook.COMPARED) and max(largest.values()) < 1e-3
    part = table.filter(table["layer"].is_in([1, 2]))
    assert part["z_w_combined"].is_finite().all() and part["z_act"].is_finite().all()
    summary, write = textbook.summarise(table, w), part.filter(subspace="write")
    assert summary["joint_score"].is_sorted(descending=True) and len(summary) == 44
    assert abs(summary.filter(subspace="write")["mean_conc_act"].item() - write["conc_act"].mean()) < 1e-9
