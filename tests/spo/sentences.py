"""What an error must be: one sentence that names what is wrong."""

from contextlib import contextmanager

import pytest


@contextmanager
def one_sentence(words):
    """A ValueError of one line that holds every one of the words."""
    with pytest.raises(ValueError) as error:
        yield
    said = str(error.value)
    assert "\n" not in said, said
    for word in words:
        assert word in said, said
