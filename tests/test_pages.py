"""The web pages: what they show, what a hostile or odd file name does, and what a resumed run finds."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from spade_model.errors import UserError
from spade_model.pages import LOSSES_FILE, PageRow, SamplePage, plot_losses, write_results_page

COLUMNS = ["label", "synthesized"]


def picture(shade: int = 0, size: tuple[int, int] = (6, 4)) -> Image.Image:
    return Image.new("RGB", size, (shade, shade, shade))


class Page(HTMLParser):
    """The tags, texts and pictures of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data.strip())

    def pictures(self) -> list[Path]:
        return [self.path.parent / unquote(attrs["src"] or "") for tag, attrs in self.tags if tag == "img"]

    def shades(self) -> list[int]:
        """Red of every picture's first pixel."""
        return [Image.open(file).tobytes()[0] for file in self.pictures()]

    def reloads(self) -> bool:
        return any(attrs.get("http-equiv") == "refresh" for _, attrs in self.tags)

    def headings(self) -> list[str]:
        return [text for text in self.texts if text.startswith("Step ")]


def test_results_page_shows_what_was_given(tmp_path):
    rows: list[PageRow] = [("a", [picture(1), picture(2)]), ("b", [picture(3), None])]
    path = write_results_page(tmp_path / "new" / "results", "My model", COLUMNS, rows)
    page = Page(path)
    assert path == tmp_path / "new" / "results" / "index.html"
    assert page.shades() == [1, 2, 3]
    assert {"My model", "a", "b", "label", "synthesized", "none", "2 images"} <= set(page.texts)
    assert not page.reloads()


def test_results_are_one_folder_for_each_column(tmp_path):
    write_results_page(tmp_path, "t", COLUMNS, [("a", [picture(), picture()])])
    files = sorted(file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file())
    assert files == ["images/label/a.png", "images/synthesized/a.png", "index.html"]


def test_pictures_of_16_bits_are_shown_with_8(tmp_path):
    bright = Image.fromarray(np.full((4, 6), 60000, dtype=np.uint16))
    page = Page(write_results_page(tmp_path, "t", COLUMNS, [("a", [picture(1), bright])]))
    assert [attrs["href"] for tag, attrs in page.tags if tag == "a"] == [
        "images/label/a.png",
        "images/synthesized/a.png",
    ]
    assert page.pictures()[1] == tmp_path / "previews/synthesized/a.png"
    assert page.shades() == [1, 233]
    kept = Image.open(tmp_path / "images/synthesized/a.png")
    assert (kept.mode, kept.getextrema()) == ("I;16", (60000, 60000))


def test_rows_may_come_from_a_generator(tmp_path):
    page = Page(write_results_page(tmp_path, "t", ["x"], ((str(i), [picture(i)]) for i in range(5))))
    assert len(page.pictures()) == 5


def test_rows_before_an_interruption_have_their_page(tmp_path):
    def rows():
        yield "a", [picture(1)]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_results_page(tmp_path, "t", ["x"], rows())
    assert Page(tmp_path / "index.html").shades() == [1]


def test_an_empty_page(tmp_path):
    assert "0 images" in Page(write_results_page(tmp_path, "t", COLUMNS, [])).texts


def test_small_pictures_are_pixelated_and_large_ones_smooth(tmp_path):
    page = Page(write_results_page(tmp_path, "t", COLUMNS, [("a", [picture(size=(64, 64)), picture(size=(512, 256))])]))
    small, large = (attrs for tag, attrs in page.tags if tag == "img")
    assert small["class"] == "pixelated"
    assert "class" not in large
    assert (large["width"], large["height"]) == ("512", "256")


HOSTILE = [
    "<script>alert(1)</script>",
    '" onerror="alert(1)',
    "../../escape",
    "/etc/passwd",
    "..",
    "",
    "a/b\\c:d?e%20#f",
    "夏の海 été",
    "x" * 400,
    "海" * 400,
    "broken \udcff",
    "line\nbreak",
    "{{ title }}",
]


def test_odd_captions_are_escaped_and_their_files_stay_inside(tmp_path):
    folder = tmp_path / "page"
    page = Page(
        write_results_page(folder, "<i>t</i>", ["<b>"], [(name, [picture(i)]) for i, name in enumerate(HOSTILE)])
    )
    assert not {"script", "i", "b"} & {tag for tag, _ in page.tags}
    assert all("onerror" not in attrs for _, attrs in page.tags)
    assert page.shades() == list(range(len(HOSTILE)))
    assert all(file.resolve().is_relative_to(folder / "images") for file in page.pictures())
    assert {"<script>alert(1)</script>", "夏の海 été", "broken ?", "{{ title }}", "<b>"} <= set(page.texts)
    assert [child.name for child in tmp_path.iterdir()] == ["page"]


def test_equal_names_get_files_of_their_own(tmp_path):
    names = ["a b", "a_b", "A?B", "a_b_2"]
    page = Page(write_results_page(tmp_path, "t", ["x"], [(name, [picture(i)]) for i, name in enumerate(names)]))
    assert page.shades() == [0, 1, 2, 3]
    assert len({file.name.lower() for file in page.pictures()}) == 4


def test_equal_columns_get_folders_of_their_own(tmp_path):
    page = Page(write_results_page(tmp_path, "t", ["x", "x"], [("a", [picture(1), picture(2)])]))
    assert page.shades() == [1, 2]


def test_a_row_of_wrong_length(tmp_path):
    with pytest.raises(ValueError, match="zip"):
        write_results_page(tmp_path, "t", COLUMNS, [("a", [picture()])])


def test_pages_use_nothing_from_elsewhere(tmp_path):
    text = write_results_page(tmp_path, "t", ["x"], [("a", [picture()])]).read_text()
    assert "<script" not in text
    assert "http://" not in text
    assert "https://" not in text


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: write_results_page(folder, "t", ["x"], [("a", [picture()])]),
        lambda folder: write_results_page(folder, "t", ["x"], []),
        lambda folder: SamplePage(folder, "t"),
        lambda folder: plot_losses([], folder / LOSSES_FILE),
    ],
)
def test_a_folder_that_cannot_be_written(tmp_path, write):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="file/page"):
        write(tmp_path / "file" / "page")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_results_page(tmp_path, "old", ["x"], [])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("spade_model.files.os.replace", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_results_page(tmp_path, "new", ["x"], [])
    assert "old" in Page(path).texts
    assert [file.name for file in tmp_path.iterdir()] == ["index.html"]


@pytest.fixture
def sampled(tmp_path) -> SamplePage:
    page = SamplePage(tmp_path, "run")
    for step in (200, 100, 1300):
        page.add(step, COLUMNS, [("a", [picture(step % 256), None])])
    return page


def test_samples_are_newest_first(tmp_path, sampled):
    page = Page(tmp_path / "index.html")
    assert page.headings() == ["Step 1,300", "Step 200", "Step 100"]
    assert page.shades() == [1300 % 256, 200, 100]


def test_the_page_is_there_from_the_start_and_reloads_until_the_end(tmp_path):
    page = SamplePage(tmp_path, "run")
    assert Page(tmp_path / "index.html").reloads()
    page.add(1, COLUMNS, [])
    assert Page(tmp_path / "index.html").reloads()
    page.finish()
    assert not Page(tmp_path / "index.html").reloads()
    assert Page(tmp_path / "index.html").headings() == ["Step 1"]


def test_a_resumed_run_continues_the_page(tmp_path, sampled):
    sampled.finish()
    resumed = SamplePage(tmp_path, "run")
    resumed.add(1400, COLUMNS, [("a", [picture(), picture()])])
    page = Page(tmp_path / "index.html")
    assert page.headings() == ["Step 1,400", "Step 1,300", "Step 200", "Step 100"]
    assert page.reloads()


def test_rewind_drops_later_samples_and_their_pictures(tmp_path, sampled):
    sampled.rewind(200)
    assert Page(tmp_path / "index.html").headings() == ["Step 200", "Step 100"]
    assert sorted(folder.name for folder in (tmp_path / "images").iterdir()) == ["step_00000100", "step_00000200"]
    assert [sample["step"] for sample in json.loads((tmp_path / "samples.json").read_bytes())] == [100, 200]


def test_the_sample_of_a_step_is_replaced(tmp_path, sampled):
    sampled.add(200, COLUMNS, [("b", [picture(7), None])])
    page = Page(tmp_path / "index.html")
    assert page.headings() == ["Step 1,300", "Step 200", "Step 100"]
    assert page.shades()[1] == 7


def test_the_page_of_a_long_run_stays_short(tmp_path):
    page = SamplePage(tmp_path, "run")
    for step in range(1, 121):
        page.add(step, ["x"], [])
    shown = Page(tmp_path / "index.html").headings()
    assert (shown[0], shown[-1], len(shown)) == ("Step 120", "Step 21", 100)
    assert len(json.loads((tmp_path / "samples.json").read_bytes())) == 120


@pytest.mark.parametrize(
    "content", ["[{", "{}x", "3", '[{"step": 1}]', '["a"]', '[{"step": "x", "columns": [], "rows": []}]']
)
def test_a_damaged_manifest(tmp_path, content):
    (tmp_path / "samples.json").write_text(content)
    with pytest.raises(UserError, match=r"samples\.json is damaged"):
        SamplePage(tmp_path, "run")


def test_loss_curves_are_shown_once_they_exist(tmp_path, sampled):
    assert LOSSES_FILE not in (tmp_path / "index.html").read_text()
    plot_losses([{"step": 1, "GAN": 0.5}], tmp_path / LOSSES_FILE)
    sampled.finish()
    assert Page(tmp_path / "index.html").pictures()[0] == tmp_path / LOSSES_FILE


@pytest.mark.parametrize(
    "records",
    [
        [],
        [{"step": 1, "epoch": 1, "time": "now", "GAN": 0.5, "D_Fake": 1.0}],
        [{"step": 1, "GAN": None}, {"step": 2, "GAN": float("nan")}, {"step": 3, "GAN": float("inf")}],
        [{"step": i, "D_real": 1 / i, **({"GAN": i} if i % 3 else {})} for i in range(1, 100)],
    ],
)
def test_losses_of_any_kind_can_be_drawn(tmp_path, records):
    plot_losses(records, tmp_path / "new" / "losses.png")
    with Image.open(tmp_path / "new" / "losses.png") as drawn:
        assert drawn.format == "PNG"
        assert drawn.width > 1000


def test_losses_have_axes_of_their_own(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr("spade_model.pages._draw_curves", lambda axes, title, curves: drawn.update({title: [*curves]}))
    alone, pair = ("KLD", "GAN", "GAN_Feat", "D_R1"), ("D_Fake", "D_real")
    plot_losses([{"step": 1, "epoch": 1, **dict.fromkeys(alone + pair, 0.5)}], tmp_path / "losses.png")
    assert drawn == {**{name: [name] for name in alone}, "Discriminator": [*pair]}


def test_only_losses_are_drawn(tmp_path):
    losses = [{"step": i, "GAN": 1.0} for i in range(9)]
    plot_losses(losses, tmp_path / "a.png")
    plot_losses([{**record, "epoch": 1, "time": "now", "lr": 0.5} for record in losses], tmp_path / "b.png")
    plot_losses([{**record, "VGG": 0.5} for record in losses], tmp_path / "c.png")
    a, b, c = (np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png", "c.png"))
    assert (a == b).all()
    assert (a != c).any()
