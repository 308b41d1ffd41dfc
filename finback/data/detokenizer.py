"""Text from tokens as they come, in whole characters."""

import codecs

from finback.data.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Feed token ids one at a time and get text that never ends inside a character.

    A character split over several tokens (Chinese, emoji) is held back until its last byte has come. Bytes that cannot
    be UTF-8 become U+FFFD. What `feed` returned, joined, and `flush` at the end, equal `decode` of all ids at once.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.control_token_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        """The text that has become certain with this token, possibly empty."""
        if token_id in self._skipped:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """What remains at the end: U+FFFD if the last character never became whole, else nothing. The state is empty
        afterwards."""
        return self._decoder.decode(b"", final=True)
