"""What happened to a text, in words."""

import math

from mlx_forget.audit.run import Audit, TextAudit


def verdict(text: TextAudit) -> str:
    """What happened to a text, in a sentence."""
    change = text.losses.forgetting
    if math.isnan(change.stderr):
        return f"the loss changed by {change.value:+.4f} nats per token; one document tells no uncertainty."
    interval = f"95% interval {change.low:+.4f} to {change.high:+.4f}"
    if change.low <= 0 <= change.high:
        return f"no change that can be told from none: {change.value:+.4f} nats per token ({interval})."
    word, amount = ("forgot", change.value) if change.value > 0 else ("gained", -change.value)
    return f"{word} {amount:.4f} nats per token ({interval})."


def failure(audit: Audit) -> str:
    """Why an audit with a limit did not pass."""
    assert audit.fail_above is not None
    over = [text for text in audit.texts if text.losses.forgetting.value > audit.fail_above]
    lost = ", ".join(f"{text.name} {text.losses.forgetting.value:+.4f}" for text in over)
    return f"Too much was forgotten (the limit is {audit.fail_above:g} nats per token): {lost}."
