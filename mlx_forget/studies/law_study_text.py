"""A law study in words: tables in Markdown for the documentation, made of the study's own output and nothing else."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlx_forget.pipeline.mixture import parse_share
from mlx_forget.studies.law_study import LEAST_INJECTED_ROWS, PAPER_HELD_OUT, READINGS, find_fit, held_out
from mlx_forget.token_counts import short_count

_TITLES = {"pretraining": "Forgetting", "target": "Target loss"}


def study_lines(content: Mapping[str, Any]) -> list[str]:
    """The whole study as Markdown lines: what was run, both laws, held-out errors, rivals, other readings, domains, progress lost."""
    return [
        *_what_was_run(content),
        *_law_table(content, "pretraining"),
        *_law_table(content, "target"),
        *_target_by_share(content),
        *_rivals(content),
        *_readings(content),
        *_distances(content),
        *_progress(content),
        *_cautions(content),
    ]


def domain_lines(content: Mapping[str, Any]) -> list[str]:
    """One Markdown table of the law of forgetting by domain, on total N, with both laws' errors where held out, beside the paper's."""
    fits = [fit for domain in content["axes"]["domain"] if (fit := find_fit(content, domain, "pretraining", "total")) is not None]
    names = list(dict.fromkeys(name for fit in fits for name in fit["params"]))
    rows = []
    for fit in fits:
        target = find_fit(content, fit["domain"], "target", "total")
        held = [held_out(one, column) if one else None for one in (fit, target) for column in ("N", "D")]
        errors = ["" if one is None else f"{one['mre']:.2%}" for one in held]
        values = [_value(fit["params"].get(name)) for name in names]
        rows.append([fit["domain"], str(fit["num_runs"]), *values, _share(fit["bootstrapped_mre"]), *errors])
    paper = [f"{PAPER_HELD_OUT[response]:.2%}, both" for response in ("pretraining", "target")]
    rows.append(["the paper", "", *[""] * len(names), "", paper[0], "", paper[1], ""])
    held_columns = [f"{loss}: {end} held out" for loss in ("forgetting", "target") for end in ("N", "D")]
    return _table(["domain", "runs", *names, "bootstrapped MRE", *held_columns], rows)


def _what_was_run(content: Mapping[str, Any]) -> list[str]:
    axes = content["axes"]
    seeds = "" if len(axes["seed"]) == 1 else f"; seeds {', '.join(map(str, axes['seed']))}"
    if seeds and len({(c["domain"], c["N"], c["D"], c["p_asked"]) for c in content["cells"]}) * len(axes["seed"]) > len(
        content["cells"]
    ):
        seeds += " for part of it"
    lines = [
        f"{content['num_runs']} runs: {_listed(map(_count, axes['N']))} parameters; targets {_listed(axes['domain'])}; "
        f"D = {_listed(map(_count, axes['D']))} tokens; p = {_listed(map(_percent, axes['p']))}{seeds}. "
        f"{content['hours']:.1f} hours of training, summed over runs."
    ]
    left = [cell for cell in content["cells"] if cell["left_out"]]
    if left:
        reasons = dict.fromkeys(_kind(cell["left_out"]) for cell in left)
        for reason in reasons:
            own = [cell for cell in left if _kind(cell["left_out"]) == reason]
            cells = dict.fromkeys(f"{_count(c['N'])} {c['domain']} D = {_count(c['D'])} p = {_percent(c['p_asked'])}" for c in own)
            lines.append(f"Left out of the fits, {reason} ({len(own)} runs): {'; '.join(cells)}.")
    again = [cell for cell in content["cells"] if cell["injected_share"] is not None and cell["p"] > 0]
    if again:
        shares = []
        for p in axes["p"]:
            own = [cell["injected_share"] for cell in again if cell["p_asked"] == p]
            if own:
                shares.append(
                    f"{max(own):.0%} at p = {_percent(p)}" if max(own) >= 0.01 else f"{max(own):.1%} at p = {_percent(p)}"
                )
        lines.append(
            f"Injected by the minimum, at most, as a share of the tokens that the base was pretrained on: {_listed(shares)}. Where it is "
            "large, the base is pretrained further rather than kept."
        )
    return [line for one in lines for line in (one, "")]


def _kind(reason: str) -> str:
    few = f"fewer than {LEAST_INJECTED_ROWS} injected rows at the minimum"
    return few if "injected" in reason else reason


def _law_table(content: Mapping[str, Any], response: str) -> list[str]:
    """One row a domain and kind of N: parameters with intervals, errors where fitted and where held out."""
    fits = [
        fit
        for domain in content["axes"]["domain"]
        for reading in ("total", "non-embedding")
        if (fit := find_fit(content, domain, response, reading)) is not None
    ]
    if not fits:
        whys = dict.fromkeys(fit["reason"] for fit in content["fits"] if fit["response"] == response and fit["reading"] == "total")
        return [f"{_TITLES[response]}: no law could be fitted: {'; '.join(whys)}.", ""]
    names = list(dict.fromkeys(name for fit in fits for name in fit["params"]))
    resampled = any(fit["bootstrapped_mre"] is not None for fit in fits)
    head = ["domain", "N", "runs", *names, *["bootstrapped MRE"] * resampled, "explained", "largest N", "largest D"]
    rows = []
    for fit in fits:
        cells = ["0 (held)" if name in fit["held"] else _value(fit["params"].get(name)) for name in names]
        ends = [_held(held_out(fit, column)) for column in ("N", "D")]
        rows.append(
            [
                *(fit["domain"], fit["reading"], str(fit["num_runs"]), *cells),
                *([_share(fit["bootstrapped_mre"])] * resampled),
                *(f"{fit['explained']:.3f}", *ends),
            ]
        )
    rows.append(["the paper, at its largest N and D", *[""] * (len(head) - 3), f"{PAPER_HELD_OUT[response]:.2%}", ""])
    formulas = dict.fromkeys(f"`{fit['formula']}`" for fit in fits)
    methods = " or ".join(dict.fromkeys(fit["intervals"] for fit in fits if fit["intervals"]))
    each = {fit["domain"]: fit["clusters"] for fit in fits}
    same = next(iter(each.values())) if len(set(each.values())) == 1 else None
    of = same or ", ".join(f"{clusters} ({domain})" for domain, clusters in each.items())
    intervals = f"Intervals are 95% ({methods}, of {of})" if methods else "No intervals"
    explained = "of the variance of forgetting" if response == "pretraining" else "of the variance of the loss"
    mre = "MRE is relative to the loss, over runs that a resample did not draw. " if resampled else ""
    held = "; in brackets, in shares of the mean forgetting there" if response == "pretraining" else ""
    return [
        f"{_TITLES[response]}, {', '.join(formulas)}. {intervals}. {mre}*Explained* is the share {explained}. The last columns are mean "
        f"relative errors where the largest N, or D, was held out{held}.",
        "",
        *_table(head, rows),
        "",
    ]


def _held(one: Mapping[str, Any] | None) -> str:
    if one is None:
        return "not held out"
    forgotten = one["mean_forgetting"]
    return f"{one['mre']:.2%}" + (f" ({one['nats'] / forgotten:.0%})" if forgotten is not None and forgotten > 0 else "")


def _target_by_share(content: Mapping[str, Any]) -> list[str]:
    """How the target loss moves with p, which the law says it does not."""
    fits = [fit for domain in content["axes"]["domain"] if (fit := find_fit(content, domain, "target", "total")) is not None]
    if not fits:
        return []
    shares = list(fits[0]["error_by_p"])
    rows = [[fit["domain"], *(f"{fit['error_by_p'][p]:+.2%}" if p in fit["error_by_p"] else "" for p in shares)] for fit in fits]
    head = ["domain", *(f"p = {_percent(p)}" for p in shares)]
    return ["The law has no p. Measured target loss over the law's, less one, on average:", "", *_table(head, rows), ""]


def _rivals(content: Mapping[str, Any]) -> list[str]:
    """Which law each domain's runs prefer, and how far behind the others are."""
    lines = []
    for response in _TITLES:
        found = [
            fit
            for domain in content["axes"]["domain"]
            if (fit := find_fit(content, domain, response, "total")) is not None and fit["selection"] is not None
        ]
        if not found:
            continue
        names = list(dict.fromkeys(one["name"] for fit in found for one in fit["selection"]["rivals"]))
        rows = []
        for name in names:
            cells = []
            for fit in found:
                one = next((one for one in fit["selection"]["rivals"] if one["name"] == name), None)
                chosen = " (chosen)" if name == fit["selection"]["chosen"] else ""
                cells.append("" if one is None else f"{one['aicc_above_best']:.1f}{chosen}")
            rows.append([name, *cells])
        lines += [f"{_TITLES[response]}, rival laws: AICc above the best of each domain.", ""]
        lines += [*_table(["law", *(fit["domain"] for fit in found)], rows), ""]
        lines += [line for fit in found for line in (f"- {fit['domain']}: {fit['selection']['verdict']}",)] + [""]
    return lines


def _readings(content: Mapping[str, Any]) -> list[str]:
    """The law of forgetting when it is read in other ways."""
    rows = []
    for domain in content["axes"]["domain"]:
        for reading in READINGS:
            fit = find_fit(content, domain, "pretraining", reading)
            if fit is not None:
                values = "; ".join(f"{name} {one['value']:.3g}" for name, one in fit["params"].items())
                rows.append(
                    [domain, READINGS[reading], str(fit["num_runs"]), values, _share(fit["mre"]), f"{fit['explained']:.3f}"]
                )
    if not rows:
        return []
    head = ["domain", "read", "runs", "parameters", "MRE, in sample", "explained"]
    return ["The law of forgetting, read in other ways:", "", *_table(head, rows), ""]


def _distances(content: Mapping[str, Any]) -> list[str]:
    """B beside how far a domain lies from the pretraining data."""
    rows = []
    known = {name: one["distance_nats"] for name, one in content["domains"].items() if one["distance_nats"] is not None}
    for domain in sorted(known, key=lambda name: known[name]):
        fit = find_fit(content, domain, "pretraining", "total")
        if fit is not None and "B" in fit["params"]:
            rows.append([domain, f"{known[domain]:.2f}", _value(fit["params"]["B"])])
    if len(rows) < 2:
        return []
    return [
        "B by domain, in the order of its distance from the pretraining data: what finetuning without injection takes off the target loss "
        "at the largest D that every size has, an estimate of KL(target || base) in nats per token, mean over sizes. "
        f"{len(rows)} domains give an order and no correlation.",
        "",
        *_table(["domain", "distance (nats)", "B"], rows),
        "",
    ]


def _progress(content: Mapping[str, Any]) -> list[str]:
    """How much of what pretraining had gained is lost, by size, at the amount of data that the most runs have."""
    cells = [cell for cell in content["cells"] if cell["loss_fraction_lost"] is not None and not cell["left_out"]]
    if not cells:
        return []
    D = most_common_tokens(cells)
    asked = list(content["axes"]["p"])
    shown = [p for p in asked if p in (asked[0], "1%", asked[-1])]
    rows = []
    for domain in content["axes"]["domain"]:
        for size in content["axes"]["N"]:
            texts = []
            for p in shown:
                own = [c for c in cells if (c["domain"], c["N"], c["D"], c["p_asked"]) == (domain, size, D, p)]
                texts.append(_lost(own))
            if any(texts):
                rows.append([domain, _count(size), *texts])
    return [
        f"Pretraining progress lost at D = {_count(D)}: share of the loss that pretraining had gained, and of its tokens (the point of "
        "the base's own curve that has this loss).",
        "",
        *_table(["domain", "N", *(f"p = {_percent(p)}" for p in shown)], rows),
        "",
    ]


def most_common_tokens(cells: Sequence[Mapping[str, Any]]) -> int:
    """The amount of target data that the most cells have; of several, the one in the middle."""
    counts: dict[int, int] = {}
    for cell in cells:
        counts[int(cell["D"])] = counts.get(int(cell["D"]), 0) + 1
    best = sorted(D for D, count in counts.items() if count == max(counts.values()))
    return best[len(best) // 2]


def _lost(cells: Sequence[Mapping[str, Any]]) -> str:
    if not cells:
        return ""
    parts = []
    for name in ("loss_fraction_lost", "token_equivalent_lost"):
        values = [float(cell[name]) for cell in cells if cell[name] is not None]
        parts.append(f"{sum(values) / len(values):.0%}" if values else "?")
    return ", ".join(parts)


def _cautions(content: Mapping[str, Any]) -> list[str]:
    """Where a fit says of itself that it fails: how it ended, what is not determined, bounds, and what intervals leave out."""
    lines = []
    for response in _TITLES:
        for domain in content["axes"]["domain"]:
            fit = find_fit(content, domain, response, "total")
            if fit is None:
                continue
            said = [f"the fit ended as {fit['status']!r}"] * (fit["status"] != "converged")
            said += [flag["words"] for flag in fit["flags"]] + list(fit["warnings"])
            said += [
                f"{one['covered']:.0%} of {one['num_test']} runs lie inside their 95% intervals without {one['left_out']}"
                for one in (held_out(fit, "N"), held_out(fit, "D"))
                if one is not None and one["covered"] < 0.8
            ]
            if said:
                lines.append(f"- {_TITLES[response].lower()}, {domain}: {'; '.join(dict.fromkeys(said))}.")
    return ["What the fits say against themselves:", "", *lines, ""] if lines else []


def _value(one: Mapping[str, Any] | None) -> str:
    if one is None:
        return ""
    if one["low"] is None and one["high"] is None:
        return f"{one['value']:.3g} (not determined)"
    low, high = ("open" if one["low"] is None else f"{one['low']:.3g}"), ("open" if one["high"] is None else f"{one['high']:.3g}")
    return f"{one['value']:.3g} [{low}, {high}]"


def _share(value: float | None) -> str:
    return "" if value is None or value != value else f"{value:.2%}"


def _count(value: float) -> str:
    """161,088 as 0.16M, 99,968 as 100K."""
    if value >= 999_500:
        return short_count(value)
    return f"{value / 1e6:.2f}M" if value >= 1e5 and round(value, -4) != round(value, -5) else f"{value / 1e3:.0f}K"


def _percent(asked: str) -> str:
    return asked if asked.endswith("%") or asked == "0" else f"{float(parse_share(asked)):.3g}"


def _listed(items: Iterable[str]) -> str:
    return ", ".join(items)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
