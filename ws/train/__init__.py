"""Training: answers of the base model under personas, one LoRA for one sign and seed, the whole way to w."""
