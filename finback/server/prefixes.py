"""`--cache-dir`: cached prefixes over a restart."""

import logging
from pathlib import Path

from finback.config import InputError
from finback.engine.llm import LLM

FILE = "prefixes.safetensors"
logger = logging.getLogger("finback.server")


def restore_prefixes(llm: LLM, directory: Path) -> None:
    """Take in what an earlier server kept. A file that is damaged or another model's is set aside. InputError where nothing can be
    kept."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--cache-dir is {directory}, which cannot be made: {error.strerror}; give another directory") from None
    file = directory / FILE
    if not file.exists():
        return
    try:
        blocks, trouble = llm.load_prefix_cache(file), f"{file} is another model's"
    except InputError as error:
        blocks, trouble = 0, str(error).removesuffix("; remove it")
    if blocks:
        logger.info("%d blocks of prefixes are taken from %s", blocks, file)
        return
    aside = file.with_name(f"{FILE}.aside")
    file.replace(aside)
    logger.warning("%s; it is set aside as %s, and the server starts without cached prefixes", trouble, aside.name)


def keep_prefixes(llm: LLM, directory: Path) -> None:
    """For the next server."""
    file = directory / FILE
    blocks = llm.save_prefix_cache(file)
    logger.info("%d blocks of prefixes are kept in %s", blocks, directory)
    if not blocks:
        file.unlink()  # the next server would take it for another model's
