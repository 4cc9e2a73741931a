"""The audit as one self-contained HTML page."""

from typing import Any

from markupsafe import Markup

from mlx_forget.audit.groups import Division
from mlx_forget.audit.measures import Calibration
from mlx_forget.audit.run import Audit, TextAudit
from mlx_forget.audit.verdict import verdict
from mlx_forget.pages import svg
from mlx_forget.pages.templates import render_page

# A change of this many nats is shaded fully.
_FULL_SHADE = 4.0


def render(audit: Audit) -> str:
    """The page."""
    plots = {
        "summary": svg.intervals(
            [_interval(text.name, text.losses.forgetting) for text in audit.texts],
            title="Change of the loss of every text",
            unit="loss after minus before (nats per token), 95% interval",
            width=760,
        ),
        "texts": [_plots_of(text) for text in audit.texts],
        "distances": svg.bars(
            [
                (layer.name, None if layer.relative is None else 100 * layer.relative, f"{layer.distance:.3g}")
                for layer in audit.weights.layers
            ],
            title="Distance of the weights, by layer",
            unit="percent of the norm before; behind: the distance itself",
        ),
        "ranks": svg.bars(
            [
                (layer.name, None if layer.rank_share is None else 100 * layer.rank_share, "")
                for layer in audit.weights.layers
                if layer.rank_share is not None
            ],
            title="Rank of the change, by layer",
            unit="percent of full rank, mean over matrices",
        ),
    }
    return render_page("audit/page.html.jinja", audit=audit, plots=plots, verdict=verdict, shade=_shade)


def _plots_of(text: TextAudit) -> dict[str, Any]:
    names = [group.name for group in text.positions.groups]
    before = [group.loss_before for group in text.positions.groups]
    after = [group.loss_before + group.change.value for group in text.positions.groups]
    return {
        "positions": svg.lines(
            names,
            [svg.Line("before", "before", before), svg.Line("after", "after", after)],
            title=f"Loss against position in the window, {text.name}",
            x_title="tokens before it in the window",
            y_title="loss (nats per token)",
        ),
        "position_changes": _division_plot(text.positions, text.name),
        "divisions": [(division, _division_plot(division, text.name)) for division in text.divisions],
        "reliability": svg.reliability(
            _points(text.calibration_before), _points(text.calibration_after), title=f"Calibration before and after, {text.name}"
        ),
    }


def _division_plot(division: Division, text_name: str) -> Markup:
    return svg.intervals(
        [
            _interval(group.name, group.change, "" if group.share is None else f"{round(group.share, 2) + 0.0:.0%} of all")
            for group in division.groups
        ],
        title=f"Change of the loss by {division.name}, {text_name}",
        unit="loss after minus before (nats), 95% interval",
        width=560,
        label_width=180,
    )


def _interval(name: str, estimate: Any, note: str | None = None) -> svg.Interval:
    return svg.Interval(name, estimate.value, estimate.low, estimate.high, f"{estimate.value:+.3f}" if note is None else note)


def _points(calibration: Calibration) -> list[tuple[float, float]]:
    return [(b.confidence, b.hits) for b in calibration.bins if b.confidence is not None and b.hits is not None]


def _shade(change: float) -> Markup:
    """The attributes of a token's span: how strongly it is shaded, and in which colour."""
    much = min(1.0, abs(change) / _FULL_SHADE) * 0.75
    if much < 0.04:
        return Markup("")
    return Markup(' class="{}" style="--much:{:.2f}"').format("lost" if change > 0 else "gained", much)
