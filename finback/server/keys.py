"""Keys, balances and usage in one SQLite file. `finback keys` writes it, the server reads and charges it, also at the same time.

Keys are random, so a plain SHA-256 of them is enough to store. Money is whole nano-yuan. A request is charged once: its id is the
primary key of its row, and row and balance change in one transaction, which a killed process leaves done or not begun. The server
charges in a thread of its own (`Charges`): whoever else writes into the file may keep it locked for long.
"""

import hashlib
import logging
import queue
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import ROUND_HALF_EVEN, Decimal
from pathlib import Path
from typing import NamedTuple

from finback.config import InputError

logger = logging.getLogger("finback.server")

NANO = 10**9
LOCK_SECONDS = 30.0
"""How long whoever reads or writes waits for others that write."""
_VERSION = 1
_SCHEMA = """
CREATE TABLE keys (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, hash TEXT NOT NULL UNIQUE, created REAL NOT NULL, revoked REAL,
    granted INTEGER NOT NULL DEFAULT 0, topped_up INTEGER NOT NULL DEFAULT 0, requests_per_minute INTEGER
);
CREATE TABLE usage (
    request_id TEXT PRIMARY KEY, key_id INTEGER NOT NULL REFERENCES keys(id), finished REAL NOT NULL, model TEXT NOT NULL,
    hit_tokens INTEGER NOT NULL, miss_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, cost INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX usage_by_key ON usage (key_id, finished);
"""


@dataclass(frozen=True)
class Key:
    """A row; money in nano-yuan."""

    id: int
    name: str
    created: float
    revoked: float | None
    granted: int
    topped_up: int
    requests_per_minute: int | None

    @property
    def balance(self) -> int:
        return self.granted + self.topped_up


@dataclass(frozen=True)
class Prices:
    """Nano-yuan per token, and when they are lower."""

    hit: Decimal
    miss: Decimal
    output: Decimal
    off_peak_minutes: tuple[int, int] | None = None
    off_peak_discount: Decimal = Decimal(0)

    def cost(self, hit: int, miss: int, output: int, finished: datetime) -> int:
        """Of one request, by the time of day in UTC at which it finished, in whole nano-yuan."""
        total = self.hit * hit + self.miss * miss + self.output * output
        if self.is_off_peak(finished):
            total *= 1 - self.off_peak_discount
        return int(total.to_integral_value(ROUND_HALF_EVEN))

    def is_off_peak(self, moment: datetime) -> bool:
        if self.off_peak_minutes is None:
            return False
        start, end = self.off_peak_minutes
        minute = moment.hour * 60 + moment.minute
        return start <= minute < end if start <= end else minute >= start or minute < end


def per_token(yuan_per_million: Decimal) -> Decimal:
    """Nano-yuan per token."""
    return yuan_per_million * (NANO // 10**6)


def nano(yuan: Decimal) -> int:
    """An amount in whole nano-yuan."""
    return int((yuan * NANO).to_integral_value(ROUND_HALF_EVEN))


def yuan(amount: int) -> str:
    """An amount as text with at least two places and no more than it needs."""
    text = f"{Decimal(amount) / NANO:.9f}".rstrip("0")
    whole, _, places = text.partition(".")
    return f"{whole}.{places:0<2}"


class KeyStore:
    """The file. Not for several threads; several processes may have it open."""

    def __init__(self, file: Path, *, create: bool = False) -> None:
        """Raises InputError if there is no such file, or it holds something else."""
        if not create and not file.is_file():
            raise InputError(f"there is no file {file}; make it with finback keys add NAME --keys {file}")
        if create and not file.parent.is_dir():
            raise InputError(f"there is no directory {file.parent} for the file {file.name}; make it first")
        self.file = file
        try:
            self._db = _connect(file, LOCK_SECONDS)
            self._db.execute("PRAGMA journal_mode = WAL")
            with _transaction(self._db):
                (version,) = self._db.execute("PRAGMA user_version").fetchone()
                (tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
                if version == 0 and tables == 0 and create:
                    for statement in _SCHEMA.split(";\n"):
                        self._db.execute(statement)
                    self._db.execute(f"PRAGMA user_version = {_VERSION}")
                elif version != _VERSION:
                    raise InputError(f"{file} holds no keys of this version of finback; give another --keys")
        except sqlite3.DatabaseError as error:
            raise InputError(f"{file} cannot be used as a file of keys: {error}; give another --keys") from None
        file.chmod(0o600)

    def close(self) -> None:
        self._db.close()

    def add(self, name: str, balance: int = 0, requests_per_minute: int | None = None) -> str:
        """A new key, which is told here and never again; InputError if the name is taken."""
        secret = f"sk-{secrets.token_urlsafe(32)}"
        try:
            with _transaction(self._db):
                self._db.execute(
                    "INSERT INTO keys (name, hash, created, granted, requests_per_minute) VALUES (?, ?, ?, ?, ?)",
                    (name, _hash(secret), time.time(), balance, requests_per_minute),
                )
        except sqlite3.IntegrityError:
            raise InputError(f"there is a key named {name!r} already; take another name, or revoke it first") from None
        return secret

    def revoke(self, name: str) -> None:
        """No request is taken with the key from now on; its usage stays, and its name is free again."""
        key = self.named(name)
        with _transaction(self._db):
            self._db.execute(
                "UPDATE keys SET revoked = ?, name = name || ' (revoked ' || id || ')' WHERE id = ?", (time.time(), key.id)
            )

    def top_up(self, name: str, amount: int) -> int:
        """Add to a key's balance; the new balance."""
        key = self.named(name)
        with _transaction(self._db):
            self._db.execute("UPDATE keys SET topped_up = topped_up + ? WHERE id = ?", (amount, key.id))
        return self.named(name).balance

    def named(self, name: str) -> Key:
        """InputError if there is none."""
        row = self._row("name = ? AND revoked IS NULL", name)
        if row is None:
            names = ", ".join(key.name for key in self.all() if key.revoked is None) or "none"
            raise InputError(f"there is no key named {name!r} in {self.file}; there are: {names}")
        return row

    def find(self, secret: str) -> Key | None:
        """The key whose text this is, if it is there and not revoked."""
        return self._row("hash = ? AND revoked IS NULL", _hash(secret))

    def get(self, key_id: int) -> Key:
        row = self._row("id = ?", key_id)
        assert row is not None
        return row

    def all(self) -> list[Key]:
        """All of them, in the order in which they were made."""
        with closing(self._db.execute(f"SELECT {_COLUMNS} FROM keys ORDER BY id")) as rows:
            return [Key(*row) for row in rows]

    def usage(self, key_id: int) -> tuple[int, int, int]:
        """Requests, tokens and cost of a key since it was made."""
        row = self._db.execute(
            "SELECT count(*), coalesce(sum(hit_tokens + miss_tokens + output_tokens), 0), coalesce(sum(cost), 0) FROM usage "
            "WHERE key_id = ?",
            (key_id,),
        ).fetchone()
        return int(row[0]), int(row[1]), int(row[2])

    def _row(self, condition: str, value: str | int) -> Key | None:
        row = self._db.execute(f"SELECT {_COLUMNS} FROM keys WHERE {condition}", (value,)).fetchone()
        return None if row is None else Key(*row)


class Charge(NamedTuple):
    """What one request has used."""

    request_id: str
    key_id: int
    model: str
    hit_tokens: int
    miss_tokens: int
    output_tokens: int
    cost: int


class Charges:
    """Writes charges down one after the other, and goes on trying while the file is locked or the disk full. To be used by one thread;
    the writing is done by another."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._outstanding: dict[str, Charge] = {}  # by request
        self._queue: queue.SimpleQueue[tuple[Charge, Future[None]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="charges", daemon=True)
        self._thread.start()

    def add(self, charge: Charge) -> Future[None]:
        """It counts from now on; the future ends when it is written."""
        written: Future[None] = Future()
        written.set_running_or_notify_cancel()  # whoever waits for it cannot take it back
        self._outstanding[charge.request_id] = charge
        self._queue.put((charge, written))
        return written

    def owed(self, key_id: int) -> int:
        """What a key has still to pay. To be asked for after its balance was read: what is written in between then counts once."""
        return sum(charge.cost for charge in list(self._outstanding.values()) if charge.key_id == key_id)

    def close(self, seconds: float) -> list[Charge]:
        """Write what is outstanding; what could not be written by then, each with a line in the log."""
        self._queue.put(None)
        self._thread.join(seconds)
        lost = list(self._outstanding.values())
        for charge in lost:
            logger.error("%s could not be written into, and is owed: %s", self.file, charge)
        return lost

    def _run(self) -> None:
        with closing(_connect(self.file, timeout=1.0)) as db:
            while (item := self._queue.get()) is not None:
                charge, written = item
                try:
                    self._write(db, charge)
                except sqlite3.Error as error:  # no file of ours any more: the request fails, and close tells what is owed
                    logger.exception("%s cannot be written into", self.file)
                    written.set_exception(error)
                else:
                    written.set_result(None)

    def _write(self, db: sqlite3.Connection, charge: Charge) -> None:
        told = False
        while True:
            try:
                with _transaction(db):
                    _charge(db, charge)
                    self._outstanding.pop(charge.request_id, None)  # before it is in the balance, so that it never counts twice
                return
            except sqlite3.OperationalError as error:  # locked, or no room on the disk
                self._outstanding[charge.request_id] = charge
                if not told:
                    logger.warning("%s cannot be written into now (%s); requests are charged later", self.file, error)
                told = True
                time.sleep(0.1)


def _connect(file: Path, timeout: float) -> sqlite3.Connection:
    db = sqlite3.connect(file, isolation_level=None, timeout=timeout)
    db.execute("PRAGMA synchronous = NORMAL")
    db.execute("PRAGMA foreign_keys = ON")
    return db


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # some errors have ended it
            db.execute("ROLLBACK")
        raise


def _charge(db: sqlite3.Connection, charge: Charge) -> None:
    """Write down a request and take its cost from the balance, what was granted first; nothing if it was charged before."""
    added = db.execute(
        "INSERT OR IGNORE INTO usage (request_id, key_id, finished, model, hit_tokens, miss_tokens, output_tokens, cost) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (charge.request_id, charge.key_id, time.time(), *charge[2:]),
    ).rowcount
    if added:
        db.execute(
            "UPDATE keys SET topped_up = topped_up - max(0, ? - max(0, granted)), granted = granted - min(max(0, granted), ?) "
            "WHERE id = ?",
            (charge.cost, charge.cost, charge.key_id),
        )


_COLUMNS = "id, name, created, revoked, granted, topped_up, requests_per_minute"


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def prices(hit: Decimal, miss: Decimal, output: Decimal, hours: tuple[int, int] | None, discount: Decimal) -> Prices:
    """From yuan per million tokens."""
    return Prices(per_token(hit), per_token(miss), per_token(output), hours, discount)


def now() -> datetime:
    return datetime.now(UTC)
