"""Write docs/benchmarks.md, and the tables of the two READMEs, from the JSON files: `python -m bench.report`."""

import io
import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tyro

from bench.cli import NAMES, TITLES
from bench.machine import ROOT
from bench.results import ALONE, HEADINGS, cells, write_text
from finback.data.files import write_atomic

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
PICTURE = Path("images") / "decode_context.png"  # in docs/
_README_ROWS = ("train", "tiny", "decode", "engine", "quant", "checkpoint", "grpo")
_CHINESE = (
    *((": share of the bandwidth floor", "：占带宽下限的比例"), ("4 bits packed", "4 位打包权重")),
    *((": share of the ceiling", "：占矩阵乘法上限的比例"), ("tiny", "tiny 预设训练")),
    *(
        ("training", "训练"),
        ("generate", "生成"),
        ("batch", "批大小"),
        ("save", "保存"),
        ("load, page cache warm", "加载（页缓存热）"),
    ),
    *(("load, page cache cold", "加载（页缓存冷）"), (", with fsync", "，含 fsync"), ("MISSED", "未达到"), ("met", "达到")),
    *(("decode, 1 sequence", "解码，1 条序列"), ("decode, ", "解码，"), (" sequences", " 条序列"), (": acceptance", "：接受率")),
    *(("greedy", "贪心"), ("temperature", "温度"), ("1 draft by MTP", "MTP 起草 1 个词元"), ("no drafts", "不起草")),
    *(("GRPO step", "GRPO 一步"), ("code in the sandbox", "沙箱中的代码"), ("maths", "数学")),
    *((": share without waiting for rewards", "：不等待奖励的时间占比"),),
    *(("first token of", "首个词元，提示长度"), (", prefix cached", "，前缀已缓存"), ("the same, cold", "同一提示，未缓存")),
)
_CHINESE_HEADINGS = {"": "", "finback": "finback", "peer": "对照", "ratio": "倍数", "target": "目标"}

METHOD = """\
# Benchmarks

Written by `python -m bench.report` from the JSON files in `bench/results/`; do not edit.

## How it is measured

- A claim is a ratio to a named peer on the same work in the same run. Competitors take turns (ours, theirs, ours, theirs, ...); those
  that compute have a process each. The tables show medians and half the range between the slowest and the fastest turn.
- Both sides get the same weights and the same tokens, and their first losses (or, in fp32, all generated tokens, or all loaded
  tensors) are compared before a time counts.
- Beside each time stands the floor: the floating-point operations or the bytes that the work needs at least, and how long they would
  take at the ceilings that the same run measured.
- Every JSON file names the device, the commit, whether the tree had changes, and the load of the machine before. Medians still move by
  15-25% between runs on shared machines; ratios move less.

## How to repeat it

```
make bench                          # all, about a quarter of an hour on two idle cores
python -m bench train decode        # some
python -m bench.train --quick       # one, fewer repetitions: to see that it works, not for claims
python -m bench.report              # this page and the READMEs' tables
```
"""


def main(results: Path = ROOT / "bench" / "results", root: Path = ROOT) -> None:
    """Write the pages from the JSON files.

    Args:
        results: Directory of the JSON files.
        root: Directory that holds docs/, README.md and README.zh.md.
    """
    found: dict[str, Any] = {
        name: json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
        for name in NAMES
        if (results / f"{name}.json").is_file()
    }
    if not found:
        raise SystemExit(f"{results} holds no results; run python -m bench first")
    (root / "docs").mkdir(exist_ok=True)
    if "decode" in found:
        draw_context(found["decode"]["rows"], root / "docs" / PICTURE)
    write_text(root / "docs" / "benchmarks.md", METHOD + "".join(section(name, result, root) for name, result in found.items()))
    for readme, chinese in (("README.md", False), ("README.zh.md", True)):
        path = root / readme
        if path.is_file():
            fill(path, readme_table(found, chinese))


def section(name: str, result: Mapping[str, Any], root: Path) -> str:
    """One benchmark's part of the page."""
    headings = HEADINGS if any(row["peer"] for row in result["rows"]) else ALONE
    lines = [
        "",
        f"## {TITLES[name]}",
        "",
        f"{provenance(result)}.",
        "",
        *markdown_table(headings, [cells(row) for row in result["rows"]]),
        "",
    ]
    for part in result.get("time_shares", []):
        if part is result["time_shares"][0]:
            lines += ["Where the time of a bf16 step goes:", "", "| part | ms | share |", "|---|---:|---:|"]
        lines.append(f"| {part['category']} | {part['milliseconds']:.1f} | {part['share']:.1%} |")
    if result.get("time_shares"):
        lines.append("")
    if name == "decode" and (root / "docs" / PICTURE).is_file():
        lines += [f"![Time of one decode step against the cached tokens]({PICTURE.as_posix()})", ""]
    return "\n".join([*lines, *(f"- {note}" for note in result["notes"]), ""])


def draw_context(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The time of one decode step against the cached tokens, a panel for each dtype. Nothing is drawn without matplotlib."""
    points = [row for row in rows if "cached_tokens" in row]
    if not points or find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure  # without pyplot: no windows, no global state
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(9, 4.2), layout="constrained", facecolor="white")
    precisions = list(dict.fromkeys(row["precision"] for row in points))
    panels = figure.subplots(1, len(precisions), sharey=True, squeeze=False)[0]
    for axes, precision in zip(panels, precisions, strict=True):
        of_it = [row for row in points if row["precision"] == precision]
        tokens = [row["cached_tokens"] for row in of_it]
        lines = (
            ("expanded, in torch", "peer_milliseconds", "#d1495b"),
            ("absorbed, in torch", "absorbed_in_torch_milliseconds", "#8aa9d6"),
            ("absorbed, the engine's step", "milliseconds", "#1f5fa8"),
        )
        for label, key, colour in lines:
            axes.plot(tokens, [row[key] for row in of_it], color=colour, marker="o", markersize=4, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(tokens, [f"{count:,}" for count in tokens])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(precision, fontsize=11, loc="left")
        axes.set_xlabel("cached tokens", fontsize=9.5)
        axes.grid(color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=9)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
    panels[0].set_ylabel("ms per decode step, batch 1", fontsize=9.5)
    panels[0].legend(fontsize=9, frameon=False, loc="upper left")
    figure.suptitle("MLA: latents used as they are, or expanded first", x=0.01, ha="left", fontsize=12, fontweight="bold")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, picture.getvalue())


def provenance(result: Mapping[str, Any]) -> str:
    """Device, versions, commit, date; and what makes the numbers less than a claim."""
    device = result["device"]
    flags = [flag for flag, there in (device["cpu_flags"] or {}).items() if there]
    commit = (result["commit"] or "unknown")[:12] + (" with changes" if result["dirty"] else "")
    doubts = [
        text
        for text, true in (("a quick run, no claim", result["quick"]), ("on a busy machine, no claim", result["busy"]))
        if true
    ]
    parts = [
        f"{device['cpu']}, {device['cores']} cores, {device['threads']} threads, {', '.join(flags)}",
        f"torch {device['torch']} ({device['torch_build']})",
        *(f"{name} {version}" for name, version in result["peers"].items()),
        f"commit {commit}, {result['date'][:10]}",
        *doubts,
    ]
    return "; ".join(parts)


def readme_table(found: Mapping[str, Mapping[str, Any]], chinese: bool) -> str:
    """The rows with a peer or a target of the benchmarks that concern users, without floors."""
    body = []
    for name in _README_ROWS:
        for row in found.get(name, {"rows": []})["rows"]:
            if row["target"] is not None or (name == "checkpoint" and "FP8" not in row["name"]):
                body.append(cells(row)[:-1])
    headings = [_CHINESE_HEADINGS[heading] if chinese else heading for heading in HEADINGS[:-1]]
    if chinese:
        body = [[_to_chinese(cell) for cell in line] for line in body]
    return "\n".join([*markdown_table(headings, body), "", *_sources(found)])


def _sources(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Where the rows come from: a line for each machine, commit and day, with the benchmarks that it made."""
    made: dict[str, list[str]] = {}
    for name in _README_ROWS:
        if name in found:
            made.setdefault(provenance(found[name]), []).append(f"`{name}`")
    return [f"- {', '.join(names)}: {source}" for source, names in made.items()]


def _to_chinese(text: str) -> str:
    for english, chinese in _CHINESE:
        text = text.replace(english, chinese)
    return text


def markdown_table(headings: Any, body: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(headings) + " |", "|---|---:|---|---:|---:|---|"[: None if len(headings) == 6 else -4]]
    return lines + ["| " + " | ".join(line) + " |" for line in body]


def fill(path: Path, table: str) -> None:
    """Put `table` between the markers of the file; a file without them stays as it is."""
    text = path.read_text(encoding="utf-8")
    if BEGIN in text and END in text:
        before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
        write_text(path, f"{before}\n{table}\n{after}")


if __name__ == "__main__":
    tyro.cli(main, prog="python -m bench.report")
