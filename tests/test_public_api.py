"""What users and scripts build on stays: names, arguments, defaults, commands and options, as `public_api.txt` lists them."""

from pathlib import Path

from tests.public_api import lines

LISTED = Path(__file__).with_name("public_api.txt")
RENEW = "If that is meant, say so in CHANGELOG.md and renew the list: python -m tests.public_api > tests/public_api.txt"


def test_nothing_that_is_listed_has_gone_or_changed():
    gone = set(LISTED.read_text(encoding="utf-8").splitlines()) - set(lines())
    assert not gone, f"{sorted(gone)} changed. {RENEW}"


def test_every_public_name_argument_command_and_option_is_listed():
    new = set(lines()) - set(LISTED.read_text(encoding="utf-8").splitlines())
    assert not new, f"{sorted(new)} are not in the list. {RENEW}"
