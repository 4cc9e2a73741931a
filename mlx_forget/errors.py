"""The one family of errors that a user can mend, and the suggestion of what was meant."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """The request was wrong: one sentence with what was asked, what was found, and the way out.

    The command line prints it as one line and exits with code 2.
    """


class RunFailed(RuntimeError):
    """The request was right, and the work failed or diverged: exit code 1."""


class Interrupted(BaseException):
    """A signal stopped the work, which can be resumed: exit code 128 + signal.

    Not an `Exception`, so that no handler on the way takes it for a fault.
    """

    def __init__(self, sentence: str, *, signal: int = 2) -> None:
        super().__init__(sentence)
        self.signal = signal


class LeaderFailed(BaseException):
    """Rank 0 of this run has failed and says why: this process ends with the same exit code, in silence."""

    def __init__(self, code: int) -> None:
        super().__init__(f"rank 0 failed with exit code {code}")
        self.code = code


def exit_code(error: BaseException) -> int:
    """The exit code of the command line for what ended it."""
    if isinstance(error, UserError):
        return 2
    if isinstance(error, Interrupted):
        return 128 + error.signal
    return error.code if isinstance(error, LeaderFailed) else 1


def unknown(kind: str, name: object, choices: Iterable[str]) -> UserError:
    """The error for a name that is none of `choices`: it suggests the nearest, then lists them all."""
    known = sorted(choices)
    nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return UserError(f"Unknown {kind} {str(name)!r}.{hint} Known: {', '.join(known)}.")
