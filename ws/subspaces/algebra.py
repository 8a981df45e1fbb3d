"""Linear algebra on low-rank subspaces of R^d; knows nothing of models.

A basis is a `d x r` matrix with orthonormal columns, `P = B B^T`. Everything is computed in float64 and stored in
float32. Top-k singular subspaces of a wide matrix `M` come from the eigenvectors of its Gram `M M^T` (the same
subspace, cheaper), and only the leading eigenpairs are computed. (docs/method.md section 4)
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

QR_TOLERANCE = 1e-5  # columns of a QR with |R_ii| at or below this are dropped
RANK_TOLERANCE = 1e-5  # singular values below this fraction of the largest are rounding noise of float32 samples
FLOAT32_EPS = 2.0**-23
WITHIN_ROUNDING = "the gap at the cut is within rounding"
SMALL = 96  # up to this many rows or columns a direct SVD is as cheap as a Gram


@dataclass(frozen=True)
class Basis:
    """An orthonormal basis with what is known of how its data determine it.

    B: `(d, r)` float32. s: `(r,)` singular values behind the columns, empty for composed bases. gap: relative gap
    `(s_r - s_{r+1}) / s_r` at the cut, NaN where nothing was cut. ill_conditioned: the data do not determine the
    subspace (beyond their rank, or the perturbation bound `eps s_1 / (s_r - s_{r+1})` exceeds 0.01 rad). note: why a
    basis is empty or arbitrary.

    Example:
        >>> import torch, ws
        >>> ws.Basis(torch.eye(6)[:, :2]).rank
        2
    """

    B: Float[Tensor, "d r"]
    s: Float[Tensor, " q"] = field(default_factory=lambda: torch.zeros(0))
    gap: float = float("nan")
    ill_conditioned: bool = False
    note: str = ""

    @property
    def d(self) -> int:
        return self.B.shape[0]

    @property
    def rank(self) -> int:
        return self.B.shape[1]


def empty(d: int, note: str) -> Basis:
    """A basis without columns, with the reason."""
    return Basis(torch.zeros(d, 0), note=note)


def _eigh(G: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Eigenpairs number first..last (ascending, inclusive) in float64; on the CPU only these are computed."""
    if G.device.type == "cpu" and G.shape[0] > SMALL:
        from scipy.linalg import eigh

        values, vectors = eigh(G.numpy(), subset_by_index=[first, last])
        return torch.from_numpy(values.copy()), torch.from_numpy(vectors.copy())
    values, vectors = torch.linalg.eigh(G)
    return values[first : last + 1], vectors[:, first : last + 1]


def top_eigh(G: Float[Tensor, "d d"], k: int) -> tuple[Float[Tensor, " q"], Float[Tensor, "d p"]]:
    """Leading eigenpairs of a symmetric matrix in float64: `min(k + 1, d)` values, `min(k, d)` vectors, largest first."""
    d = G.shape[0]
    values, vectors = _eigh(G.double(), max(d - k - 1, 0), d - 1)
    return values.flip(0), vectors.flip(1)[:, : min(k, d)]


def _cut(s: Float[Tensor, " q"], k: int) -> tuple[float, bool, str]:
    """gap, ill_conditioned and note of keeping k directions of a spectrum s (largest first, at least one past the cut)."""
    if k == 0 or len(s) == 0 or float(s[0]) <= 0:
        return float("nan"), k > 0, "no signal: the directions are arbitrary" if k else ""
    rank = int((s > RANK_TOLERANCE * s[0]).sum())
    if rank < k:
        return 0.0, True, f"data of rank {rank}: {k - rank} of {k} directions are arbitrary"
    if len(s) <= k:
        return float("nan"), False, ""
    distance = float(s[k - 1] - s[k])
    ill = FLOAT32_EPS * float(s[0]) > 0.01 * distance
    return distance / float(s[k - 1]), ill, WITHIN_ROUNDING if ill else ""


def _basis(B: Tensor, s: Tensor, k: int) -> Basis:
    """A basis of the first k columns; s holds one value past the cut where there is one."""
    gap, ill, note = _cut(s, k)
    return Basis(B[:, :k].float().cpu(), s[:k].float().cpu(), gap, ill, note)


def gram_basis(G: Float[Tensor, "d d"], k: int) -> Basis:
    """Top-k eigenvectors of a positive semidefinite matrix; `s` are the square roots of its eigenvalues."""
    values, vectors = top_eigh(G, k)
    return _basis(vectors, values.clamp(min=0).sqrt(), min(k, G.shape[0]))


def bottom_gram_basis(G: Float[Tensor, "d d"], k: int) -> Basis:
    """Bottom-k eigenvectors of a positive semidefinite matrix (the right singular vectors that M amplifies least). `s`
    are the square roots of the eigenvalues, smallest first; the gap is `(s_{k+1} - s_k) / s_{k+1}`."""
    d = G.shape[0]
    values, vectors = _eigh(G.double(), 0, min(k, d - 1))
    s = values.clamp(min=0).sqrt()
    if k >= d:
        return Basis(vectors.float().cpu(), s.float().cpu())
    distance = float(s[k] - s[k - 1])
    ill = FLOAT32_EPS * float(top_eigh(G, 1)[0][0].clamp(min=0).sqrt()) > 0.01 * distance
    gap = distance / float(s[k]) if s[k] > 0 else float("nan")
    return Basis(vectors[:, :k].float().cpu(), s[:k].float().cpu(), gap, ill, WITHIN_ROUNDING if ill else "")


def left_svd(M: Float[Tensor, "d m"], k: int) -> Basis:
    """Top `min(k, d, m)` left singular vectors. Directions past the rank of M are arbitrary but orthonormal.

    Example:
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
    if min(d, m) <= SMALL:
        return _basis(*torch.linalg.svd(M, full_matrices=False)[:2], k)
    if d <= m:
        return gram_basis(M @ M.T, k)
    values, V = top_eigh(M.T @ M, k)
    s = values.clamp(min=0).sqrt()
    keep = s[:k] > 1e-7 * s[0]
    U = torch.linalg.qr((M @ V)[:, keep] / s[:k][keep]).Q
    if U.shape[1] < k:
        U = torch.cat([U, complement(U, k - U.shape[1])], dim=1)
    return _basis(U, s, k)


def pca(X: Float[Tensor, "n d"], k: int) -> Basis:
    """Top `min(k, n, d)` principal directions of the rows (centred); empty for one row or none.

    Past the rank of the centred samples the directions are arbitrary but orthonormal, and `note` says so.

    Example:
        >>> import torch, ws
        >>> ws.pca(torch.tensor([[0.0, 1.0], [0.0, 3.0], [0.0, 5.0]]), 1).B.abs().flatten().tolist()
        [0.0, 1.0]
    """
    if len(X) <= 1:
        return empty(X.shape[1], f"{len(X)} sample(s): nothing to centre")
    X = X.double()
    return left_svd((X - X.mean(dim=0)).T, k)


def uncentred(X: Float[Tensor, "n d"], k: int) -> Basis:
    """Top-k directions of the rows, each scaled to unit length, without centring; zero rows are left out."""
    X = X.double()
    norms = X.norm(dim=1)
    rows = X[norms > 0] / norms[norms > 0, None]
    return left_svd(rows.T, k) if len(rows) else empty(X.shape[1], "all differences are zero")


def cut_at_rank(basis: Basis) -> Basis:
    """The directions that the samples determine: those with `s_i > 1e-5 s_1`."""
    if basis.rank == 0 or float(basis.s[0]) <= 0:
        return empty(basis.d, "no signal")
    rank = int((basis.s > RANK_TOLERANCE * basis.s[0]).sum())
    if rank == basis.rank:
        return basis
    return Basis(basis.B[:, :rank], basis.s[:rank], 1.0, False, f"cut at the samples' rank {rank}")


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


def compose(M: Float[Tensor, "d m"], *parts: Basis, k: int | None = None) -> Basis:
    """`orthonormalize(M)[:, :k]` as a basis that inherits the weakest gap and every doubt of its parts."""
    gap = min((p.gap for p in parts if p.gap == p.gap), default=float("nan"))
    note = "; ".join(dict.fromkeys(p.note for p in parts if p.note))
    B, doubted = orthonormalize(M)[:, :k], any(p.ill_conditioned for p in parts)
    return Basis(B, gap=gap, ill_conditioned=doubted, note=note or ("" if B.shape[1] else "nothing is left"))


def union(*bases: Basis) -> Basis:
    """Orthonormal basis of the span of all columns, in order."""
    return compose(torch.cat([b.B for b in bases], dim=1), *bases)


def bisector(A: Basis, B: Basis, k: int) -> Basis:
    """`orthonormalize(A U_k + B V_k)[:, :k]` with `A^T B = U S V^T`. The mid-direction of each pair of principal
    vectors. Not a strict intersection: two subspaces that share nothing still have bisectors."""
    if A.rank == 0 or B.rank == 0:
        return empty(A.d, "one side is empty")
    U, _, Vh = torch.linalg.svd(A.B.double().T @ B.B.double(), full_matrices=False)
    k = min(k, U.shape[1])
    return compose(A.B.double() @ U[:, :k] + B.B.double() @ Vh.T[:, :k], A, B, k=k)


def project_away(B: Basis, F: Basis) -> Basis:
    """`orthonormalize((I - F F^T) B)`: B without what it shares with F."""
    X, Q = B.B.double(), F.B.double()
    return compose(X - Q @ (Q.T @ X), B)


def deflate(G: Float[Tensor, "d d"], F: Float[Tensor, "d r"]) -> Float[Tensor, "d d"]:
    """`(I - P) G (I - P)` with `P = F F^T`, float64."""
    G, F = G.double(), F.to(G.device).double()
    GF = G @ F
    out = G - GF @ F.T - F @ GF.T + F @ (F.T @ GF) @ F.T
    return (out + out.T) / 2


def write_away(G: Float[Tensor, "d d"], F: Basis, k: int) -> Basis:
    """Top-k left singular vectors of `(I - F F^T) M`, from the Gram `G = M M^T`."""
    return gram_basis(deflate(G, F.B), k)


def complement(F: Float[Tensor, "d r"], k: int) -> Float[Tensor, "d k"]:
    """k orthonormal columns orthogonal to the orthonormal F; the same ones for the same F."""
    d, r = F.shape
    if r + k > d:
        raise ValueError(f"no {k} directions are orthogonal to a rank-{r} subspace of R^{d}")
    F = F.double()
    start = F.square().sum(dim=1).argsort(stable=True)[:k]  # unit vectors that F covers least
    E = torch.zeros(d, k, dtype=torch.float64, device=F.device)
    E[start, torch.arange(k, device=F.device)] = 1.0
    for _ in range(2):
        E = torch.linalg.qr(E - F @ (F.T @ E)).Q
    return E


def random_basis(d: int, r: int, generator: torch.Generator) -> Basis:
    """A uniformly random r-dimensional subspace of R^d."""
    return Basis(torch.linalg.qr(torch.randn(d, r, generator=generator, dtype=torch.float64)).Q.float())


def principal_cos(A: Float[Tensor, "d a"], B: Float[Tensor, "d b"]) -> float:
    """Mean cosine of the principal angles, in [0, 1]; NaN when either is empty. (0.073 for two
    random subspaces of rank 8 in d = 1024)"""
    if A.shape[1] == 0 or B.shape[1] == 0:
        return float("nan")
    s = torch.linalg.svdvals(A.double().T @ B.double())
    return float(s.mean().clamp(0.0, 1.0))


def overlap(A: Float[Tensor, "d a"], B: Float[Tensor, "d b"]) -> float:
    """`|A^T B|_F^2 / min(a, b)`: share of the smaller subspace inside the larger; chance `max(a, b) / d`."""
    if A.shape[1] == 0 or B.shape[1] == 0:
        return float("nan")
    return float((A.double().T @ B.double()).square().sum() / min(A.shape[1], B.shape[1]))
