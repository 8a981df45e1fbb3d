"""Weight steering, and the subspaces that explain it.

    w = theta_pos - theta_neg        W -> W + alpha w

Names are loaded when they are used. (docs/method.md; docs/architecture.md says where things live)
"""

import importlib
import os

# of numpy's and scipy's OpenBLAS, where they are not loaded yet: threads that spin after a product stall torch's on shared cores
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

__version__ = "0.2.0"

EXPORTS = {
    "LM": "ws.model.lm",
    "load_lm": "ws.model.lm",
    "Behavior": "ws.data",
    "load_behavior": "ws.data",
    "WeightDiff": "ws.diff.core",
    "load_diff": "ws.diff",
    "save_diff": "ws.diff.io",
    "PairConfig": "ws.train.pairs",
    "TrainConfig": "ws.train.lora",
    "train_diff": "ws.train.difference",
    "weight_steer": "ws.steer.weights",
    "alpha_sweep": "ws.steer.evaluate",
    "retention": "ws.causal.retention",
    "calibrate": "ws.steer.calibrate",
    "audit": "ws.use.audit",
    "export": "ws.use.export",
    "predict": "ws.gradient.predict",
    "candidate": "ws.subspaces.candidate",
    "candidates": "ws.subspaces.build",
    "Basis": "ws.subspaces.algebra",
    "pca": "ws.subspaces.algebra",
    "left_svd": "ws.subspaces.algebra",
    "score": "ws.explanation.scores",
    "explain": "ws.explanation.explain",
    "Explanation": "ws.explanation.result",
    "compare_seeds": "ws.stability.compare",
    "delta_svd": "ws.delta.measure",
    "fit_theta": "ws.theta.fitted",
}
__all__ = list(EXPORTS)


def __getattr__(name: str):
    if name not in EXPORTS:
        raise AttributeError(f"module 'ws' has no attribute {name!r}")
    found = getattr(importlib.import_module(EXPORTS[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *EXPORTS])
