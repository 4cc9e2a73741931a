"""Which law a set of runs allows: of several sizes or of one model, with or without replay; what nothing varies is held, not guessed."""

from dataclasses import dataclass

from mlx_forget.errors import UserError
from mlx_forget.laws.forms import Law, get_law
from mlx_forget.laws.model import Constraints
from mlx_forget.laws.table import Table


@dataclass(frozen=True)
class Choice:
    """A law, what is held in it, and why this one, in words."""

    law: Law
    constraints: Constraints
    why: str


def choose_law(table: Table, *, response: str) -> Choice:
    """The law of forgetting (response "pretraining") or of the finetuning loss ("target") that these runs allow.

    Args:
        table: a column that it lacks counts as one that does not vary.

    Raises:
        UserError: nothing varies that the law would describe.
    """
    sizes, tokens, shares = (_num_values(table, name) for name in ("N", "D", "p"))
    held: dict[str, float] = {}
    if response == "target":
        if sizes < 2 and tokens < 2:
            raise UserError(
                "all runs have one size and one number of target tokens, and the law of the target loss describes how it falls with them"
            )
        if sizes < 2:
            held["alpha"] = 0.0
        if tokens < 2:
            held["beta"] = 0.0
        return Choice(get_law("bethune-finetuning"), Constraints(held), _why(sizes, tokens, 2))
    if sizes < 2 and tokens < 2 and shares < 2:
        raise UserError(
            "all runs have one size, one number of target tokens and one share p: there is nothing to fit a law of forgetting to"
        )
    if tokens < 2:
        held["beta"] = 0.0
    name = ("bethune-forgetting" if sizes > 1 else "forgetting-fixed-n") + ("/no-p" if shares < 2 else "")
    return Choice(get_law(name), Constraints(held), _why(sizes, tokens, shares))


def _num_values(table: Table, name: str) -> int:
    return len(set(table.columns[name].tolist())) if name in table.columns else 0


def _why(sizes: int, tokens: int, shares: int) -> str:
    lacking = [
        words
        for count, words in (
            (sizes, "one model size, so nothing says what size does"),
            (tokens, "one number of target tokens, so nothing says what more would do (beta is held at 0)"),
            (shares, "one share p, so nothing says what replay does"),
        )
        if count < 2
    ]
    return f"These runs have {'; '.join(lacking)}." if lacking else ""
