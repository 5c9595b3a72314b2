"""The page of a plan: complete, escaped, nothing loaded from elsewhere, readable at two widths."""

from __future__ import annotations

import html.parser
import shutil
import subprocess
from pathlib import Path

import pytest

from llmjax.plan import cost, failures
from llmjax.plan.compile import HbmBytes
from llmjax.plan.count import Collective, OpGroup
from llmjax.plan.objections import Objection
from llmjax.plan.page import html_page
from llmjax.plan.report import ParameterRow, Plan, compare, describe

VOID = {"meta", "link", "br"}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
GB = 10**9

PLAN = Plan(
    name="little <b>", topology="v5p:4x4x4", chips=64, mesh={"fsdp": 64}, remat="full", accumulation=1,
    num_params=8_030_261_248, tokens_per_step=2**20, steps=1000,
    hbm_bytes_per_chip=HbmBytes(argument=2 * GB, output=2 * GB, temp=15 * GB, alias=2 * GB, peak=14 * GB,
                                total=17 * GB, capacity=95 * 2**30),
    hbm_by_kind={"parameters": GB // 2, "optimiser": GB, "batch": GB // 2, "temporaries": 15 * GB},
    model_flops_per_chip=843e12, compute_seconds=2.7, exposed_communication_seconds=0.1, step_seconds=2.8,
    tokens_per_second=374_491.0, estimated_mfu=0.65, bound="compute",
    ops=tuple(OpGroup(f"backward: op{i}", 10, 1.0 / (i + 1)) for i in range(12)),
    collectives=(Collective("all-gather", "fsdp", "bf16", asynchronous=True, count=64, bytes=16 * GB, seconds=0.2,
                            exposed_seconds=0.1),),
    kernels_without_bundles=0, cost=cost.run_cost("v5p", chip_hours=50.0),
    carbon=cost.run_carbon("v5p", chip_hours=50.0),
    failures=failures.expect(chips=64, step_seconds=2.8, steps=1000, every=100, checkpoint_bytes=96e9),
    objections=(Objection("sizing", "0.1 tokens a parameter & more"),),
    parameters=(ParameterRow("blocks/attn/q", (32, 4096, 32, 128), "-, fsdp, -, -", 33_554_432),),
    lower_seconds=1.0, compile_seconds=30.0, versions={"jax": "0.10.2"},
)  # fmt: skip


class Reader(html.parser.HTMLParser):
    """Notes what is open, what is loaded and what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset") and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_needs_nothing_beside_it() -> None:
    page = html_page(PLAN)
    reader = Reader()
    reader.feed(page)
    assert reader.open == [] and "<script" not in page
    assert [load for load in reader.loads if not load.startswith("data:")] == []
    assert "width=device-width" in page and "little <b> on v5p:4x4x4" in reader.text
    for shown in ("2.800", "65.0%", "blocks/attn/q", "0.1 tokens a parameter & more", "other compute", "4.20",
                  "15.8 of 95 GiB", "compiler output", "model:"):
        assert shown in reader.text


def test_what_a_person_reads_in_the_terminal() -> None:
    text = describe(PLAN)
    assert "objection: 0.1 tokens" in text and "64 a step, async, 0.100 of 0.200 s exposed" in text
    rows = compare([PLAN, PLAN]).splitlines()
    assert len(rows) == 3 and len(set(map(len, rows))) == 1 and "v5p:4x4x4" in rows[1]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
@pytest.mark.parametrize("width", [400, 1280])
def test_a_browser_shows_it_without_scrolling_sideways_or_breaking_words(tmp_path: Path, width: int) -> None:
    """In a frame, for no window is narrower than 500 pixels; the title tells the sizes of what is in it."""
    (tmp_path / "plan.html").write_text(html_page(PLAN))
    measure = ("const page = document.querySelector('iframe').contentDocument.documentElement;"
               "const rows = [...page.querySelectorAll('.wide tr')].map(row => row.offsetHeight);"
               "document.title = page.scrollWidth + ' ' + Math.max(...rows)")
    (tmp_path / "frame.html").write_text(f'<iframe src="plan.html" width="{width}" height="900" style="border:0" '
                                         f'onload="{measure}"></iframe>')
    assert BROWSER
    done = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
                           "--enable-logging=stderr", "--dump-dom", (tmp_path / "frame.html").as_uri()],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert "CONSOLE" not in done.stderr
    wide, tallest_row = map(int, done.stdout.partition("<title>")[2].partition("<")[0].split())
    assert wide <= width and tallest_row < 60
