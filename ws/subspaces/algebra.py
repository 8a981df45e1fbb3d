"""Linear algebra on low-rank subspaces of R^d; knows nothing of models.

A basis is a `d x r` matrix with orthonormal columns, `P = B B^T`. Everything is computed in float64 (but products of weights in
bfloat16) and stored in float32. Top-k singular subspaces of a wide matrix `M` come from the eigenvectors of its
Gram `M M^T` (the same subspace, cheaper), and only the leading eigenpairs are computed. (docs/method.md section 4)
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ws.subspaces.eigen import SMALL, eigenpairs, gram, top_eigh
from ws.subspaces.noise import FLOAT32_EPS, MOST_TURN, NONE, Noise, as_noise, rounding

QR_TOLERANCE = 1e-5  # columns of a QR with |R_ii| at or below this are dropped
RANK_TOLERANCE = 1e-5  # singular values below this fraction of the largest are rounding noise of float32 samples
WITHIN_ROUNDING = "the gap at the cut is within rounding"
TURNS = "rounding may turn it by {:.1g} rad"


@dataclass(frozen=True)
class Basis:
    """An orthonormal basis with what is known of how its data determine it.

    B: `(d, r)` float32. s: `(r,)` singular values behind the columns, empty for composed bases. gap: relative gap
    `(s_r - s_{r+1}) / s_r` at the cut, NaN where nothing was cut. ill_conditioned: the data do not determine the
    subspace (beyond their rank, `eps s_1 / (s_r - s_{r+1})` exceeds 0.01 rad, or `turn` exceeds `most`). note: why a
    basis is empty or arbitrary. turn: bound in rad on what rounding of the activations behind it turns it by, and of
    the weights in half precision; 0 where there are none. most: 0.001, in half precision 0.01.

    Examples:
        >>> import torch, ws
        >>> ws.Basis(torch.eye(6)[:, :2]).rank
        2
    """

    B: Float[Tensor, "d r"]
    s: Float[Tensor, " q"] = field(default_factory=lambda: torch.zeros(0))
    gap: float = float("nan")
    ill_conditioned: bool = False
    note: str = ""
    turn: float = 0.0
    most: float = MOST_TURN

    def __repr__(self) -> str:
        gap = f", gap {self.gap:.2g}" if self.gap == self.gap else ""
        doubt = ", ill-conditioned" if self.ill_conditioned else ""
        return f"Basis(d {self.d}, rank {self.rank}{gap}{doubt}{': ' if self.note else ''}{self.note})"

    @property
    def d(self) -> int:
        return self.B.shape[0]

    @property
    def rank(self) -> int:
        return self.B.shape[1]


def empty(d: int, note: str) -> Basis:
    """A basis without columns, with the reason."""
    return Basis(torch.zeros(d, 0), note=note)


def _cut(s: Float[Tensor, " q"], k: int, d: int, noise: Noise) -> tuple[int, float, bool, str, float]:
    """rank, gap, ill_conditioned, note and turn of keeping k of d directions of a spectrum s (largest first, with one past
    the cut where there is one)."""
    if k == 0 or len(s) == 0 or float(s[0]) <= 0:
        return 0, float("nan"), k > 0, "no signal: the directions are arbitrary" if k else "", float(k > 0)
    rank = int((s[:k] > RANK_TOLERANCE * s[0]).sum())
    if rank < k:
        return rank, 0.0, True, f"data of rank {rank}: {k - rank} of {k} directions are arbitrary", 1.0
    if k == d:
        return k, float("nan"), False, "", 0.0
    cut = len(s) > k
    distance = float(s[k - 1] - s[k]) if cut else float(s[k - 1])
    turn = noise.turn(s, k, d)
    ill = FLOAT32_EPS * float(s[0]) > 0.01 * distance or turn > noise.most
    gap = distance / float(s[k - 1]) if cut else float("nan")
    return k, gap, ill, TURNS.format(turn) if turn > noise.most else WITHIN_ROUNDING if ill else "", turn


def _basis(B: Tensor, s: Tensor, k: int, noise: Noise) -> Basis:
    """A basis of the first k columns; s holds one value past the cut where there is one. Directions past the rank are not
    what a decomposition leaves there, which rounding decides, but those of `complement`."""
    rank, gap, ill, note, turn = _cut(s, k, len(B), noise)
    if rank < k:
        B = torch.cat([B[:, :rank], complement(B[:, :rank], k - rank)], dim=1)
    return Basis(B[:, :k].float().cpu(), s[:k].float().cpu(), gap, ill, note, turn, noise.most)


def gram_basis(G: Float[Tensor, "d d"], k: int, bottom: bool = False, noise: float | Noise = NONE) -> Basis:
    """Top-k eigenvectors of a positive semidefinite matrix; `s` are the square roots of its eigenvalues. bottom: the k
    of least eigenvalues instead, smallest first; the gap is `(s_{k+1} - s_k) / s_{k+1}`. noise: of what G is the Gram
    of, spectral norm (`rounding`) or `Noise`; float32 weights have none."""
    d, noise = G.shape[0], as_noise(noise)
    if not bottom:
        values, vectors = top_eigh(G, k, noise.needs_all, noise.hides(G, k))
        return _basis(vectors, values.clamp(min=0).sqrt(), min(k, d), noise)
    values, vectors = eigenpairs(G.double(), 0, min(k, d - 1), every=noise.needs_all)
    s = values.clamp(min=0).sqrt()
    if k >= d:
        return Basis(vectors.float().cpu(), s.float().cpu(), most=noise.most)
    distance = float(s[k] - s[k - 1])
    turn = noise.turn(s, k, d) if distance > 0 else float(noise.norm + noise.sigma > 0)
    ill = FLOAT32_EPS * float(top_eigh(G, 1)[0][0].clamp(min=0).sqrt()) > 0.01 * distance or turn > noise.most
    gap, note = distance / float(s[k]) if s[k] > 0 else float("nan"), WITHIN_ROUNDING if ill else ""
    return Basis(vectors[:, :k].float().cpu(), s[:k].float().cpu(), gap, ill, note, turn, noise.most)


def left_svd(M: Float[Tensor, "d m"], k: int, noise: float | Noise | None = None) -> Basis:
    """Top `min(k, d, m)` left singular vectors. Directions past the rank of M are arbitrary but orthonormal. noise: of
    M, spectral norm: `rounding` of the activations it was computed from (default of itself), 0 for weights; or `Noise`.

    Examples:
        >>> import torch, ws
        >>> basis = ws.left_svd(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 2)
        >>> basis.s.tolist(), round(basis.gap, 2)
        ([3.0, 2.0], 0.5)
    """
    M = M.double()
    d, m = M.shape
    k = min(k, d, m)
    if k == 0:
        return empty(d, "no data")
    noise = as_noise(rounding(M) if noise is None else noise)
    if min(d, m) <= SMALL:
        return _basis(*torch.linalg.svd(M, full_matrices=False)[:2], k, noise)
    if d <= m:
        return gram_basis(gram(M), k, noise=noise)
    values, V = top_eigh(G := gram(M.T), k, noise.needs_all, noise.hides(G, k))
    s = values.clamp(min=0).sqrt()
    keep = s[:k] > 1e-7 * s[0]
    return _basis(torch.linalg.qr((M @ V[:, keep.to(V.device)]) / s[:k][keep].to(V)).Q, s, k, noise)


def pca(X: Float[Tensor, "n d"], k: int, noise: float | Noise | None = None) -> Basis:
    """Top `min(k, n, d)` principal directions of the rows (centred); empty for one row or none. noise: of X, spectral
    norm; default `rounding(X)`, too little where X is a difference.

    Past the rank of the centred samples the directions are arbitrary but orthonormal, and `note` says so.

    Examples:
        >>> import torch, ws
        >>> ws.pca(torch.tensor([[0.0, 1.0], [0.0, 3.0], [0.0, 5.0]]), 1).B.abs().flatten().tolist()
        [0.0, 1.0]
    """
    if len(X) <= 1:
        return empty(X.shape[1], f"{len(X)} sample(s): nothing to centre")
    X = X.double()
    return left_svd((X - X.mean(dim=0)).T, k, rounding(X) if noise is None else noise)


def uncentred(
    X: Float[Tensor, "n d"],
    k: int,
    size: Float[Tensor, " n"] | None = None,
    noise: Callable[[Tensor], object] = rounding,
) -> Basis:
    """Top-k directions of the rows, each scaled to unit length, without centring; zero rows are left out. size: norm of
    the activations behind each row, default the row's own (too little where it is a difference). noise: of norms."""
    X = X.double()
    norms = X.norm(dim=1)
    some = norms > 0
    if not some.any():
        return empty(X.shape[1], "all differences are zero")
    return left_svd((X[some] / norms[some, None]).T, k, noise((norms if size is None else size)[some] / norms[some]))


def cut_at_rank(basis: Basis, noise: float | Noise = NONE) -> Basis:
    """The directions that the samples determine: those with `s_i > 1e-5 s_1`. noise: of the samples, as in `left_svd`."""
    if basis.rank == 0 or float(basis.s[0]) <= 0:
        return empty(basis.d, "no signal")
    rank = int((basis.s > RANK_TOLERANCE * basis.s[0]).sum())
    if rank == basis.rank:
        return basis
    _, _, ill, why, turn = _cut(basis.s.double(), rank, basis.d, noise := as_noise(noise))
    note = "; ".join(filter(None, (f"cut at the samples' rank {rank}", why)))
    return Basis(basis.B[:, :rank], basis.s[:rank], 1.0, ill, note, turn, noise.most)


def orthonormalize(M: Float[Tensor, "d m"]) -> Float[Tensor, "d r"]:
    """Q of the unpivoted QR without the columns whose |R_ii| <= 1e-5, float32. A dropped column is taken out before the
    next is looked at: Householder's Q has an arbitrary column in its place, which would otherwise take away from
    independent columns to its right."""
    M = M.double()
    while M.shape[1]:
        Q, R = torch.linalg.qr(M)
        small = (R.diagonal().abs() <= QR_TOLERANCE).nonzero().flatten().tolist()
        small += range(len(R), M.shape[1])
        if not small:
            return Q.float()
        M = torch.cat([M[:, : small[0]], M[:, small[0] + 1 :]], dim=1)
    return M.float()


def compose(M: Float[Tensor, "d m"], *parts: Basis, k: int | None = None, least: float = 1.0) -> Basis:
    """`orthonormalize(M)[:, :k]` as a basis that inherits the weakest gap and every doubt of its parts. least: what the
    parts' turns are divided by where M was computed from them; so they are by M's least singular value."""
    gap = min((p.gap for p in parts if p.gap == p.gap), default=float("nan"))
    note = "; ".join(dict.fromkeys(p.note for p in parts if p.note))
    B, doubted, most = orthonormalize(M)[:, :k], any(p.ill_conditioned for p in parts), max(p.most for p in parts)
    turn, s = sum(p.turn for p in parts), torch.linalg.svdvals(M.double())[: B.shape[1]]
    turn = min(turn / max(min(least, float(s.min()), 1.0), 1e-30), 1.0) if turn and len(s) else 0.0
    note = note or (TURNS.format(turn) if turn > most else "" if B.shape[1] else "nothing is left")
    return Basis(B, gap=gap, ill_conditioned=doubted or turn > most, note=note, turn=turn, most=most)


def union(*bases: Basis) -> Basis:
    """Orthonormal basis of the span of all columns, in order."""
    return compose(torch.cat([b.B for b in bases], dim=1), *bases)


def bisector(A: Basis, B: Basis, k: int) -> Basis:
    """`orthonormalize(A U_k + B V_k)[:, :k]` with `A^T B = U S V^T`. The mid-direction of each pair of principal
    vectors. Not a strict intersection: two subspaces that share nothing still have bisectors."""
    if A.rank == 0 or B.rank == 0:
        return empty(A.d, "one side is empty")
    U, S, Vh = torch.linalg.svd(A.B.double().T @ B.B.double(), full_matrices=False)
    k = min(k, len(S))
    distance = float(S[k - 1] - (S[k] if k < len(S) else 0.0))  # of two that share nothing, the pairing is arbitrary
    return compose(A.B.double() @ U[:, :k] + B.B.double() @ Vh.T[:, :k], A, B, k=k, least=distance)


def project_away(B: Basis, F: Basis) -> Basis:
    """`orthonormalize((I - F F^T) B)`: B without what it shares with F."""
    X, Q = B.B.double(), F.B.double()
    return compose(X - Q @ (Q.T @ X), B, Basis(F.B, turn=F.turn, most=F.most))


def write_away(G: Float[Tensor, "d d"], F: Basis, k: int, noise: Noise = NONE) -> Basis:
    """Top-k left singular vectors of `(I - P) M`, `P = F F^T`, from the Gram `G = M M^T`: those of `(I - P) G (I - P)`.
    noise: of M."""
    G, Q = G.double(), F.B.to(G.device).double()
    GQ = G @ Q
    half = GQ - Q @ (Q.T @ GQ) / 2  # times Q^T, and with its transpose, all that goes
    away = F.turn * float(G.trace().clamp(min=0)) ** 0.5
    left = torch.addmm(G, torch.cat([half, Q], 1), torch.cat([Q, half], 1).T, alpha=-1)
    return gram_basis(left, k, noise=replace(noise, norm=away, most=max(noise.most, F.most)))


def complement(F: Float[Tensor, "d r"], k: int) -> Float[Tensor, "d k"]:
    """k orthonormal columns orthogonal to the orthonormal F. Seeded noise without its part in F: they depend on F's span
    alone, and turn with it as little as it turns."""
    d, r = F.shape
    if r + k > d:
        raise ValueError(f"no {k} directions are orthogonal to a rank-{r} subspace of R^{d}")
    F = F.double()
    E = torch.randn(d, k, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(F.device)
    for _ in range(2):
        E = torch.linalg.qr(E - F @ (F.T @ E)).Q
    return E


def random_basis(d: int, r: int, generator: torch.Generator) -> Basis:
    """A uniformly random r-dimensional subspace of R^d."""
    return Basis(torch.linalg.qr(torch.randn(d, r, generator=generator, dtype=torch.float64)).Q.float())


def principal_cos(A: Float[Tensor, "d a"], B: Float[Tensor, "d b"]) -> float:
    """Mean cosine of the principal angles, in [0, 1]; NaN when either is empty. For two random subspaces of rank 8 in d
    = 1024 the mean is 0.073."""
    if A.shape[1] == 0 or B.shape[1] == 0:
        return float("nan")
    s = torch.linalg.svdvals(A.double().T @ B.double())
    return float(s.mean().clamp(0.0, 1.0))


def overlap(A: Float[Tensor, "d a"], B: Float[Tensor, "d b"]) -> float:
    """`|A^T B|_F^2 / min(a, b)`: share of the smaller subspace inside the larger; chance `max(a, b) / d`."""
    if A.shape[1] == 0 or B.shape[1] == 0:
        return float("nan")
    return float((A.double().T @ B.double()).square().sum() / min(A.shape[1], B.shape[1]))
