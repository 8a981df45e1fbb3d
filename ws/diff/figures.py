"""Figures of a weight diff: where it is large, its spectra. (docs/method.md section 2)"""

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from ws.show.figures import PALETTE, TEXT, styled


@styled
def norm_map(norms: pl.DataFrame) -> Figure:
    """Heat map of |w|_F by layer and module. norms: columns layer, module, norm."""
    modules = norms["module"].unique(maintain_order=True).to_list()
    layers = norms["layer"].unique().sort().to_list()
    grid = np.full((len(modules), len(layers)), np.nan)
    for layer, module, norm in norms.select("layer", "module", "norm").rows():
        grid[modules.index(module), layers.index(layer)] = norm
    figure = Figure(figsize=(TEXT, 2.4), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(grid, aspect="auto", cmap="viridis")
    axis.set_yticks(range(len(modules)), modules)
    step = max(1, len(layers) // 16)
    axis.set_xticks(range(0, len(layers), step), layers[::step])
    axis.set(xlabel="layer", title="Frobenius norm of w by layer and module")
    figure.colorbar(image, ax=axis, label="|w|_F")
    return figure


@styled
def spectra(values: dict[str, list[np.ndarray]]) -> Figure:
    """Singular values of w, scaled to the largest of each matrix: median over layers and range, by module."""
    figure = Figure(figsize=(TEXT, 2.8), layout="constrained")
    axis = figure.subplots()
    for i, (module, rows) in enumerate(values.items()):
        width = min(map(len, rows))
        scaled = np.stack([r[:width] / max(r[0], 1e-30) for r in rows])
        scaled = np.where(scaled > 1e-9, scaled, np.nan)
        some = ~np.isnan(scaled).all(axis=0)  # w may have a lower rank than its factors
        index, scaled = np.arange(1, width + 1)[some], scaled[:, some]
        axis.plot(index, np.nanmedian(scaled, axis=0), c=PALETTE[i % len(PALETTE)], label=module)
        axis.fill_between(index, np.nanmin(scaled, axis=0), np.nanmax(scaled, axis=0), color=PALETTE[i % len(PALETTE)],
                          alpha=0.12, lw=0)  # fmt: skip
    axis.set(yscale="log", xlabel="index", ylabel="singular value / largest", title="Spectrum of w by module")
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return figure
