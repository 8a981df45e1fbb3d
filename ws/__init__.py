"""ws: helpers for weight steering and for the subspaces that explain it (see docs/architecture.md)."""

__version__ = "0.1.0"
