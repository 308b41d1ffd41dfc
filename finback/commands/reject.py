"""`finback reject`: sample a model, keep what passes every check, as conversations for `finback sft`."""

from collections.abc import Sequence

from finback.commands.parse import parse_arguments
from finback.recipes.sampling_config import RejectConfig


def main(argv: Sequence[str]) -> int:
    """`finback reject MODEL --data FILE --reward module:function[:threshold] --out FILE.jsonl [--num-samples 4 --keep 2 ...]`."""
    config = parse_arguments(
        RejectConfig,
        argv,
        verb="reject",
        description="Sample a model and keep what passes every check, as conversations that finback sft takes.",
    )
    from finback.recipes.sampling import reject

    reject(config)
    return 0
