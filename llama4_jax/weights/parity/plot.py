"""The picture of a comparison: KL and the largest logit difference by position."""

from pathlib import Path
from typing import TYPE_CHECKING

from llama4_jax.weights.parity.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FLOOR = 1e-16  # what is 0 is drawn here, on a logarithmic axis


def require_matplotlib() -> None:
    """Raises ValueError if there is none: asked before the comparison, which may take hours."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install 'llama4-jax[convert]'") from error


def plot(report: Report, path: Path) -> None:
    """Writes the picture, in the format of the path's suffix."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for axes, values, label in (
        (above, report.logits.kl_by_position, "KL(reference || ours), nats"),
        (below, report.logits.max_by_position, f"logit difference, of {report.logits.scale:.3g}"),
    ):
        axes.semilogy([max(value, _FLOOR) for value in values], ".-", color="C0", markersize=3, linewidth=0.8)
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        _mark(axes, report.boundaries.chunks, "a chunk begins", color="C1", linestyle="-", linewidth=0.8)
        _mark(axes, report.boundaries.temperatures, "the temperature rises", color="C2", linestyle=":", linewidth=0.8)
    below.set_xlabel("position")
    above.set_title(f"{report.candidate}\nagainst {report.reference}", fontsize="small", loc="left")
    if report.boundaries.chunks or report.boundaries.temperatures:
        handles, labels = above.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _mark(axes: "Axes", positions: list[int], label: str, **style) -> None:
    for i, position in enumerate(positions):
        axes.axvline(position, label=label if i == 0 else None, zorder=0, **style)
