"""Does a writer gain by another model's thought? The pair beside its halves: python -m bench.pairing PLANNER WRITER PROBLEMS."""

import json
import math
import sys
from pathlib import Path

from finback.engine.config import SamplingParams
from finback.recipes.pairing import LocalSpeaker, Pair, Speaker, plan_and_write
from finback.rewards.answers import final_answer


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95% interval of a share."""
    z, share = 1.96, right / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return middle - half, middle + half


def main(planner: str, writer: str, problems: str, count: int = 200, max_tokens: int = 96) -> None:
    """Greedy answers to the first `count` problems by the planner alone, the writer alone, and both."""
    rows = [json.loads(line) for line in Path(problems).read_text(encoding="utf-8").splitlines()][:count]
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    pair = Pair(LocalSpeaker(Path(planner)), LocalSpeaker(Path(writer)))

    def alone(speaker: Speaker, question: str) -> str:
        return "".join(said.content for said in speaker.say([{"role": "user", "content": question}], params, None))

    ways = {
        "planner alone": lambda question: alone(pair.planner, question),
        "writer alone": lambda question: alone(pair.writer, question),
        "planner and writer": lambda question: plan_and_write(pair, question, params)[1],
    }
    for name, answer in ways.items():
        right = sum(final_answer("", answer(row["prompt"])) == row["answer"] for row in rows)
        low, high = wilson(right, len(rows))
        print(f"| {name} | {right} of {len(rows)} | {right / len(rows):.1%} | {low:.1%} to {high:.1%} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], *map(int, sys.argv[4:]))
