"""Bad input: one message with the file, the value and the fix; and `check_dataset`, which finds all of it at once."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spade_model.config import DataConfig, default_data_config
from spade_model.data import Problem, check_dataset, create_dataset, inspect_dataset
from spade_model.data import images as image_reading
from spade_model.data.plausibility import closing_map, common_factor, is_antialiased
from spade_model.data.problem import grouped
from spade_model.errors import UserError

SIZE = (40, 40)


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def ids(value: int = 5, dtype: type = np.uint8) -> np.ndarray:
    return np.full(SIZE, value, dtype=dtype)


def ids_with(value: int, dtype: type = np.uint8) -> np.ndarray:
    """One pixel, x=3, y=2, has the value."""
    array = ids(dtype=dtype)
    array[2, 3] = value
    return array


def rgb() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def make_coco(root: Path, count: int = 2) -> DataConfig:
    for number in range(count):
        save(root / f"train_label/{number}.png", ids())
        save(root / f"train_inst/{number}.png", ids())
        save(root / f"train_img/{number}.jpg", rgb())
    return replace(default_data_config("coco"), dataroot=str(root), load_size=36, crop_size=32, batch_size=2)


def save_16_bits(path: Path, colour_type: int) -> None:
    """A PNG of 16 bits a channel: 2 is RGB, 4 is grey with an alpha channel. Pillow cannot write them."""
    height, width = SIZE
    row = b"\0" + bytes(2 * {2: 3, 4: 2}[colour_type] * width)
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)),
        (b"IDAT", zlib.compress(row * height)),
    )
    chunks = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + struct.pack(">I4sI", 0, b"IEND", zlib.crc32(b"IEND")))


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwrite_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[60:80] = bytes(20)
    path.write_bytes(data)


Damage = Callable[[Path], object]

BAD_FILES: dict[str, tuple[str, Damage, list[str]]] = {
    "empty label": ("train_label/1.png", lambda p: p.write_bytes(b""), ["0 bytes", "Copy it again"]),
    "empty photograph": ("train_img/1.jpg", lambda p: p.write_bytes(b""), ["0 bytes", "Copy it again"]),
    "empty instances": ("train_inst/1.png", lambda p: p.write_bytes(b""), ["0 bytes", "Copy it again"]),
    "truncated label": ("train_label/1.png", cut_in_half, ["truncated", "Copy it again"]),
    "truncated photograph": ("train_img/1.jpg", cut_in_half, ["truncated", "Copy it again"]),
    "corrupt instances": ("train_inst/1.png", overwrite_middle, ["corrupt", "Copy it again"]),
    "pipe as photograph": ("train_img/1.jpg", lambda p: (p.unlink(), os.mkfifo(p)), ["not a file", "Check the path"]),
    "text as photograph": ("train_img/1.jpg", lambda p: p.write_text("hello"), ["not a readable", "Replace"]),
    "gif as photograph": ("train_img/1.jpg", lambda p: Image.fromarray(rgb()).save(p, "GIF"), ["not a readable"]),
    "id outside": ("train_label/1.png", lambda p: save(p, ids_with(200)), ["id 200", "x=3, y=2", "1 of 1600", "201"]),
    "16-bit id": ("train_label/1.png", lambda p: save(p, ids_with(26001, np.uint16)), ["id 26001", "instance"]),
    "colour label": ("train_label/1.png", lambda p: save(p, rgb()), ["RGB", "colour map", "--label_nc 0"]),
    "grey stored as RGB": (
        "train_label/1.png",
        lambda p: save(p, np.stack([ids()] * 3, -1)),
        ["three channels are equal", "grey PNG"],
    ),
    "RGBA label": ("train_label/1.png", lambda p: save(p, np.dstack([rgb(), ids(255)])), ["RGBA", "colour map"]),
    "transparent label": (
        "train_label/1.png",
        lambda p: save(p, np.dstack([ids(), ids_with(9)])),
        ["transparent", "x=0, y=0", "alpha 5", "grey PNG"],
    ),
    "colour instances": ("train_inst/1.png", lambda p: save(p, rgb()), ["RGB", "ids"]),
    "label as JPEG": (
        "train_label/1.png",
        lambda p: Image.fromarray(ids()).save(p, "JPEG"),
        ["JPEG", "Export the ids again"],
    ),
    "floating point label": (
        "train_label/1.png",
        lambda p: Image.fromarray(ids().astype(np.float32)).save(p, "TIFF"),
        ["mode F", "grey PNG"],
    ),
    "negative id": (
        "train_label/1.png",
        lambda p: Image.fromarray(ids_with(-1, np.int32)).save(p, "TIFF"),
        ["id -1", "x=3, y=2", "must not be negative"],
    ),
    "16-bit photograph": (
        "train_img/1.jpg",
        lambda p: Image.fromarray(ids(500, np.uint16)).save(p, "PNG"),
        ["more than 8 bits", "8 bits a channel", "--output_nc 1 --image_bits 16"],
    ),
    "16-bit colours": (
        "train_img/1.jpg",
        lambda p: save_16_bits(p, 2),
        ["16 bits a channel", "only 8", "8 bits a channel"],
    ),
    "16-bit label with alpha": (
        "train_label/1.png",
        lambda p: save_16_bits(p, 4),
        ["16 bits a channel", "only 8", "grey without an alpha channel"],
    ),
    "floating point photograph": (
        "train_img/1.jpg",
        lambda p: Image.fromarray(ids().astype(np.float32)).save(p, "TIFF"),
        ["floating point", "8 bits a channel"],
    ),
    "photograph of another size": (
        "train_img/1.jpg",
        lambda p: save(p, rgb()[:30]),
        ["40x30", "40x40", "same size"],
    ),
    "instances of another size": ("train_inst/1.png", lambda p: save(p, ids()[:, :20]), ["20x40", "40x40"]),
    "unreadable": ("train_img/1.jpg", lambda p: (p.unlink(), p.symlink_to("nowhere")), ["cannot be opened", "path"]),
}


class TestBadFiles:
    @pytest.mark.parametrize("case", BAD_FILES)
    def test_message(self, tmp_path, case):
        config = make_coco(tmp_path)
        name, damage, words = BAD_FILES[case]
        damage(tmp_path / name)
        dataset = create_dataset(config, "train")
        dataset[0]
        with pytest.raises(UserError) as caught:
            dataset[1]
        message = str(caught.value)
        assert message.startswith(str(tmp_path / name) + ": ")
        assert "\n" not in message
        for word in words:
            assert word in message
        assert [str(problem) for problem in check_dataset(config, "train")] == [message]

    def test_every_truncation_of_a_file_is_survived(self, tmp_path):
        config = make_coco(tmp_path, 1)
        save(tmp_path / "train_label/0.png", np.random.default_rng(0).integers(0, 182, SIZE, dtype=np.uint8))
        for name in ("train_label/0.png", "train_img/0.jpg"):
            path = tmp_path / name
            whole = path.read_bytes()
            for length in range(0, len(whole) - 40, max(1, len(whole) // 60)):
                path.write_bytes(whole[:length])
                with pytest.raises(UserError, match=path.name):
                    create_dataset(config, "train")[0]
            path.write_bytes(whole)

    def test_random_damage_is_survived(self, tmp_path):
        config = make_coco(tmp_path, 1)
        random = np.random.default_rng(0)
        refusals = []
        for name in ("train_label/0.png", "train_img/0.jpg"):
            path = tmp_path / name
            whole = path.read_bytes()
            for _ in range(150):
                data = np.frombuffer(whole, dtype=np.uint8).copy()
                data[random.integers(0, len(data), 6)] = random.integers(0, 256, 6)
                path.write_bytes(data.tobytes())
                try:
                    create_dataset(config, "train")[0]
                except UserError as error:
                    refusals.append((str(path), str(error)))
            path.write_bytes(whole)
        assert len(refusals) > 50
        assert all(message.startswith(path) for path, message in refusals)

    def test_decompression_bomb(self, tmp_path, monkeypatch):
        config = make_coco(tmp_path)
        monkeypatch.setattr(image_reading, "MAX_PIXELS", 1000)
        with pytest.raises(UserError, match=r"0\.png: the image is 40x40; at most 1000 pixels"):
            create_dataset(config, "train")[0]

    @pytest.mark.parametrize(
        ("width", "words"),
        [(60000, "pixels.*tiles"), (9000, "9000x9000.*pixels.*tiles"), (0, "corrupt|readable|no pixels")],
    )
    def test_size_in_the_header(self, tmp_path, width, words):
        config = make_coco(tmp_path, 1)
        path = tmp_path / "train_label/0.png"
        data = bytearray(path.read_bytes())
        data[16:24] = width.to_bytes(4, "big") * 2
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
        path.write_bytes(data)
        with pytest.raises(UserError, match=rf"0\.png.*({words})"):
            create_dataset(config, "train")[0]
        assert len(check_dataset(config, "train")) >= 1


class TestBadIds:
    def test_255_without_an_unknown_class(self, tmp_path):
        config = replace(make_coco(tmp_path), contain_dontcare_label=False)
        save(tmp_path / "train_label/0.png", ids_with(255))
        with pytest.raises(UserError, match=r"id 255 at pixel x=3, y=2 .*0\.\.181.*--contain_dontcare_label"):
            create_dataset(config, "train")[0]
        labels = ids_with(255)
        labels[0, 0] = 190
        save(tmp_path / "train_label/0.png", labels)
        with pytest.raises(UserError, match=r"2 of 1600.*--contain_dontcare_label.*--label_nc 191"):
            create_dataset(config, "train")[0]

    def test_shifted_ade20k_without_an_unknown_class(self, tmp_path):
        save(tmp_path / "ADE_val_1.png", ids(0))
        config = replace(
            default_data_config("ade20k"), dataroot=str(tmp_path), ade20k_shift=True, contain_dontcare_label=False
        )
        with pytest.raises(UserError, match=r"id 0 at pixel x=0, y=0 .*--contain_dontcare_label"):
            create_dataset(config, "val", need_images=False)[0]


class TestBadFolders:
    def test_missing(self, tmp_path):
        config = replace(default_data_config("coco"), dataroot=str(tmp_path / "nowhere"))
        with pytest.raises(UserError) as caught:
            create_dataset(config, "train")
        for word in ("train_label", "train_img", "train_inst", "no such folder", "--dataroot", "--dataset_mode"):
            assert word in str(caught.value)

    def test_empty(self, tmp_path):
        config = make_coco(tmp_path)
        for path in (tmp_path / "train_img").iterdir():
            path.unlink()
        with pytest.raises(UserError, match="train_img: no photograph files"):
            create_dataset(config, "train")

    def test_unpaired_lists_the_first_few(self, tmp_path):
        config = make_coco(tmp_path, 9)
        for number in range(8):
            (tmp_path / f"train_img/{number}.jpg").unlink()
        with pytest.raises(UserError) as caught:
            create_dataset(config, "train")
        message = str(caught.value)
        for word in ("0.png", "4.png", "has no photograph", "train_img", "--no_pairing_check", "3 more", "doctor"):
            assert word in message
        assert "5.png" not in message

    def test_no_pairing_check_needs_equal_numbers(self, tmp_path):
        config = replace(make_coco(tmp_path), no_pairing_check=True)
        (tmp_path / "train_img/0.jpg").unlink()
        with pytest.raises(UserError, match=r"1\.png.*has no photograph left for it: there are 1"):
            create_dataset(config, "train")

    def test_two_label_images_for_one_photograph(self, tmp_path):
        config = make_coco(tmp_path)
        save(tmp_path / "train_label/1.bmp", ids())
        with pytest.raises(UserError, match=r"1\.(png|bmp): has the same pairing name as 1\.(png|bmp).*Rename"):
            create_dataset(config, "train")

    def test_links_in_a_circle(self, tmp_path):
        config = make_coco(tmp_path)
        (tmp_path / "train_label/again").symlink_to(tmp_path / "train_label")
        assert len(create_dataset(config, "train")) == 2


class TestCheckDataset:
    def test_a_sound_data_set(self, tmp_path):
        assert check_dataset(make_coco(tmp_path), "train") == []
        assert check_dataset(default_data_config("toy"), "train") == []

    def test_ten_problems_at_once(self, tmp_path):
        config = replace(make_coco(tmp_path, 13), preprocess_mode="crop")
        label = tmp_path / "train_label"
        save(label / "0.png", ids_with(200))
        cut_in_half(label / "1.png")
        (label / "2.png").write_bytes(b"")
        save(label / "3.png", rgb())
        (tmp_path / "train_img/4.jpg").unlink()
        (label / "5.png").unlink()
        save(tmp_path / "train_img/6.jpg", rgb()[:20])
        save(tmp_path / "train_inst/7.png", ids()[:20])
        (tmp_path / "train_img/8.jpg").write_text("hello")
        save(label / "9.png", ids_with(26001, np.uint16))
        for name, pixels in (("label/10.png", ids()), ("inst/10.png", ids()), ("img/10.jpg", rgb())):
            save(tmp_path / f"train_{name}", pixels[:31])
        (label / "notes.txt").write_text("hello")
        palette = Image.fromarray(ids())
        palette.putpalette([level for level in range(256) for _ in range(3)])
        palette.save(label / "11.png")
        palette.save(label / "12.png")

        problems = check_dataset(config, "train")
        expected = [
            ("train_label/0.png", "id 200 at pixel x=3, y=2"),
            ("train_label/1.png", "truncated"),
            ("train_label/2.png", "0 bytes"),
            ("train_label/3.png", "RGB"),
            ("train_label/4.png", "no photograph"),
            ("train_img/5.jpg", "no label image"),
            ("train_inst/5.png", "no label image"),
            ("train_img/6.jpg", "40x20"),
            ("train_inst/7.png", "40x20"),
            ("train_img/8.jpg", "not a readable"),
            ("train_label/9.png", "26001"),
            ("train_label/10.png", "smaller than the crop"),
        ]
        warnings = [("train_label/notes.txt", "not an image file"), ("train_label/11.png", "2 label image(s)")]
        assert_found(
            problems,
            [(tmp_path / name, words, False) for name, words in expected]
            + [(tmp_path / name, words, True) for name, words in warnings],
        )
        assert [problem.is_warning for problem in problems[-2:]] == [True, True]

    def test_photographs_that_viewers_turn(self, tmp_path):
        """Upside down it has the mask's size, on its side it has not."""
        config = make_coco(tmp_path, 3)
        exif = Image.Exif()
        for number, size, orientation in ((0, (40, 40), 3), (1, (30, 40), 6), (2, (40, 40), 1)):
            exif[0x0112] = orientation
            Image.new("RGB", size).save(tmp_path / f"train_img/{number}.jpg", exif=exif)
        save(tmp_path / "train_label/1.png", ids()[:30])
        save(tmp_path / "train_inst/1.png", ids()[:30])
        error, warning = check_dataset(config, "train")
        assert str(error).startswith(f"{tmp_path}/train_img/1.jpg: the image is 30x40, but its label image")
        assert "Apply its EXIF orientation" in error.fix
        assert (warning.path, warning.is_warning) == (tmp_path / "train_img/0.jpg", True)
        assert "has an EXIF orientation (2 file(s) in total)" in warning.what

    @pytest.mark.parametrize(
        ("photographs", "options", "warnings"),
        [
            ([rgb(), ids()], {}, ["1 is grey (1 photograph(s)"]),
            ([rgb(), ids()], {"output_nc": 1}, ["0 has colours (1 photograph(s)"]),
            (
                [ids(40000, np.uint16), ids(200)],
                {"output_nc": 1, "image_bits": 16},
                ["1 has 8 bits (1 photograph(s)"],
            ),
            (
                [ids(9, np.uint16), ids(4095, np.uint16)],
                {"output_nc": 1, "image_bits": 16},
                ["1 no photograph has a higher level than this one, 4095"],
            ),
            ([ids(9, np.uint16), ids(50000, np.uint16)], {"output_nc": 1, "image_bits": 16}, []),
        ],
    )
    def test_photographs_of_another_kind_than_the_options_say(self, tmp_path, photographs, options, warnings):
        config = replace(make_coco(tmp_path), **options)
        for number, pixels in enumerate(photographs):
            (tmp_path / f"train_img/{number}.jpg").unlink()
            save(tmp_path / f"train_img/{number}.png", pixels)
        problems = check_dataset(config, "train")
        expected = [warning.split(" ", 1) for warning in warnings]
        assert_found(problems, [(tmp_path / f"train_img/{number}.png", words, True) for number, words in expected])

    def test_one_file_can_have_two_problems(self, tmp_path):
        config = make_coco(tmp_path)
        save(tmp_path / "train_label/0.png", ids_with(200)[:36])
        found = [str(problem) for problem in check_dataset(config, "train")]
        assert len(found) == 3
        assert any("id 200" in line for line in found)
        assert sum("same size" in line for line in found) == 2

    def test_labels_are_checked_though_photographs_are_missing(self, tmp_path):
        config = make_coco(tmp_path)
        save(tmp_path / "train_label/0.png", ids_with(200))
        for path in (tmp_path / "train_img").iterdir():
            path.unlink()
        (tmp_path / "train_img").rmdir()
        problems = check_dataset(config, "train")
        assert_found(
            problems,
            [
                (tmp_path / "train_img", "no such folder", False),
                (tmp_path / "train_label/0.png", "id 200", False),
            ],
        )
        assert len(check_dataset(config, "train", need_images=False)) == 1

    def test_options_that_fit_no_data_set(self):
        assert "--label_dir" in str(check_dataset(default_data_config("custom"), "train")[0])

    def test_progress(self, tmp_path):
        seen = []

        def progress(iterable, total):
            for item in iterable:
                seen.append(total)
                yield item

        inspect_dataset(make_coco(tmp_path, 3), "train", progress=progress)
        assert seen == [3, 3, 3]


def disc(low: int, high: int, *, smooth: bool) -> np.ndarray:
    """A disc of one id on another, (40, 40), with or without interpolated ids at its border."""
    large = np.where(np.hypot(*np.mgrid[-80:80, -80:80]) < 50, high, low).astype(np.uint8)
    return np.asarray(Image.fromarray(large).resize(SIZE, Image.Resampling.BOX if smooth else Image.Resampling.NEAREST))


def custom_masks(root: Path, *masks: np.ndarray, **options) -> DataConfig:
    for number, mask in enumerate(masks):
        save(root / f"masks/{number}.png", mask)
        save(root / f"photos/{number}.png", rgb())
    folders = {"label_dir": str(root / "masks"), "image_dir": str(root / "photos")}
    small = {"no_instance": True, "load_size": 36, "crop_size": 32}
    return replace(default_data_config("custom"), **folders, **small, **options)


class TestPlausibility:
    def test_ids_and_their_share(self, tmp_path):
        found = inspect_dataset(custom_masks(tmp_path, ids_with(3), ids(5), label_nc=6), "train")
        assert {number: (entry.pixels, entry.images) for number, entry in found.ids.items()} == {
            3: (1, 1),
            5: (3199, 2),
        }
        assert (found.items, found.label_images) == (2, 2)

    def test_antialiased_masks(self, tmp_path):
        config = custom_masks(tmp_path, disc(0, 200, smooth=True), disc(0, 200, smooth=False), disc(0, 1, smooth=False))
        smooth, *crisp = check_dataset(config, "train")
        assert "id 200 at pixel" in smooth.what
        assert "anti-aliased" in smooth.fix
        assert (smooth.label_nc, crisp[0].is_warning) == (0, False)
        assert "multiples of 200: divide them by 200" in crisp[0].fix

        warnings = check_dataset(replace(config, label_nc=201), "train")
        assert "is anti-aliased (1 label image(s)" in warnings[0].what
        assert "2 of 0..200" not in str(warnings)
        assert "If the others do not exist, map 0..1 -> 0..1, 200 -> 2, and pass --label_nc 3" in warnings[1].fix
        assert all(problem.is_warning for problem in warnings)

    def test_real_masks_are_not_antialiased(self, coco_dir):
        for path in sorted(coco_dir.glob("*_label/*.png")):
            with Image.open(path) as mask:
                assert not is_antialiased(np.asarray(mask)), path
                smooth = mask.resize((300, 200), Image.Resampling.BILINEAR)
            assert is_antialiased(np.asarray(smooth)), path

    @pytest.mark.parametrize(
        ("masks", "options", "words"),
        [
            ([disc(0, 255, smooth=False)], {"contain_dontcare_label": True}, ["0 and 255 only", "--label_nc 2"]),
            ([disc(0, 255, smooth=False)], {}, ["id 255", "save white as 1", "--contain_dontcare_label"]),
            ([disc(0, 1, smooth=False).astype(np.uint16) * 256], {}, ["id 256", "multiples of 256"]),
            ([disc(1, 2, smooth=False).astype(np.uint16) * 257], {}, ["id 514", "multiples of 257"]),
            ([disc(0, 4, smooth=False), ids(8)], {}, ["multiples of 4", "Divide them by 4", "--label_nc 3"]),
            ([disc(0, 7, smooth=False), ids(8)], {}, ["3 of 0..8 occur", "map 0 -> 0, 7..8 -> 1..2", "--label_nc 3"]),
        ],
    )
    def test_ids_of_another_meaning(self, tmp_path, masks, options, words):
        found = "\n".join(map(str, check_dataset(custom_masks(tmp_path, *masks, **options), "train")))
        assert [word for word in words if word not in found] == [], found

    def test_plausible_ids(self, tmp_path):
        assert check_dataset(custom_masks(tmp_path, disc(0, 2, smooth=False), ids(1)), "train") == []

    @pytest.mark.parametrize(
        ("numbers", "factor"),
        [([0, 40, 80], 40), ([5, 200], 1), ([20], 1), ([256], 256), ([0, 255], 1), ([], 1), ([0], 1), ([3, 6, 255], 3)],
    )
    def test_common_factor(self, numbers, factor):
        assert common_factor(numbers) == factor

    def test_closing_map(self):
        assert closing_map([7, 8, 9, 0, 33]) == "0 -> 0, 7..9 -> 1..3, 33 -> 4"

    def test_equal_problems_share_a_line(self):
        problems = [Problem(Path(f"{n}.png"), f"id {n}", f"Set --label_nc to {n}", label_nc=n) for n in (20, 30, 25)]
        lines = grouped([*problems, Problem(Path("a"), "odd", "Look", True)])
        assert lines == [
            "error in 3 places: Set --label_nc to 30:",
            *(f"    {n}.png: id {n}" for n in (20, 30, 25)),
            "warning: a: odd. Look.",
        ]
        many = grouped([problems[0]] * 25)
        assert (len(many), many[-1]) == (12, "    ... and 15 more")


def assert_found(problems: list[Problem], expected: list[tuple[Path, str, bool]]) -> None:
    """Each expected problem was found, and no other."""
    for path, words, is_warning in expected:
        matches = [p for p in problems if p.path == path and words in p.what and p.is_warning == is_warning]
        assert len(matches) == 1, (path, words, [str(problem) for problem in problems])
        assert matches[0].fix
    assert len(problems) == len(expected), [str(problem) for problem in problems]
