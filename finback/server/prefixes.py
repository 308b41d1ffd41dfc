"""`--cache-dir`: cached prefixes over a restart."""

import logging
from pathlib import Path

from finback.config import InputError
from finback.engine.llm import LLM

FILE = "prefixes.safetensors"
logger = logging.getLogger("finback.server")


def restore_prefixes(llm: LLM, directory: Path) -> None:
    """Take in what an earlier server kept. InputError where nothing can be kept, or what is there cannot be read."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--cache-dir is {directory}, which cannot be made: {error.strerror}; give another directory") from None
    file = directory / FILE
    if file.exists():
        blocks = llm.load_prefix_cache(file)
        logger.info("%d blocks of prefixes are taken from %s", blocks, file)
        if not blocks:
            logger.warning("%s is another model's, or empty; it will be replaced", file)


def keep_prefixes(llm: LLM, directory: Path) -> None:
    """For the next server."""
    logger.info("%d blocks of prefixes are kept in %s", llm.save_prefix_cache(directory / FILE), directory)
