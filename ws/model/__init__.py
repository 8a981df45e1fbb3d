"""A causal language model: loading it and reading it by role, its texts, what its modules compute, what it writes."""
