"""Whole messages over a socket, and what the messages of a reward pool are.

From the pool down to a worker go samples, pickled by the pool itself. Back up come reports in a fixed layout: what a worker sends is
never unpickled, and a worker's standard output is not this channel, so printing a score does not make one.
"""

import pickle
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finback.rewards.reward import FAILURE_KINDS, Outcome

_LENGTH = struct.Struct("!I")
_SAMPLE = struct.Struct("!QH")  # number of the sample, component to begin with
_REPORT = struct.Struct("!QHBdI")  # number, component, 0 for a value or the failure's place in FAILURE_KINDS from 1, value, steps
_STEP = struct.Struct("!qd")  # where it ends, its reward
_READ_BYTES = 1 << 18
MAX_MESSAGE_BYTES = (1 << 32) - 1


class Channel:
    """Messages of any length over one end of a socket pair, blocking or not as the socket is."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.closed = False
        """The other end is gone."""
        self._incoming = bytearray()
        self._outgoing = bytearray()

    def fileno(self) -> int:
        return self.connection.fileno()

    def close(self) -> None:
        self.closed = True
        self.connection.close()

    @property
    def unsent(self) -> bool:
        """Whether `flush` has something left to write."""
        return bool(self._outgoing) and not self.closed

    def send(self, message: bytes) -> None:
        """Send a message; where the socket does not block, what it cannot take now waits for `flush`."""
        self._outgoing += _LENGTH.pack(len(message))
        self._outgoing += message
        self.flush()

    def flush(self) -> None:
        while self.unsent:
            try:
                sent = self.connection.send(self._outgoing[:_READ_BYTES])
            except BlockingIOError:
                return
            except (BrokenPipeError, ConnectionResetError):
                self.closed = True
                return
            del self._outgoing[:sent]

    def receive(self) -> list[bytes] | None:
        """One read: the messages that it completes, possibly none; None where nothing is there to read or nothing will come."""
        try:
            chunk = self.connection.recv(_READ_BYTES)
        except BlockingIOError:
            return None
        except ConnectionResetError:
            chunk = b""
        if not chunk:
            self.closed = True
            return None
        self._incoming += chunk
        messages, place = [], 0
        while len(self._incoming) - place >= _LENGTH.size:
            begin = place + _LENGTH.size
            end = begin + int(_LENGTH.unpack_from(self._incoming, place)[0])
            if end > len(self._incoming):
                break
            messages.append(bytes(self._incoming[begin:end]))
            place = end
        del self._incoming[:place]
        return messages


@dataclass(frozen=True)
class Report:
    """What one reward gave one sample."""

    number: int
    component: int
    outcome: Outcome

    def encode(self) -> bytes:
        kind = 0 if self.outcome.failure is None else 1 + FAILURE_KINDS.index(self.outcome.failure)
        steps = self.outcome.steps
        head = _REPORT.pack(self.number, self.component, kind, self.outcome.value, len(steps))
        return head + b"".join(_STEP.pack(*step) for step in steps) + self.outcome.sentence.encode(errors="replace")

    @staticmethod
    def decode(message: bytes) -> "Report":
        number, component, kind, value, count = _REPORT.unpack_from(message)
        end = _REPORT.size + count * _STEP.size
        steps = tuple(_STEP.iter_unpack(message[_REPORT.size : end]))
        sentence = message[end:].decode(errors="replace")
        return Report(number, component, Outcome(value, FAILURE_KINDS[kind - 1] if kind else None, sentence, steps))


def encode_sample(prompt: str, completion: str, example: Mapping[str, Any]) -> bytes:
    return pickle.dumps((prompt, completion, dict(example)), protocol=pickle.HIGHEST_PROTOCOL)


def decode_sample(content: bytes) -> tuple[str, str, Mapping[str, Any]]:
    prompt, completion, example = pickle.loads(content)
    return prompt, completion, example


def address(number: int, component: int, content: bytes) -> bytes:
    """The message that asks for a sample's score from `component` on."""
    return _SAMPLE.pack(number, component) + content


def read_address(message: bytes) -> tuple[int, int, bytes]:
    number, component = _SAMPLE.unpack_from(message)
    return number, component, message[_SAMPLE.size :]
