"""Web pages of pictures: the results of a model, and the samples and loss curves of a training run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from spade_model.errors import UserError
from spade_model.files import replacing
from spade_model.legend import LegendEntry
from spade_model.visualize import preview

PageRow = tuple[str, Sequence[Image.Image | None]]
"""A caption, and one picture (or none) for each column."""

LOSSES_FILE = "losses.png"
"""Name of the file with the loss curves in a `SamplePage`'s folder."""

_REFRESH_SECONDS = 30
# A long run has thousands of samples; a page that reloads itself cannot show them all.
_SHOWN_SAMPLES = 100


class _Picture(TypedDict):
    file: str
    preview: str
    """The file that the page shows; for 16-bit pictures an 8-bit copy. Manifests of earlier versions lack it."""
    width: int
    height: int


class _Row(TypedDict):
    caption: str
    pictures: list[_Picture | None]


class _Sample(TypedDict):
    step: int
    columns: list[str]
    rows: list[_Row]


def write_results_page(
    folder: Path, title: str, columns: Sequence[str], rows: Iterable[PageRow], legend: Sequence[LegendEntry] = ()
) -> Path:
    """Saves pictures as folder/images/<column>/<caption>.png and a page that shows them.

    For 16-bit pictures the page shows 8-bit copies from folder/previews, which link to the pictures.

    File names are the captions with unsafe characters replaced, numbered where two would be equal. Files of an
    earlier page with the same names are replaced; others are kept. `rows` is read once, so it may be a generator. If it
    raises, or is interrupted, the page shows the rows before that.

    Returns:
        The page, folder/index.html.

    Raises:
        UserError: the folder cannot be written.
        ValueError: a row has more or fewer pictures than there are columns.
    """
    saved: list[_Row] = []

    def write() -> Path:
        section = {"heading": "", "columns": list(columns), "rows": saved}
        note = _count(len(saved), "image")
        return _write_page(folder, title=title, note=note, sections=[section], legend=legend)

    try:
        for row in _save_rows(folder, "images", columns, rows):
            saved.append(row)
    except BaseException:
        if saved:
            with suppress(UserError):
                write()
        raise
    return write()


class SamplePage:
    """The page of a training run: loss curves on top, then samples, newest first. It reloads itself until `finish`.

    `legend` has the classes of the masks. A resumed run keeps the samples listed in folder/samples.json. The loss
    curves are the file `LOSSES_FILE` in the folder, which `plot_losses` can write. Every file is replaced atomically: a
    browser never reads a partial file.

    Raises (every method and the constructor):
        UserError: the folder cannot be written, or samples.json is damaged.
    """

    def __init__(self, folder: Path, title: str, legend: Sequence[LegendEntry] = ()) -> None:
        self._folder, self._title, self._legend = folder, title, legend
        self._training = True
        self._samples = _read_manifest(self._manifest)
        self._write()

    def add(self, step: int, columns: Sequence[str], rows: Iterable[PageRow]) -> None:
        """Adds the sample of a step, or replaces an earlier sample of this step.

        Raises:
            ValueError: a row has more or fewer pictures than there are columns.
        """
        saved = list(_save_rows(self._folder, _step_folder(step), columns, rows))
        others = [sample for sample in self._samples if sample["step"] != step]
        added = _Sample(step=step, columns=list(columns), rows=saved)
        self._samples = sorted([*others, added], key=lambda sample: sample["step"])
        self._write()

    def rewind(self, step: int) -> None:
        """Removes the samples after a step, and their pictures, for a run that resumes at that step."""
        dropped = [sample["step"] for sample in self._samples if sample["step"] > step]
        self._samples = [sample for sample in self._samples if sample["step"] <= step]
        self._write()
        for later in dropped:
            shutil.rmtree(self._folder / _step_folder(later), ignore_errors=True)

    def finish(self) -> None:
        """Stops the page from reloading itself, at the end of training."""
        self._training = False
        self._write()

    @property
    def _manifest(self) -> Path:
        return self._folder / "samples.json"

    def _write(self) -> None:
        _replace_file(self._manifest, json.dumps(self._samples).encode())
        shown = self._samples[: -_SHOWN_SAMPLES - 1 : -1]
        note = _count(len(self._samples), "sample") + ", newest first"
        if len(shown) < len(self._samples):
            note += f"; the latest {len(shown)} are shown, all are in images/"
        if self._training:
            note += f" · training; this page reloads every {_REFRESH_SECONDS} s"
        _write_page(
            self._folder,
            title=self._title,
            note=note,
            refresh=_REFRESH_SECONDS if self._training else None,
            curves=LOSSES_FILE if (self._folder / LOSSES_FILE).is_file() else None,
            legend=self._legend,
            sections=[{"heading": f"Step {sample['step']:,}", **sample} for sample in shown],
        )


def plot_losses(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Plots every loss over the steps as a PNG: a smoothed curve above the raw curve in a lighter shade.

    Losses differ in scale, so each has a panel of its own; those of the discriminator on photographs and on generated
    images, which are compared with each other, share one.

    Args:
        records: the result of `RunLog.records`. Losses are the entries whose names begin with a capital letter. None
            and NaN are skipped.
        path: path of the PNG, which is replaced atomically.

    Raises:
        UserError: the picture cannot be written.
    """
    names = [name for name in dict.fromkeys(key for record in records for key in record) if name[:1].isupper()]
    panels: dict[str, list[str]] = {}
    for name in names:
        panels.setdefault("Discriminator" if name in ("D_Fake", "D_real") else name, []).append(name)
    columns = min(4, max(1, len(panels)))
    lines = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(12, 3 * lines), dpi=110, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, (title, shown) in zip(grid, panels.items(), strict=False):
        _draw_curves(axes, title, {name: _curve(records, name) for name in shown})
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    picture = BytesIO()
    figure.savefig(picture, format="png")
    _replace_file(path, picture.getvalue())


def _curve(records: Sequence[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps and values of a loss; records without a finite value are skipped."""
    points = np.array([(r["step"], r[name]) for r in records if r.get(name) is not None], dtype=float).reshape(-1, 2)
    steps, values = points[np.isfinite(points).all(1)].T
    return steps, values


def _draw_curves(axes: Axes, title: str, curves: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    for name, (steps, values) in curves.items():
        (raw,) = axes.plot(steps, values, alpha=0.2, linewidth=0.8)
        marker = "o" if len(steps) == 1 else None
        axes.plot(steps, _smooth(values), color=raw.get_color(), linewidth=1.8, marker=marker, label=name)
    everything = np.concatenate([values for _, values in curves.values()]) if curves else np.empty(0)
    if everything.size:
        # A few spikes must not flatten the rest.
        low, high = np.percentile(everything, (0.5, 99.5))
        margin = 0.05 * (high - low) or 0.5
        axes.set_ylim(low - margin, high + margin)
    if len(curves) > 1:
        axes.legend(frameon=False, ncols=len(curves), loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    axes.set_title(title, loc="left", fontweight="bold", pad=8)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Returns the moving average over a twentieth of the curve; the window is shorter at the ends."""
    window = np.ones(max(1, len(values) // 20))
    if not len(values):
        return values
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def _save_rows(folder: Path, pictures: str, columns: Sequence[str], rows: Iterable[PageRow]) -> Iterator[_Row]:
    """Saves the pictures of each row, and then yields it."""
    taken: set[str] = set()
    folders = [f"{pictures}/{_file_name(column, taken)}" for column in columns]
    taken.clear()
    for caption, images in rows:
        file = _file_name(caption, taken) + ".png"
        cells = [
            None if image is None else _save_picture(folder, f"{column}/{file}", image)
            for column, image in zip(folders, images, strict=True)
        ]
        yield _Row(caption=caption, pictures=cells)


def _save_picture(folder: Path, file: str, image: Image.Image) -> _Picture:
    shown = file
    _replace_file(folder / file, _png(image))
    if image.mode == "I;16":
        shown = f"previews/{file.partition('/')[2]}"
        _replace_file(folder / shown, _png(preview(image)))
    return _Picture(file=file, preview=shown, width=image.width, height=image.height)


def _png(image: Image.Image) -> bytes:
    content = BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def _file_name(text: str, taken: set[str]) -> str:
    """Returns a file name that is valid on every system and, ignoring case, not in `taken`; adds it to `taken`."""
    # 60 characters of four bytes each, a number and a suffix stay below the usual limit of 255 bytes.
    safe = re.sub(r"[^\w.-]+", "_", text)[:60].strip("._-") or "image"
    name, number = safe, 1
    while name.casefold() in taken:
        number += 1
        name = f"{safe}_{number}"
    taken.add(name.casefold())
    return name


def _step_folder(step: int) -> str:
    return f"images/step_{step:08d}"


def _read_manifest(path: Path) -> list[_Sample]:
    try:
        return [
            _Sample(step=int(item["step"]), columns=item["columns"], rows=item["rows"])
            for item in json.loads(path.read_bytes())
        ]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the folder") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it to start the page of samples anew") from error


def _write_page(folder: Path, **content: Any) -> Path:
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    page = templates.get_template("page.html").render({"refresh": None, "curves": None, **content})
    # A file name that is not valid Unicode reaches the page as lone surrogates, which UTF-8 cannot express.
    return _replace_file(folder / "index.html", page.encode("utf-8", "replace"))


def _replace_file(path: Path, content: bytes) -> Path:
    """Replaces a file atomically. Raises UserError when it cannot be written."""
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; make its folder writable or free space") from error
    return path


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
