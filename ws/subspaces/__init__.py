"""Subspaces of the residual stream: their algebra, the candidates, what they are built from, the bases that are kept."""
