"""Stop strings in text that comes in pieces."""

from collections.abc import Sequence


class StopStrings:
    """Feed decoded text as it comes and get the text that is certainly part of the answer.

    Text that may be the beginning of a stop string is held back until it is certain. The answer ends at the stop string that is
    complete first, and of several that end there at the longest: before it, or after it with `include`. What `feed` returned,
    joined, and `flush` at the end, does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """No stop string may be empty."""
        assert all(stops), "an empty stop string ends every answer"
        self.found: str | None = None
        """The stop string that ended the answer."""
        self._include = include
        self._stops = [(stop, _fallbacks(stop)) for stop in stops]
        self._matched = [0] * len(stops)  # how much of each stop string the text now ends with
        self._held = ""

    def feed(self, text: str) -> str:
        """What has become certain with `text`, possibly empty; nothing once a stop string was found."""
        if self.found is not None:
            return ""
        if not self._stops:
            return text
        for end, char in enumerate(text, start=len(self._held) + 1):
            self._advance(char)
            if self.found is not None:
                certain = (self._held + text)[: end if self._include else end - len(self.found)]
                self._held = ""
                return certain
        text = self._held + text
        border = len(text) - max(self._matched)
        self._held = text[border:]
        return text[:border]

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held

    def _advance(self, char: str) -> None:
        for i, (stop, fallbacks) in enumerate(self._stops):
            matched = self._matched[i]
            while matched and stop[matched] != char:
                matched = fallbacks[matched]
            self._matched[i] = matched = matched + (stop[matched] == char)
            if matched == len(stop) and (self.found is None or len(stop) > len(self.found)):
                self.found = stop


def _fallbacks(stop: str) -> list[int]:
    """For each length n < len(stop): the longest proper prefix of stop[:n] that is also its suffix (Knuth, Morris, Pratt)."""
    fallbacks, length = [0, 0], 0
    for char in stop[1:-1]:
        while length and stop[length] != char:
            length = fallbacks[length]
        length += stop[length] == char
        fallbacks.append(length)
    return fallbacks
