"""What `finback serve` is told: `ServeConfig`. No torch and no FastAPI."""

import ipaddress
import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Literal

import tyro

from finback.config import InputError

_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")


@dataclass(frozen=True)
class ServeConfig:
    """A server over one model directory."""

    directory: Annotated[Path, tyro.conf.Positional]
    """Hugging Face directory with weights, tokenizer and chat template."""
    host: str = "127.0.0.1"
    """Address to listen on. Without keys only the machine itself may ask: 127.0.0.1, ::1 or localhost."""
    port: int = 8000
    """Port to listen on; 0 takes a free one, which is printed."""
    name: str | None = None
    """The model's own name on the wire, beside deepseek-chat and deepseek-reasoner; None: that of its directory."""
    keys: Path | None = None
    """SQLite file of keys, balances and usage, made by finback keys add; None: no key is asked for."""
    price_hit: str = "1"
    """Yuan per million tokens of prompt that were found in the prefix cache (DeepSeek-R1's first price list)."""
    price_miss: str = "4"
    """Yuan per million other tokens of prompt."""
    price_output: str = "16"
    """Yuan per million tokens of answer, thinking included."""
    off_peak: str = ""
    """Hours of the day in UTC, as 16:30-00:30, in which requests that end there are cheaper; none if empty."""
    off_peak_discount: str = "0.75"
    """Share of the price that is left out in these hours."""
    max_num_seqs: int = 32
    """Requests that run at once; others wait."""
    max_waiting: int = 256
    """Requests that may wait; more are refused with 503."""
    max_model_len: int | None = None
    """Longest prompt and answer together; None: the model's context."""
    num_blocks: int | None = None
    """Blocks of 64 tokens in the cache; None: what fits into a quarter of the free memory."""
    num_speculative_tokens: int = 0
    """Tokens that the model's MTP module drafts ahead at each step; 0 is none."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights in memory; auto is that of the files."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    cache_dir: Path | None = None
    """Directory in which cached prefixes are kept over a restart; None: they are forgotten when the server stops."""
    max_request_bytes: int = 4 * 2**20
    """Larger bodies are refused with 413."""
    allow_origin: tuple[str, ...] = ()
    """Origins of web pages elsewhere that may call the API (CORS), such as https://chat.example; none: no page but our own."""
    keep_alive_seconds: float = 10.0
    """After so long without a token a comment (streams) or an empty line (others) keeps the connection open."""
    grace_seconds: float = 5.0
    """When the server is stopped, answers that are being written may take so long to end; the rest is cut off, with an error that
    says so."""
    log_level: Literal["debug", "info", "warning"] = "info"
    """debug also logs each request's length and times; prompts, answers and keys are never logged."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise InputError(f"field port is {self.port}, it must be from 0 to 65535")
        for name in ("max_num_seqs", "max_request_bytes"):
            if getattr(self, name) < 1:
                raise InputError(f"field {name} is {getattr(self, name)}, it must be at least 1")
        if self.max_waiting < 0:
            raise InputError(f"field max_waiting is {self.max_waiting}, it must be at least 0")
        if not self.keep_alive_seconds > 0:
            raise InputError(f"field keep_alive_seconds is {self.keep_alive_seconds}, it must be above 0")
        if not 0 <= self.grace_seconds <= 3600:
            raise InputError(f"field grace_seconds is {self.grace_seconds}, it must be from 0 to 3600")
        if self.keys is None and not is_loopback(self.host):
            raise InputError(
                f"field host is {self.host!r}, where anyone could use the model for nothing; give --keys FILE (finback keys add makes "
                "one), or keep to 127.0.0.1"
            )
        for name in ("price_hit", "price_miss", "price_output", "off_peak_discount"):
            value = decimal(name, getattr(self, name))
            if name == "off_peak_discount" and value > 1:
                raise InputError(f"field {name} is {getattr(self, name)!r}, it must be at most 1")
        if self.off_peak and not _HOURS.fullmatch(self.off_peak):
            raise InputError(f"field off_peak is {self.off_peak!r}, it must be two times of day as in 16:30-00:30")

    @property
    def off_peak_minutes(self) -> tuple[int, int] | None:
        """Minutes of the day in which the cheap hours begin and end."""
        found = _HOURS.fullmatch(self.off_peak)
        if found is None:
            return None
        first, second, third, fourth = map(int, found.groups())
        return first * 60 + second, third * 60 + fourth


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def decimal(name: str, text: str) -> Decimal:
    """A number that is exact, not negative; InputError names the field."""
    try:
        value = Decimal(text)
    except InvalidOperation:
        raise InputError(f"field {name} is {text!r}, it must be a number") from None
    if not value.is_finite() or not 0 <= value <= 10**9:
        raise InputError(f"field {name} is {text!r}, it must be from 0 to 1000000000")
    return value
