"""What bad input raises: cases are what a call is given, and how the message begins, a regular expression."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import pytest


def by_argument(bad: Sequence[tuple]) -> pytest.MarkDecorator:
    """`cases` of a test: those whose messages begin with the same argument's name, which is the id."""
    named: dict[str, list[tuple]] = {}
    for case in bad:
        named.setdefault(re.match(r"\w+", case[-1])[0], []).append(case)
    return pytest.mark.parametrize("cases", list(named.values()), ids=list(named))


def assert_each_raises(error: type[Exception], op: str, call: Callable, cases: Sequence[tuple]) -> None:
    """All of them, and a failure names each that does not."""
    wrong = []
    for *given, message in cases:
        try:
            call(*given)
            wrong.append(f"nothing raised, wanted {message!r}")
        except error as raised:
            if not re.match(f"{op}: {message}", str(raised)):
                wrong.append(f"got {str(raised)!r}, wanted {message!r}")
        except Exception as raised:
            wrong.append(f"got {raised!r}, wanted {message!r}")
    assert not wrong, "\n".join(wrong)
