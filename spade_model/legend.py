"""Finds the names and colours of a model's classes, for its HTML pages."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ImageColor

from spade_model.config import DataConfig
from spade_model.data.classes import class_ids, known_ids
from spade_model.data.images import read_palette
from spade_model.errors import UserError
from spade_model.registry import DATASETS
from spade_model.visualize import label_colours

LegendEntry = tuple[str, str]
"""A class's name and its colour as #rrggbb."""


@dataclass(frozen=True)
class Legend:
    """The names and colours of all classes; both are empty if the condition is an RGB image."""

    names: tuple[str, ...]
    """Names of the classes, in order; for a class without a name, its id."""
    colours: np.ndarray
    """RGB colours of the classes, uint8 (num_labels, 3)."""

    def entries(self) -> list[LegendEntry]:
        """Returns name and colour of each class, in order."""
        colours = ("#{:02x}{:02x}{:02x}".format(*colour) for colour in self.colours.tolist())
        return list(zip(self.names, colours, strict=True))


def find_legend(config: DataConfig, label: Path | None = None) -> Legend:
    """Returns the names and colours of the classes.

    Names come from the file config.classes, or from the data set. Colours come from that file, from the palette of the
    label image `label`, or from `label_colours`, in this order.

    Raises:
        UserError: config.classes cannot be read, or a line of it does not fit; the message names the line.
    """
    ids = class_ids(config)
    names = [str(number) for number in ids]
    if config.contain_dontcare_label and config.label_nc:
        names[-1] = "unknown"
    known = DATASETS[config.dataset_mode].class_names
    names[: len(known)] = known[: len(names)]
    colours = label_colours(config.num_labels).copy() if ids else np.zeros((0, 3), dtype=np.uint8)
    if label is not None:
        _take_palette(colours, ids, read_palette(label))
    if config.classes and ids:
        for number, name, colour in _read_classes(Path(config.classes), config):
            names[ids.index(number)] = name
            if colour is not None:
                colours[ids.index(number)] = colour
    return Legend(tuple(names), colours)


def _take_palette(colours: np.ndarray, ids: list[int], palette: np.ndarray | None) -> None:
    """Writes the palette's colours over those of the classes, unless it is a ramp of greys.

    A colour that an earlier class has is left out: classes of one colour could not be told apart.
    """
    if palette is None or (palette == palette[:, :1]).all():
        return
    taken = set()
    for label, number in enumerate(ids):
        if number < len(palette) and (colour := tuple(palette[number].tolist())) not in taken:
            taken.add(colour)
            colours[label] = colour


def _read_classes(path: Path, config: DataConfig) -> Iterator[tuple[int, str, tuple[int, ...] | None]]:
    """Yields id, name and colour, if any, of each line of a class file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"--classes {path} cannot be read: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--classes {path} is not a text file in UTF-8; save it as CSV in UTF-8") from error
    lines = text.splitlines()
    delimiter = ";" if lines and ";" in lines[0] and "," not in lines[0] else ","
    seen: set[int] = set()
    reader = csv.reader(lines, delimiter=delimiter)
    for row in _rows(reader, path):
        number, cells = reader.line_num, [cell.strip() for cell in row]
        if not any(cells) or (number == 1 and cells[0].lower() == "id"):
            continue
        where = f"--classes {path}, line {number}"
        if not re.fullmatch("[0-9]{1,9}", cells[0]) or len(cells) < 2 or not cells[1]:
            raise UserError(f"{where}: {lines[number - 1][:100]!r} is not id,name or id,name,colour")
        label = int(cells[0])
        if label not in class_ids(config):
            raise UserError(f"{where}: id {label} is not a class; the classes are {known_ids(config)}")
        if label in seen:
            raise UserError(f"{where}: id {label} has a name already; remove one of the two lines")
        seen.add(label)
        yield label, cells[1], _colour(cells[2], where) if len(cells) > 2 and cells[2] else None


def _rows(reader: Any, path: Path) -> Iterator[list[str]]:
    """Yields the rows of a CSV reader; a row that it cannot parse is a UserError."""
    try:
        yield from reader
    except csv.Error as error:
        raise UserError(f"--classes {path}, line {reader.line_num}: {error}; correct the line") from error


def _colour(text: str, where: str) -> tuple[int, ...]:
    try:
        return ImageColor.getrgb(text)[:3]
    except ValueError as error:
        raise UserError(f"{where}: {text!r} is no colour; write it as #rrggbb") from error
