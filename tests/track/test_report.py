"""The card, the report and the picture of a run, drawn from its workdir alone."""

from __future__ import annotations

import html.parser
import re
from pathlib import Path

import pytest

from llmjax.core import config as configs
from llmjax.track.cards import fenced
from llmjax.track.lineage import Lineage, trace
from llmjax.track.report import write_report
from llmjax.track.run import short
from tests.track.finished import RESULTS, write_workdir

PNG = b"\x89PNG\r\n\x1a\n"
VOID = {"meta", "img", "source", "link", "br"}


class Page(html.parser.HTMLParser):
    """Checks nesting, collects text and every address the page points to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text, self.addresses = "", list[str]()
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in {"src", "href", "srcset"}]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    write_workdir(tmp_path)
    write_report(tmp_path)
    return tmp_path


def test_the_report_needs_no_other_file(workdir: Path) -> None:
    text = (workdir / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.addresses and all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert "url(" not in text and "@import" not in text


def test_the_report_shows_the_figures_and_escapes_what_a_model_wrote(workdir: Path) -> None:
    page = Page((workdir / "report.html").read_text())
    for expected in ("little", "1.8000", "2.0000", "2.22 M", "3 min 53 s", "2.1 Wh", str(RESULTS["sample"]),
                     "step 200"):
        assert expected in page.text
    assert "b" not in page.open


def test_the_card_names_data_results_energy_and_provenance(workdir: Path) -> None:
    card = (workdir / "card.md").read_text()
    assert "| stdlib | PSF-2.0 | 1,500 | 22,000,000 | 7,200,000 |" in card
    assert "| bits per byte of `gzip -9` | 2.0000 (the model is 10.0% below) |" in card
    for expected in ("**1.8000**", "2.1 Wh and 0.8 g CO2eq", "t" * 32, "55 too_short", "## Limits", "jax "):
        assert expected in card


def test_tables_of_the_card_have_no_holes(workdir: Path) -> None:
    for block in re.findall(r"(?:^\|.*\n)+", (workdir / "card.md").read_text(), re.MULTILINE):
        widths = {line.count("|") for line in block.splitlines()}
        assert len(widths) == 1 and block.splitlines()[1].startswith("|---")


def test_a_run_that_measured_nothing_still_has_a_card(tmp_path: Path) -> None:
    configs.save(configs.resolve({"name": "bare", "task": {"name": "dpo"}}), tmp_path)
    write_report(tmp_path)
    card = (tmp_path / "card.md").read_text()
    assert "Nothing was measured" in card and "Not measured." in card and "No manifest lies with this run" in card


def test_the_picture_is_a_png(workdir: Path) -> None:
    assert (workdir / "loss.png").read_bytes().startswith(PNG)


def test_a_code_block_holds_any_text() -> None:
    assert fenced("a ``` b ```` c").startswith("`````\n")


def test_descent_is_recorded(tmp_path: Path) -> None:
    write_workdir(tmp_path / "base")
    config = configs.resolve({"name": "tuned", "task": {"name": "sft"},
                              "train": {"init_from": str(tmp_path / "base")}})
    configs.save(config, tmp_path / "tuned")
    trace(config, data_hash="", tokenizer_hash="").save(tmp_path / "tuned")
    loaded = Lineage.load(tmp_path / "tuned")
    assert loaded is not None and [run.name for run in loaded.generations] == ["tuned", "little"]
    write_report(tmp_path / "tuned")
    card = (tmp_path / "tuned" / "card.md").read_text()
    assert "| descends from | little |" in card and f"[little]({tmp_path / 'base'}/card.md)" in card


def test_a_changed_config_changes_its_hash() -> None:
    hashes = {trace(configs.resolve({"train": {"seed": seed}}), data_hash="", tokenizer_hash="").config_hash
              for seed in (0, 0, 1)}
    assert len(hashes) == 2


@pytest.mark.parametrize(("value", "text"), [(7, "7"), (999, "999"), (12_340, "12.3 k"), (2.2e6, "2.2 M"),
                                             (8.03e9, "8.03 B")])
def test_counts_for_people(value: float, text: str) -> None:
    assert short(value) == text
