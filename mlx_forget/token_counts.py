"""Numbers of tokens and parameters as people write them."""

import re

from mlx_forget.errors import UserError


def parse_tokens(text: str) -> int:
    """A number of tokens from `300000`, `300K`, `2M`, `1.5B` or `2e6`.

    Raises:
        UserError: not such a number, or below 1.
    """
    match = re.fullmatch(r"([0-9.]+(?:e\+?[0-9]+)?)([KMB]?)", text.strip().replace(",", ""), re.IGNORECASE)
    try:
        number = float(match[1]) * {"": 1, "K": 1e3, "M": 1e6, "B": 1e9}[match[2].upper()] if match else 0.0
    except ValueError:
        number = 0.0
    if number < 1 or number != int(number):
        raise UserError(f"A number of tokens is written like 300000, 300K or 2M, not {text!r}.")
    return int(number)


def short_count(value: float) -> str:
    """A large number in millions or billions: 161,088 as 0.16M, 124,439,808 as 124M, 1.28e9 as 1.28B."""
    if value >= 999.5e6:
        return f"{value / 1e9:.3g}B"
    return f"{value / 1e6:.{2 if value < 9.95e6 else 3}g}M"
