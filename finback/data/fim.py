"""Fill-in-the-middle at document level, in prefix-suffix-middle order (V3 section 4.1)."""

import random

from finback.data.tokenizer import FIM_BEGIN_TOKEN, FIM_END_TOKEN, FIM_HOLE_TOKEN


def fim_document(text: str, *, seed: int, index: int, rate: float) -> str:
    """`text`, or with probability `rate` its rearrangement

        <｜fim▁begin｜>prefix<｜fim▁hole｜>suffix<｜fim▁end｜>middle

    cut at two characters chosen uniformly. The end-of-sentence token follows when the document is packed. The outcome
    depends on (seed, index) only. A text that already holds one of the three tokens is left as it is: it could not be
    put together again.
    """
    generator = random.Random(f"fim/{seed}/{index}")
    if generator.random() >= rate or any(token in text for token in (FIM_BEGIN_TOKEN, FIM_HOLE_TOKEN, FIM_END_TOKEN)):
        return text
    start, stop = sorted((generator.randint(0, len(text)), generator.randint(0, len(text))))
    return f"{FIM_BEGIN_TOKEN}{text[:start]}{FIM_HOLE_TOKEN}{text[stop:]}{FIM_END_TOKEN}{text[start:stop]}"


def reassemble(text: str) -> str:
    """The document that `fim_document` was given."""
    if not text.startswith(FIM_BEGIN_TOKEN):
        return text
    prefix, rest = text.removeprefix(FIM_BEGIN_TOKEN).split(FIM_HOLE_TOKEN, 1)
    suffix, middle = rest.split(FIM_END_TOKEN, 1)
    return prefix + middle + suffix
