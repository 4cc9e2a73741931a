"""What is done to a good file: bytes flipped, cut off, put in, repeated or replaced; and values of JSON and YAML replaced by others."""

import json
from random import Random
from typing import Any

Change = tuple[str, float, bytes]

HOW = ("flip", "cut", "insert", "repeat", "swap", "value")
# What readers of text, numbers and lengths have stumbled over.
PIECES = (
    b"\xff" * 8, b"\x00" * 8, b"-1", b"1e999", b"99999999999999999999", b"null", b"NaN", b"[" * 2000, b"{", b'"', b"..", b"\n", b"&a *a",
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2.5, 1e308, float("nan"), float("inf"), 10**30, 10**400, "", "x", "../../x", "/etc/passwd", "\x00", "\ud800", [], {}, [[]],
    [None], [1, "a"], {"a": 1}, {"x": {}}, "9" * 5000,
)  # fmt: skip
_LINES = (
    "[",
    "{}",
    "[a]",
    "-1",
    "1e999",
    "~",
    "'",
    "2001-99-99",
    "!!python/object:os.system x",
    "0x",
    "*a",
    "&a [*a]",
    "null",
    "1_0",
    ".nan",
)


def drawn(chance: Random) -> list[Change]:
    """One to four changes."""
    return [(chance.choice(HOW), chance.random(), _piece(chance)) for _ in range(chance.randint(1, 4))]


def _piece(chance: Random) -> bytes:
    return chance.choice(PIECES) if chance.random() < 0.5 else chance.randbytes(chance.randint(1, 8))


def changed(content: bytes, changes: list[Change]) -> bytes:
    """A file with some changes, each at a place from 0 to 1."""
    for how, where, what in changes:
        at = int(where * (len(content) + 1))
        if how == "flip" and at < len(content):
            content = content[:at] + bytes([content[at] ^ (what[0] or 1)]) + content[at + 1 :]
        elif how == "cut":
            content = content[:at]
        elif how == "insert":
            content = content[:at] + what + content[at:]
        elif how == "repeat":
            content = content[:at] + content[at // 2 : at][:5000] + content[at:]
        elif how == "swap":
            content = content[:at] + what + content[at + len(what) :]
        elif how == "value":
            content = _with_another_value(content, Random(f"{where} {what!r}"))
    return content


def _with_another_value(content: bytes, chance: Random) -> bytes:
    """JSON with a value replaced, taken out or moved; of other text, a line with something else behind its colon."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return _with_another_line(content, chance)
    inside: list[tuple[Any, Any]] = []
    waiting = [found]
    while waiting:
        one = waiting.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else []
        inside += [(one, key) for key in keys]
        waiting += [one[key] for key in keys if isinstance(one[key], dict | list)]
    if not inside:
        return content
    holder, key = chance.choice(inside)
    if chance.random() < 0.15:
        del holder[key]
    elif chance.random() < 0.15:
        other, place = chance.choice(inside)
        holder[key] = json.loads(json.dumps(other[place]))
    else:
        holder[key] = chance.choice(_VALUES)
    return json.dumps(found).encode()


def _with_another_line(content: bytes, chance: Random) -> bytes:
    lines = content.split(b"\n")
    places = [number for number, line in enumerate(lines) if b":" in line]
    if not places:
        return content
    number = chance.choice(places)
    lines[number] = lines[number].partition(b":")[0] + b": " + chance.choice(_LINES).encode()
    return b"\n".join(lines)
