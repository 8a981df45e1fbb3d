"""A causal language model: loading it and reading it by role, its texts, what its modules compute, what it writes."""

from ws.model.lm import LM, ROLES, SERVED, Decoder, load_lm
from ws.model.text import chat_text, encode, last_index, position_ids

__all__ = ["LM", "ROLES", "SERVED", "Decoder", "chat_text", "encode", "last_index", "load_lm", "position_ids"]
