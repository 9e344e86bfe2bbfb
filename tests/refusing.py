"""Input that may be refused, but only as a user should see it refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def or_refused(*words: object, kinds: tuple[type[Exception], ...] = (ValueError,)) -> Iterator[None]:
    """What happens inside goes through, or ends in an error of these kinds whose message holds these words."""
    try:
        yield
    except kinds as error:
        missing = [word for word in map(str, words) if word not in str(error)]
        if missing or not str(error):
            raise AssertionError(f"the refusal does not name {missing}: {error!r}") from error
