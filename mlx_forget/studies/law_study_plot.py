"""The figure of a law study: forgetting against p for each size, measured against predicted, B by domain, progress lost by size."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mlx_forget.laws.forms import get_law
from mlx_forget.pipeline.mixture import parse_share
from mlx_forget.plots import COLOURS, MARKERS
from mlx_forget.studies.law_study import find_fit
from mlx_forget.studies.law_study_text import most_common_tokens
from mlx_forget.token_counts import short_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_law_study(content: Mapping[str, Any], *, title: str) -> "Figure":
    """One panel a domain above (forgetting against p, the law dashed), three below; hollow markers are runs that the fits leave out."""
    from matplotlib.figure import Figure

    domains = content["axes"]["domain"]
    figure = Figure(figsize=(12.5, 8.2), layout="constrained")
    upper, lower = figure.subfigures(2, 1, squeeze=False)[:, 0]
    panels = upper.subplots(1, len(domains), squeeze=False)[0]
    most = most_common_tokens(content["cells"])
    for axis, domain in zip(panels, domains, strict=True):
        _draw_shares(axis, content, domain, most)
    panels[0].set_ylabel("forgetting at the minimum (nats per token)")
    handles, labels = panels[0].get_legend_handles_labels()
    upper.legend(handles, labels, loc="outside lower center", ncols=len(labels) or 1, frameon=False, fontsize=9)
    predicted, replay, progress = lower.subplots(1, 3)
    _draw_predicted(predicted, content)
    _draw_replay(replay, content)
    _draw_progress(progress, content, most)
    for axis in (*panels, predicted, replay, progress):
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    return figure


def _style(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 5.5}


def _draw_shares(axis: "Axes", content: Mapping[str, Any], domain: str, most: int) -> None:
    """Forgetting against p at one D, a colour a size; the x axis is linear below the smallest share, so that p = 0 has a place."""
    cells = [c for c in content["cells"] if c["domain"] == domain and c["D"] == most]
    shares = [c["p"] for c in content["cells"] if c["p"] > 0]
    smallest, largest = (min(shares), max(shares)) if shares else (0.01, 0.1)
    fit = find_fit(content, domain, "pretraining", "total")
    for number, size in enumerate(content["axes"]["N"]):
        own = [c for c in cells if c["N"] == size]
        style = _style(number)
        label = f"N = {short_count(size)}"
        axis.plot([], [], linestyle="none", label=label, **style)
        for c in own:
            axis.plot(c["p"], c["forgetting"], linestyle="none", fillstyle="none" if c["left_out"] else "full", **style)
        if fit is not None and own:
            p = np.concatenate([np.linspace(0.0, smallest, 60), np.geomspace(smallest, largest, 60)])
            law = get_law(fit["law"])
            question: dict[str, npt.ArrayLike] = {"N": float(size), "D": float(most), "p": p, "L0": 0.0}
            params = {name: one["value"] for name, one in fit["params"].items()}
            values = law.predict(params, {name: question[name] for name in law.columns})
            axis.plot(p, np.broadcast_to(values, p.shape), color=style["color"], linewidth=1.0, linestyle="--")
    axis.set_xscale("symlog", linthresh=smallest, linscale=0.5)
    axis.set_xlim(-0.2 * smallest, largest * 1.3)
    # Shares as they were asked for; those that were served differ a little.
    ticks = sorted({0.0, *(float(parse_share(str(c["p_asked"]))) for c in cells)})
    axis.set_xticks(ticks, [f"{100 * tick:.2g}%" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("share p of pretraining data")
    axis.set_title(f"{domain}, D = {short_count(most)} tokens; dashed: the law", fontsize=10)


def _draw_predicted(axis: "Axes", content: Mapping[str, Any]) -> None:
    domains = content["axes"]["domain"]
    values = []
    for number, domain in enumerate(domains):
        own = [c for c in content["cells"] if c["domain"] == domain and c["predicted_forgetting"] is not None]
        style = _style(number)
        for left_out, fill in ((False, "full"), (True, "none")):
            part = [c for c in own if bool(c["left_out"]) == left_out]
            axis.plot(
                [c["predicted_forgetting"] for c in part],
                [c["forgetting"] for c in part],
                linestyle="none",
                fillstyle=fill,
                label=domain if part and not left_out else None,
                **style,
            )
        values += [c[name] for c in own for name in ("predicted_forgetting", "forgetting")]
    if values:
        ends = np.linspace(min(values), max(values), 200)
        axis.plot(ends, ends, color="black", linewidth=0.8, linestyle=":")
        # Forgetting spans two orders of magnitude, and injection can take it below zero.
        ticks = [tick for tick in (-1, -0.3, -0.1, 0, 0.1, 0.3, 1, 3, 10) if ends[0] - 0.1 <= tick <= 1.3 * ends[-1]]
        axis.set_xscale("symlog", linthresh=0.1, linscale=0.3)
        axis.set_yscale("symlog", linthresh=0.1, linscale=0.3)
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.legend(frameon=False, fontsize=9)
    else:
        axis.text(0.5, 0.5, "no law could be fitted", ha="center", va="center", transform=axis.transAxes)
    axis.set_xlabel("forgetting by the law (nats per token)")
    axis.set_ylabel("measured (nats per token)")
    axis.set_title("Measured against the law; hollow: left out", fontsize=10)


def _draw_replay(axis: "Axes", content: Mapping[str, Any]) -> None:
    """B with its interval, against the distance of the domain."""
    for number, domain in enumerate(content["axes"]["domain"]):
        fit = find_fit(content, domain, "pretraining", "total")
        distance = content["domains"][domain]["distance_nats"]
        if fit is None or distance is None or "B" not in fit["params"]:
            continue
        one = fit["params"]["B"]
        style = _style(number)
        axis.plot(distance, one["value"], linestyle="none", **style)
        known = one["low"] is not None and one["high"] is not None
        note = "" if known else " (at its bound)" if "B" in fit["at_bounds"] else " (not determined)"
        axis.annotate(
            f"{domain}{note}", (distance, one["value"]), xytext=(7, 0), textcoords="offset points", va="center", fontsize=9
        )
        if known:
            axis.plot([distance] * 2, [one["low"], one["high"]], color=style["color"], linewidth=1.4)
    if axis.has_data():
        axis.set_yscale("log")
        axis.margins(x=0.45, y=0.15)
    else:
        axis.text(0.5, 0.5, "no B", ha="center", va="center", transform=axis.transAxes)
    axis.set_xlabel("distance of the domain from the pretraining data (nats)")
    axis.set_ylabel("B (95% interval)")
    axis.set_title("B by domain", fontsize=10)


def _draw_progress(axis: "Axes", content: Mapping[str, Any], most: int) -> None:
    """Share of the pretraining progress lost against size: p = 0 solid, the largest p dotted."""
    shares = content["axes"]["p"]
    for number, domain in enumerate(content["axes"]["domain"]):
        for asked, line in dict.fromkeys([(shares[0], "-"), (shares[-1], ":")]):
            own: dict[int, list[float]] = {}
            for c in content["cells"]:
                if (c["domain"], c["D"], c["p_asked"]) == (domain, most, asked) and c["loss_fraction_lost"] is not None:
                    own.setdefault(c["N"], []).append(100 * c["loss_fraction_lost"])
            sizes = sorted(own)
            label = f"{domain}, p = {asked}"
            axis.plot(sizes, [np.mean(own[size]) for size in sizes], linestyle=line, linewidth=1.1, label=label, **_style(number))
    axis.set_xscale("log")
    sizes = content["axes"]["N"]
    axis.set_xticks(sizes, [short_count(size) for size in sizes])
    axis.minorticks_off()
    axis.set_ylim(0, 1.35 * axis.get_ylim()[1])
    axis.set_xlabel("parameters N")
    axis.set_ylabel("pretraining progress lost (% of loss)")
    axis.set_title(f"Progress lost, D = {short_count(most)} tokens", fontsize=10)
    axis.legend(frameon=False, fontsize=8, ncols=2, loc="upper center")
