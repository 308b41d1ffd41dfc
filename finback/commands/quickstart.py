"""`finback quickstart`: the whole small run, then how to use what it made."""

from collections.abc import Sequence

from finback.commands.parse import parse_arguments
from finback.presets import nano, nano_dense
from finback.recipes.config import QuickstartConfig


def main(argv: Sequence[str]) -> int:
    """`finback quickstart [--out DIR] [--minutes M] [--seed S] ...`."""
    config = parse_arguments(
        QuickstartConfig,
        argv,
        verb="quickstart",
        description="Train a small model with DeepSeek-V3's architecture on this machine, and teach it to reason as R1 was taught.",
    )
    from finback.recipes.quickstart import quickstart
    from finback.train.session import keep_freed_memory

    keep_freed_memory()
    quickstart(config, nano(), nano_dense())
    return 0
