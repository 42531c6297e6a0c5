"""Stop texts: which token of a response completes one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from spo.config.policy import PolicyConfig
from spo.models.tokenizer import exact_text, load_tokenizer
from spo.records import Request

UNFINISHED = "\ufffd"  # what a tokenizer decodes the first bytes of a character to


class StopTexts:
    """Finds the token that completes a stop text, from the last few tokens of a response.

    A text may span several tokens, and begin or end in the middle of one.

    Args:
        decode: token ids -> their text, special tokens included.
    """

    def __init__(self, decode: Callable[[list[int]], str]):
        self.decode = decode
        self._pieces: dict[int, str] = {}  # token -> its text, read alone

    def completed(
        self,
        stop: Sequence[str],
        token_ids: Sequence[int],  # of a sample
        before: Sequence[int] = (),  # tokens of the same response before the sample
    ) -> bool:
        """Whether the last token completes one of the texts, none of whose ends lie before it."""
        piece = self._piece(token_ids[-1])
        # The last character of a text is in the token that completes it. A token that is read
        # alone may lack its leading space, and the rest of a character that it ends.
        if UNFINISHED not in piece and not any(s[-1] in piece or s[-1].isspace() for s in stop):
            return False
        # A token adds a byte or more. One more stands in front, as the first loses its space, and
        # up to three where the first begins inside a character.
        longest, tail, text = max(len(s.encode()) for s in stop), [], ""
        for size in range(longest + 1, longest + 5):
            tail = list(token_ids[-size:])
            if len(tail) < size:
                tail = [*before[len(tail) - size :], *tail]
            text = self.decode(tail)
            if not text.startswith(UNFINISHED):
                break
        known = len(self.decode(tail[:-1]).rstrip(UNFINISHED))
        return any(text.find(s, max(0, known - len(s) + 1)) >= 0 for s in stop)

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            self._pieces[token] = self.decode([token])
        return self._pieces[token]


def stop_texts(model: str, trust_remote_code: bool = False) -> StopTexts:
    """With the tokenizer of a model, by folder or hub id. Raises ValueError if it has none."""
    source = PolicyConfig(path=model, trust_remote_code=trust_remote_code)
    return StopTexts(partial(exact_text, load_tokenizer(source)))


def drawn_before(request: Request) -> tuple[int, ...]:
    """The part of the response that earlier samples drew: the end of the request's prefix."""
    return () if request.prompt_size is None else request.prefix_ids[request.prompt_size :]
