"""`finback keys`: who may use a server, and for how much."""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from finback.commands.parse import parse_arguments
from finback.config import InputError, nearest
from finback.server.config import decimal
from finback.server.keys import Key, KeyStore, nano, yuan


@dataclass(frozen=True)
class AddFields:
    """Make a key. It is printed once and stored as a hash only."""

    name: Positional[str]
    """Whose key it is."""
    keys: Path = Path("finback-keys.sqlite")
    """The file of keys; made if it is not there."""
    balance: str = "10"
    """Yuan that the key starts with."""
    requests_per_minute: int | None = None
    """Most requests in a minute; None is no limit."""


@dataclass(frozen=True)
class ListFields:
    """Show every key with its balance and usage."""

    keys: Path = Path("finback-keys.sqlite")
    """The file of keys."""


@dataclass(frozen=True)
class RevokeFields:
    """Take a key back: no request is taken with it from now on."""

    name: Positional[str]
    """Whose key it is."""
    keys: Path = Path("finback-keys.sqlite")
    """The file of keys."""


@dataclass(frozen=True)
class TopUpFields:
    """Add to a key's balance."""

    name: Positional[str]
    """Whose key it is."""
    amount: Annotated[str, tyro.conf.Positional]
    """Yuan."""
    keys: Path = Path("finback-keys.sqlite")
    """The file of keys."""


def main(argv: list[str]) -> int:
    """`finback keys add NAME | list | revoke NAME | top-up NAME AMOUNT [--keys FILE]`."""
    actions = {"add": add, "list": show, "revoke": revoke, "top-up": top_up}
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: finback keys add NAME | list | revoke NAME | top-up NAME AMOUNT  [--keys FILE]\n")
        print(
            "Keys, balances and usage of finback serve --keys FILE. finback keys add takes --balance YUAN and --requests-per-minute N,"
        )
        print("too; finback keys add --help says more, and so for each of them.")
        return 0
    if argv[0].startswith("-"):
        raise InputError(f"unknown field {argv[0]}; an action comes first: {', '.join(actions)}")
    if argv[0] not in actions:
        raise InputError(f"unknown action {argv[0]!r}; there are {', '.join(actions)}{nearest(argv[0], list(actions))}")
    return actions[argv[0]](argv[1:])


def add(argv: list[str]) -> int:
    fields = parse_arguments(AddFields, argv, verb="keys add", description=AddFields.__doc__)
    if not fields.name.strip():
        raise InputError("the name of a key is empty; give one")
    if fields.requests_per_minute is not None and fields.requests_per_minute < 1:
        raise InputError(f"--requests-per-minute is {fields.requests_per_minute}, it must be at least 1")
    balance = nano(decimal("balance", fields.balance))
    secret = KeyStore(fields.keys, create=True).add(fields.name, balance, fields.requests_per_minute)
    print(secret)
    return 0


def show(argv: list[str]) -> int:
    fields = parse_arguments(ListFields, argv, verb="keys list", description=ListFields.__doc__)
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    store = KeyStore(fields.keys)
    table = Table(box=box.SIMPLE)
    for heading in ("name", "made", "balance (yuan)", "requests", "tokens", "spent (yuan)", "requests a minute"):
        table.add_column(heading, justify="left" if heading in ("name", "made") else "right")
    for key in store.all():
        requests, tokens, cost = store.usage(key.id)
        limit = "no limit" if key.requests_per_minute is None else str(key.requests_per_minute)
        made = datetime.fromtimestamp(key.created, UTC).strftime("%Y-%m-%d")
        table.add_row(Text(_name(key)), made, yuan(key.balance), f"{requests:,}", f"{tokens:,}", yuan(cost), limit)
    Console().print(table)
    return 0


def _name(key: Key) -> str:
    return key.name if key.revoked is None or "(revoked" in key.name else f"{key.name} (revoked)"


def revoke(argv: list[str]) -> int:
    fields = parse_arguments(RevokeFields, argv, verb="keys revoke", description=RevokeFields.__doc__)
    KeyStore(fields.keys).revoke(fields.name)
    print(f"the key {fields.name!r} is revoked")
    return 0


def top_up(argv: list[str]) -> int:
    fields = parse_arguments(TopUpFields, argv, verb="keys top-up", description=TopUpFields.__doc__)
    amount = nano(decimal("amount", fields.amount))
    if amount < 1:
        raise InputError(f"the amount is {fields.amount}, it must be above 0")
    print(f"the key {fields.name!r} has {yuan(KeyStore(fields.keys).top_up(fields.name, amount))} yuan")
    return 0
