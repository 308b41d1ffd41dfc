"""The page: whole in itself, and in a browser it says what the Python formulas say."""

import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finback.config import InputError
from finback.planner.fit import fit_table
from finback.planner.hardware import HARDWARE
from finback.planner.inference import decode_step, prefill, usual_unit
from finback.planner.page import (
    BATCHES,
    CLUSTERS,
    CONTEXTS,
    DEVICES,
    GLOBAL_BATCH,
    HIT_SHARES,
    SEQUENCE,
    layout_on_page,
    page,
    precision_of,
    units_on_page,
)
from finback.planner.serve import Tariff, Traffic, economics, plan_serve
from finback.planner.train import Prices, evaluate, plan_train
from finback.presets import PRESETS

MODELS = {name: PRESETS[name]().model for name in ("v3-671b", "v2-lite-16b")}
SEEDS = (*range(4), *(random.SystemRandom().getrandbits(32) for _ in range(6)))
"""Four that are always the same, and six that never are."""
BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)


@pytest.fixture(scope="module")
def html() -> str:
    return page(MODELS)


def test_the_page_fetches_nothing(html: str) -> None:
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?!data:)\w|@import|url\(|fetch\(|XMLHttpRequest|import\(""", html)
    assert "default-src 'none'" in html
    assert "/*TABLES*/" not in html
    assert 'name="viewport"' in html


@pytest.mark.parametrize("name", MODELS)
def test_serving_on_the_page_is_the_commands(html: str, name: str) -> None:
    """The tables that the script looks up, against the plan of the same question."""
    start = html.index('{"models"')
    tables = json.JSONDecoder().raw_decode(html, start)[0]
    for cluster in CLUSTERS:
        hardware, row = HARDWARE[cluster], tables["serve"][name][cluster]
        precision = precision_of(hardware)
        units = [usual_unit(MODELS[name], hardware, precision, several) for several in (32, 144)]
        traffic = Traffic(hit_share=0.5)
        if not row["decode"]["4989|8"][2]:  # the command refuses what the page shows as not fitting
            with pytest.raises(InputError, match=r"GB of weights|no request fits|requests of"):
                plan_serve(MODELS[name], hardware, *units, precision=precision, batch=8, traffic=traffic)
            continue
        plan = plan_serve(MODELS[name], hardware, *units, precision=precision, batch=8, traffic=traffic)
        assert row["units"] == [plan.prefill_unit_devices, plan.decode_unit_devices]
        assert row["weights_gb"] == [plan.weight_gb_per_prefill_device, plan.weight_gb_per_decode_device]
        assert row["prefill"]["0.5"] == plan.prefill.tokens_per_second_per_device_with_hits
        assert row["decode"]["4989|8"] == [plan.decode.tpot_ms, plan.decode.tokens_per_second_per_device, plan.decode.fits]


def test_everything_is_said_in_both_languages(html: str) -> None:
    body = html[html.index("<body>") : html.index("<script>")]
    assert body.count('class="en"') == body.count('class="zh"') > 30
    assert all(re.search("[\u4e00-\u9fff]|PUE", text) for text in re.findall(r'class="zh">([^<]+)<', body))
    assert not any(re.search("[\u4e00-\u9fff]", text) for text in re.findall(r'class="en">([^<]+)<', body))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if BROWSER is None:
        pytest.skip("no Chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def tab(browser: Any, html: str, tmp_path: Path) -> Iterator[Any]:
    """The page as a file, in a phone's width; whatever it asks of the network, and whatever it complains of, fails the test."""
    (tmp_path / "plan.html").write_text(html, encoding="utf-8")
    context = browser.new_context(viewport={"width": 390, "height": 844}, locale="en-US")
    opened = context.new_page()
    trouble: list[str] = []
    opened.on("console", lambda message: trouble.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: trouble.append(str(error)))
    opened.on("request", lambda request: trouble.append(request.url) if not request.url.startswith(("file:", "data:")) else None)
    opened.goto((tmp_path / "plan.html").as_uri())
    yield opened
    context.close()
    assert trouble == []


def put(tab: Any, values: dict[str, Any]) -> dict[str, float | None]:
    """Set controls as a person would, and read every number behind the answers."""
    return tab.evaluate(
        """values => {
            for (const [id, value] of Object.entries(values)) {
                const control = document.getElementById(id);
                control.value = value === null ? "" : String(value);
                if (control.value !== (value === null ? "" : String(value))) throw new Error(id + " does not take " + value);
                control.dispatchEvent(new Event("change", {bubbles: true}));
            }
            const all = [...document.querySelectorAll("output[data-value]")];
            return Object.fromEntries(all.map(o => [o.id, o.dataset.value === "" ? null : Number(o.dataset.value)]));
        }""",
        values,
    )


def close(found: float | None, expected: float | None) -> bool:
    return found is expected if expected is None or found is None else found == pytest.approx(expected, rel=1e-9)


def test_training_is_pythons(tab: Any) -> None:
    for seed in SEEDS:
        print(f"seed {seed}")  # which a failure shows
        draw = random.Random(seed)
        name, hardware, devices = draw.choice(list(MODELS)), HARDWARE[draw.choice(CLUSTERS)], draw.choice(DEVICES)
        tokens, pue, carbon = draw.uniform(0.1, 30), draw.uniform(1, 2), draw.uniform(0, 1)
        rent = draw.choice([None, draw.uniform(0.5, 6)])
        found = put(
            tab,
            {
                "train-model": name,
                "train-hardware": hardware.name,
                "train-devices": devices,
                "train-tokens": tokens,
                "train-rent": rent,
                "train-pue": pue,
                "train-carbon": carbon,
            },
        )
        layout, precision = layout_on_page(MODELS[name], hardware, devices), precision_of(hardware)
        plan = plan_train(
            MODELS[name],
            hardware,
            layout,
            frozenset(),
            tokens=tokens * 1e12,
            precision=precision,
            sequence_length=SEQUENCE,
            global_batch_size=GLOBAL_BATCH,
            prices=Prices(rent, pue, kg_co2_per_kwh=carbon),
            compare_dense=False,
        )
        assert close(found["train-hours"], plan.bill.device_hours)
        assert close(found["train-days"], plan.bill.days)
        assert close(found["train-cost"], None if rent is None else plan.bill.cost_usd)
        assert close(found["train-energy"], plan.bill.energy_mwh)
        assert close(found["train-co2"], plan.bill.co2_tonnes)
        assert close(found["train-memory"], plan.best.memory_gb)


def test_serving_is_pythons(tab: Any) -> None:
    for seed in SEEDS:
        print(f"seed {seed}")  # which a failure shows
        draw = random.Random(seed)
        name, hardware = draw.choice(list(MODELS)), HARDWARE[draw.choice(CLUSTERS)]
        batch, context, share = draw.choice(BATCHES), draw.choice(CONTEXTS), draw.choice(HIT_SHARES)
        inputs, outputs, rent = draw.uniform(1, 1000), draw.uniform(1, 300), draw.uniform(0.5, 6)
        tariff = Tariff(draw.uniform(0, 1), draw.uniform(0, 2), draw.uniform(0, 4))
        found = put(
            tab,
            {
                "serve-model": name,
                "serve-hardware": hardware.name,
                "serve-batch": batch,
                "serve-context": context,
                "serve-hits": f"{share:g}",
                "serve-input": inputs,
                "serve-output": outputs,
                "serve-rent": rent,
                "serve-price-hit": tariff.usd_per_million_hit,
                "serve-price-miss": tariff.usd_per_million_miss,
                "serve-price-output": tariff.usd_per_million_output,
            },
        )
        first, second = units_on_page(MODELS[name], hardware)
        filled = prefill(MODELS[name], hardware, first, precision_of(hardware), Traffic.prompt_tokens, share)
        step = decode_step(MODELS[name], hardware, second, precision_of(hardware), batch, context)
        node = hardware.devices_per_node
        money = economics(
            filled,
            node * step.tokens_per_second_per_device,
            node,
            Traffic(inputs * 1e9, outputs * 1e9, share),
            tariff,
            rent,
        )
        assert close(found["serve-tpot"], step.tpot_ms)
        assert close(found["serve-nodes"], money.total_nodes)
        assert close(found["serve-cost"], money.cost_usd_per_day)
        assert close(found["serve-revenue"], money.revenue_usd_per_day)
        assert money.margin is not None
        assert close(found["serve-margin"], 100 * money.margin)
        assert close(found["serve-unit-cost"], money.cost_usd_per_million_output)


def test_what_fits_is_pythons(tab: Any) -> None:
    for seed, name in enumerate(("rtx4090", "laptop-m3max", "laptop-cpu", "h20")):
        context = random.Random(seed).randint(1, 200_000)
        put(tab, {"fit-hardware": name, "fit-context": context})
        lines = tab.evaluate(
            "() => [...document.querySelectorAll('#fit-rows tr')]"
            ".map(row => [Number(row.dataset.most), Number(row.dataset.speed), row.className])"
        )
        rows = fit_table(HARDWARE[name], context)
        assert [most for most, _, _ in lines] == [row.most_context_tokens for row in rows]
        assert [speed for _, speed, _ in lines] == pytest.approx([row.tokens_per_second for row in rows])
        assert [kind == "yes" for _, _, kind in lines] == [row.fits for row in rows]


def test_it_is_readable_on_a_phone_and_in_both_languages(tab: Any) -> None:
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert tab.evaluate("document.querySelectorAll('svg rect').length") > 100
    assert tab.locator("h2").first.inner_text() == "Train"
    for box in tab.evaluate(
        "[...document.querySelectorAll('#fit-rows td, thead th')].map(cell => cell.getBoundingClientRect().right)"
    ):
        assert box <= 390  # the whole table, without scrolling it
    tab.locator("#language").click()
    assert tab.locator("h2").first.inner_text() == "训练"
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_on_a_wide_screen_nothing_is_cut_off(tab: Any) -> None:
    tab.set_viewport_size({"width": 1280, "height": 900})
    inside = "element => element.getBoundingClientRect().right <= element.closest('section').getBoundingClientRect().right"
    assert tab.locator("#schedule-drawing svg").evaluate(inside)
    assert tab.locator("#fit-rows").evaluate(inside)


def test_nonsense_in_a_control_gives_no_number(tab: Any) -> None:
    found = put(tab, {"train-tokens": "", "train-pue": -1, "serve-rent": ""})
    assert (
        found["train-hours"]
        is found["train-cost"]
        is found["train-energy"]
        is found["serve-cost"]
        is found["serve-margin"]
        is None
    )
    assert tab.locator("#train-hours").inner_text() == "?"


def test_the_page_takes_what_the_command_takes(tab: Any) -> None:
    """A grid without carbon is possible; what costs nothing and a building that gives energy back are not."""
    found = put(tab, {"train-tokens": 1, "train-pue": 1, "train-carbon": 0, "train-rent": 0, "serve-rent": 0})
    assert found["train-co2"] == 0
    assert found["train-cost"] is found["serve-cost"] is found["serve-margin"] is found["serve-unit-cost"] is None
    assert put(tab, {"train-pue": 0.9})["train-energy"] is None
    assert put(tab, {"train-tokens": 0})["train-hours"] is None


def test_the_layouts_of_the_page_run() -> None:
    for name, model in MODELS.items():
        for cluster in ("h800", "ascend910c"):
            layout = layout_on_page(model, HARDWARE[cluster], 2048)
            found = evaluate(model, HARDWARE[cluster], layout, precision_of(HARDWARE[cluster]), SEQUENCE, GLOBAL_BATCH)
            assert found.tokens_per_second_per_device > 0, name
