"""The audit on a screen: plain aligned text, for people, logs and papers."""

from mlx_forget.audit.run import Audit
from mlx_forget.audit.statistics import Estimate
from mlx_forget.audit.verdict import verdict


def print_table(audit: Audit) -> None:
    """What every text lost, where most of it, tasks and refusals, and how far the weights moved."""
    print(f"before: {audit.base['description']} ({audit.base['name']})")
    print(f"after:  {audit.tuned['description']} ({audit.tuned['name']})")
    print()
    width = max(4, *(len(text.name) for text in audit.texts))
    print(
        f"{'text':<{width}}  {'documents':>9}  {'tokens':>9}  {'loss before':>15}  {'loss after':>15}  {'change (nats)':>16}  {'KL':>15}  "
        f"{'hard CE':>15}  {'top same':>8}  {'bits per byte':>14}"
    )
    for text in audit.texts:
        losses = text.losses
        bits = f"{losses.bits_per_byte_before.value:.3f} {losses.bits_per_byte_after.value:.3f}"
        print(
            f"{text.name:<{width}}  {text.num_documents:>9,}  {text.num_tokens:>9,}  {_of(losses.loss_before):>15}  {_of(losses.loss_after):>15}  "
            f"{_of(losses.forgetting, sign=True):>16}  {_of(losses.kl):>15}  {_of(losses.hard_ce):>15}  {losses.agreement.value:>8.1%}  {bits:>14}"
        )
    print("± is one standard error over documents; changes are paired.")
    print()
    for text in audit.texts:
        print(f"{text.name}: {verdict(text)}")
        if text.num_masked:
            print(f"  {text.num_masked:,} more tokens, which are not to be learnt (such as questions), were read but do not count")
        lost = text.progress_lost
        if lost is not None and lost.loss_fraction is not None:
            print(
                f"  of the base's pretraining: {lost.loss_fraction:.1%} of the loss gained, {lost.token_equivalent:.1%} of the tokens"
            )
        kinds = sorted(text.divisions[0].groups, key=lambda group: -abs(group.share or 0))[:3]
        print(
            "  by kind of token: "
            + ", ".join(
                f"{group.name} {group.change.value:+.3f} ({round(group.share or 0, 2) + 0.0:.0%} of all)" for group in kinds
            )
        )
        flips = text.transitions
        print(
            f"  next-token hits {flips.hits_before.value:.1%} to {flips.hits_after.value:.1%}; lost {flips.lost.value:.1%}, gained "
            f"{flips.gained.value:.1%} (without lucky guesses {flips.adjusted_lost.value:.1%}, {flips.adjusted_gained.value:.1%})"
        )
        for title, rows in (("forgotten", text.tokens_forgotten), ("gained", text.tokens_gained)):
            if rows:
                print(f"  tokens most {title}: " + ", ".join(f"{row.token} {row.change:+.2f}" for row in rows[:6]))
    for task in audit.tasks or ():
        rates = task.rates
        agreement = "" if task.agreement is None else f", same answer {task.agreement:.1%}"
        print(
            f"{task.name} ({task.metric}, {rates.num:,} examples): {rates.before:.1%} to {rates.after:.1%}, change {rates.change:+.1%} ± "
            f"{rates.stderr:.1%}, lost {rates.lost}, gained {rates.gained}, p = {rates.p_value:.3g}{agreement}"
        )
    if audit.refusals is not None:
        rates = audit.refusals.rates
        print(f"refusals ({rates.num} prompts): {rates.before:.0%} to {rates.after:.0%}, p = {rates.p_value:.3g}")
    farthest = max(audit.weights.layers, key=lambda layer: layer.relative or 0)
    print(f"weights moved by {audit.weights.relative:.1%} of their norm, most in {farthest.name} ({farthest.relative or 0:.1%})")


def _of(estimate: Estimate, *, sign: bool = False) -> str:
    value = f"{estimate.value:+.4f}" if sign else f"{estimate.value:.4f}"
    return value if estimate.stderr != estimate.stderr else f"{value}±{estimate.stderr:.4f}"
