"""What a subspace explains of w: the one score path, from captures to tables, words and figures."""
