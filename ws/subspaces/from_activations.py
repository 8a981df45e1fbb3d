"""Candidates read off base activations: clean probes, persona contrasts, attention-selected tokens, clusters,
rotations. A contrast is `persona_pos - persona_neg`, probe by probe, at the last token. (docs/method.md section 5;
those of source v7b mend one named defect each, section 7)"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ws.subspaces.algebra import Basis, compose, cut_at_rank, empty, left_svd, pca, uncentred
from ws.subspaces.candidate import candidate
from ws.subspaces.materials import Materials
from ws.subspaces.tokens import Tokens, common_suffix, of_tokens, token_contrast

TINY = 1e-12
TIED = "two distances that decide the clusters are the same within rounding"
PROMPTS, PERSONAS = ("weights", "prompts"), ("weights", "prompts", "personas")
Weight = Callable[[Tensor, Tensor], Tensor]  # of both attention rows


def _growth(m: Materials) -> Tensor:
    """`D = |h_{l+1}| - |h_l|` elementwise over the clean probes, `(L-1, n, d)`."""
    size = m.base.clean.resid.double().abs()
    return size[1:] - size[:-1]


@candidate(family="act:clean", source="v5", sees=PROMPTS, shared=True)
def suppressed(m: Materials) -> Basis:
    """PCA over clean probes of min(sum_l relu(D), sum_l relu(-D)), D the growth of |h| from layer to layer: what is
    written and then erased."""
    D = _growth(m)
    return pca(torch.minimum(D.relu().sum(dim=0), (-D).relu().sum(dim=0)), m.k, m.rounding(m.base.clean.resid))


@candidate(family="act:clean", source="v5", sees=PROMPTS, shared=True)
def amplified(m: Materials) -> Basis:
    """PCA over clean probes of relu(|h_last| - |h_first|)."""
    size = m.base.clean.resid.double().abs()
    return pca((size[-1] - size[0]).relu(), m.k, m.rounding(size[-1], size[0]))


@candidate(family="act:clean", source="external-v6-plan", sees=PROMPTS, shared=True)
def added_features(m: Materials) -> Basis:
    """PCA over clean probes of sum_l relu(D), D the growth of |h| from layer to layer."""
    return pca(_growth(m).relu().sum(dim=0), m.k, m.rounding(m.base.clean.resid))


@candidate(family="act:baseline", source="v5", sees=PROMPTS, shared=True)
def global_clean_resid_pca(m: Materials) -> Basis:
    """PCA over all clean probes and layers."""
    return m.pca(m.base.clean.resid.flatten(0, 1))


@candidate(family="act:baseline", source="v5", sees=PERSONAS, shared=True)
def global_persona_resid_pca(m: Materials) -> Basis:
    """PCA over all probes and layers under both personas together."""
    return m.pca(torch.cat([m.base.pos.resid.flatten(0, 1), m.base.neg.resid.flatten(0, 1)]))


@candidate(family="act:baseline", source="v5", sees=PROMPTS)
def layer_clean_resid_pca(m: Materials, l: int) -> Basis:
    """PCA over the clean probes at the layer."""
    return m.pca(m.base.clean.resid[l])


def _sides(m: Materials, l: int, what: str = "resid") -> list[Tensor]:
    return [getattr(acts, what)[l].double() for acts in (m.base.pos, m.base.neg)]


@candidate(name="TaskDiff_contrast", family="act:persona", source="v5", sees=PERSONAS)
def task_diff(m: Materials, l: int) -> Basis:
    """PCA of the persona contrast at the last token."""
    return _centred(m, *_sides(m, l))


def _centred(m: Materials, pos: Tensor, neg: Tensor) -> Basis:
    return pca(pos - neg, m.k, m.rounding(pos, neg))


def _attention_selected(m: Materials, t: Tokens, weight: Weight) -> Basis:
    if t.which.numel() < 2:
        return empty(m.d, f"{t.which.numel()} sample(s): nothing to centre")
    return of_tokens(m, t, weight(t.a, t.b) + TINY, t.which, centred=True)


def _apart(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs()


@candidate(family="act:attn-selected", source="external-v6-plan", sees=PERSONAS)
def attn_min_taskdiff(m: Materials, l: int) -> Basis:
    """PCA of the token-wise persona contrast, rows weighted by sqrt of the smaller of both attention weights."""
    return _attention_selected(m, token_contrast(m, l), torch.minimum)


@candidate(family="act:attn-selected", source="external-v6-plan", sees=PERSONAS)
def attn_max_taskdiff(m: Materials, l: int) -> Basis:
    """PCA of the token-wise persona contrast, rows weighted by sqrt of the larger of both attention weights."""
    return _attention_selected(m, token_contrast(m, l), torch.maximum)


@candidate(family="act:attn-selected", source="external-v6-plan", sees=PERSONAS)
def attn_diff_taskdiff(m: Materials, l: int) -> Basis:
    """PCA of the token-wise persona contrast, rows weighted by sqrt of the difference of both attention weights."""
    return _attention_selected(m, token_contrast(m, l), _apart)


@candidate(family="act:attn-selected", source="external-v6-plan", sees=PERSONAS)
def attn_min_x_diffnorm_taskdiff(m: Materials, l: int) -> Basis:
    """As attn_min_taskdiff with the weight times the contrast's norm over its mean non-zero norm at the layer."""
    t = token_contrast(m, l)
    norm = t.D.norm(dim=1)[t.which]
    scale = norm.sum() / ((norm > 0).sum() + TINY)
    return _attention_selected(m, t, lambda a, b: torch.minimum(a, b) * norm / (scale + TINY))


@candidate(family="act:up_proj", source="v5", sees=PERSONAS)
def up_proj_input_contrast(m: Materials, l: int) -> Basis:
    """PCA of the persona contrast at the input of up_proj."""
    return _centred(m, *_sides(m, l, "up_in"))


@candidate(family="act:up_proj", source="v5", sees=PERSONAS)
def up_proj_output_written_contrast(m: Materials, l: int) -> Basis:
    """PCA of the persona contrast of W_down W_up x, the MLP's output without its gate."""
    return _centred(m, *_up_written(m, l))


def _up_written(m: Materials, l: int) -> list[Tensor]:
    w = m.layer(l)
    return [(x.to(w.up_wide) @ w.up_wide.T) @ w.down_wide.T for x in _sides(m, l, "up_in")]


@candidate(family="act:MLP", source="external-v6-plan", sees=PROMPTS)
def gate_active_written(m: Materials, l: int) -> Basis:
    """PCA over clean probes of what the MLP writes, (act(W_gate x) * (W_up x)) W_down^T."""
    w = m.layer(l)
    x = m.base.clean.up_in[l].to(w.up_wide)
    return m.pca((m.decoder.act(x @ w.gate_wide.T) * (x @ w.up_wide.T)) @ w.down_wide.T)


@candidate(family="act:cluster", source="external-v6-plan", sees=PERSONAS)
def chars_clusters(m: Materials, l: int) -> Basis:
    """PCA of 8 k-means centroids of the clean and persona rows minus their mean (rank 7: the eighth direction is
    arbitrary)."""
    return _clusters(m, l, cut=False)


def _clusters(m: Materials, l: int, cut: bool) -> Basis:
    rows = torch.cat([m.base.clean.resid[l], m.base.pos.resid[l], m.base.neg.resid[l]]).double()
    noise = m.rounding(rows.norm(dim=1).topk(min(8, len(rows))).values)
    centroids, margin = kmeans(rows - rows.mean(dim=0))
    basis = pca(centroids, m.k, noise)
    basis = cut_at_rank(basis, noise) if cut else basis
    return basis if margin > noise.norm else replace(basis, ill_conditioned=True, turn=1.0, note=TIED)


def kmeans(rows: Tensor) -> tuple[Tensor, float]:
    """8 centroids after 8 Lloyd steps from the 8 rows of largest norm; an empty cluster keeps its centroid. And the least
    difference of two distances (of two norms, at the start) that decided."""
    norms, order = rows.norm(dim=1).sort(descending=True, stable=True)
    margin = float(norms[7] - norms[8]) if len(rows) > 8 else float("inf")
    centroids = rows[order[:8]].clone()
    for _ in range(8):
        distances = torch.cdist(rows, centroids)
        first = distances.topk(min(2, len(centroids)), dim=1, largest=False).values
        margin = min(margin, float((first[:, -1] - first[:, 0]).min()))
        nearest = distances.argmin(dim=1)
        for c in nearest.unique():
            centroids[c] = rows[nearest == c].mean(dim=0)
    return centroids, margin


@candidate(family="act:clean", source="v5", sees=PROMPTS)
def churn(m: Materials, l: int) -> Basis:
    """PCA over clean probes of what the next block adds (nothing after the last: its directions are arbitrary)."""
    clean = m.base.clean.resid.double()
    return _centred(m, clean[min(l + 1, m.n_layers - 1)], clean[l])


@candidate(family="act:rotation", source="v5", sees=PERSONAS)
def rotation_contrast(m: Materials, l: int) -> Basis:
    """Planes of the Procrustes rotation from negative- to positive-persona states: top 8 left singular vectors of
    R - R^T inside the joint PCA (arbitrary on the null space of the cross-covariance: turned as little as can be)."""
    return _rotation(m, l, determined=False)


def _rotation(m: Materials, l: int, determined: bool) -> Basis:
    Y, X = _sides(m, l)
    J = m.pca(torch.cat([X, Y]), min(32, 2 * len(X) - 2, m.d))
    if J.rank < 2:
        return empty(m.d, "the joint PCA has under 2 directions")
    frame = J.B.double()
    X_r, Y_r = (X - X.mean(dim=0)) @ frame, (Y - Y.mean(dim=0)) @ frame
    U, s, Vh = torch.linalg.svd(X_r.T @ Y_r)
    q = int((s > 1e-5 * s[0]).sum()) if float(s[0]) > 0 else 0
    if q == 0 and determined:
        return empty(m.d, "the cross-covariance is zero")
    R = U[:, :q] @ Vh[:q]
    if q < J.rank and not determined:  # between both null spaces: the turn nearest to none, whatever bases span them
        A, _, Bh = torch.linalg.svd(U[:, q:].T @ Vh[q:].T)
        R = R + U[:, q:] @ A @ Bh @ Vh[q:]
    # noise of u_i^T X_r^T Y_r v_j, and what it does to R: over s_i + s_j inside the rank, s_i - s_j across its edge
    noise = m.rounding(X).norm * (Y_r @ Vh.T).norm(dim=0)[None] + m.rounding(Y).norm * (X_r @ U).norm(dim=0)[:, None]
    noise = noise / (len(X) ** 0.5 + m.d**0.5)  # one entry's, where all together have that spectral norm
    apart = torch.where(torch.arange(len(s)) < q, s, -s)
    noise = replace(m.rounding(X), norm=2 * float((noise[:q] / (s[:q, None] + apart).clamp(min=1e-30)).norm()))
    turn = left_svd(R - R.T, m.k, noise)
    turn = cut_at_rank(turn, noise) if determined else turn
    found = compose(frame @ turn.B.double(), turn, Basis(J.B, turn=J.turn, most=J.most))
    arbitrary = not determined and q < J.rank
    note = f"cross-covariance of rank {q} under {J.rank}: R is arbitrary on its null space" if arbitrary else found.note
    return replace(found, s=turn.s, ill_conditioned=found.ill_conditioned or arbitrary, note=note)


# What the sound protocol adds. Each says which defect of the one above it mends.


@candidate(name="TaskDiff_uncentred", family="act:persona", source="v7b", sees=PERSONAS)
def task_diff_uncentred(m: Materials, l: int) -> Basis:
    """Top 8 directions of the row-normalised persona contrast, not centred. Mends TaskDiff_contrast, whose centring
    removes the mean difference: the steering direction itself."""
    return _uncentred(m, *_sides(m, l))


def _uncentred(m: Materials, pos: Tensor, neg: Tensor) -> Basis:
    return uncentred(pos - neg, m.k, (pos.square().sum(dim=1) + neg.square().sum(dim=1)).sqrt(), m.rounding)


@candidate(family="act:up_proj", source="v7b", sees=PERSONAS)
def up_proj_input_uncentred(m: Materials, l: int) -> Basis:
    """Top 8 directions of the row-normalised persona contrast at up_proj's input, not centred. Mends
    up_proj_input_contrast."""
    return _uncentred(m, *_sides(m, l, "up_in"))


@candidate(family="act:up_proj", source="v7b", sees=PERSONAS)
def up_written_uncentred(m: Materials, l: int) -> Basis:
    """Top 8 directions of the row-normalised contrast of W_down W_up x, not centred. Mends
    up_proj_output_written_contrast."""
    return _uncentred(m, *_up_written(m, l))


def _common_selected(m: Materials, l: int, weight: Weight) -> Basis:
    t = token_contrast(m, l)
    shared = [common_suffix(p, q) for p, q in zip(m.base.pos.ids, m.base.neg.ids, strict=True)]
    keep = torch.arange(-t.which.shape[1], 0)[None, :] >= -torch.tensor(shared)[:, None]
    weights, which = weight(t.a, t.b)[keep] + TINY, t.which[keep]
    if not len(weights):
        return empty(m.d, "the persona texts share no token at their end")
    return of_tokens(m, t, weights, which, centred=False)


@candidate(family="act:attn-selected", source="v7b", sees=PERSONAS)
def attn_min_common(m: Materials, l: int) -> Basis:
    """Top 8 directions of the token-wise contrast over the common suffix of both texts, weighted as attn_min_taskdiff,
    not centred. Mends attn_min_taskdiff, which includes padding and tokens that only one side has."""
    return _common_selected(m, l, torch.minimum)


@candidate(family="act:attn-selected", source="v7b", sees=PERSONAS)
def attn_max_common(m: Materials, l: int) -> Basis:
    """As attn_min_common with the larger of both attention weights. Mends attn_max_taskdiff."""
    return _common_selected(m, l, torch.maximum)


@candidate(family="act:attn-selected", source="v7b", sees=PERSONAS)
def attn_diff_common(m: Materials, l: int) -> Basis:
    """As attn_min_common with the difference of both attention weights. Mends attn_diff_taskdiff."""
    return _common_selected(m, l, _apart)


@candidate(family="act:cluster", source="v7b", sees=PERSONAS)
def chars_clusters_cut(m: Materials, l: int) -> Basis:
    """chars_clusters cut at the numerical rank of its centroids. Mends the arbitrary eighth direction."""
    return _clusters(m, l, cut=True)


@candidate(family="act:rotation", source="v7b", sees=PERSONAS)
def rotation_cut(m: Materials, l: int) -> Basis:
    """As rotation_contrast with R = U_q V_q^T, q the numerical rank of the cross-covariance. Mends rotation_contrast,
    whose R is arbitrary on the null space: its score is rounding noise."""
    return _rotation(m, l, determined=True)
