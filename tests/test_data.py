"""Data sets in every folder layout, the eight preprocess modes, and batches that do not depend on how they are made."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from spade_kernels import LabelMap
from spade_kernels.label_map import instance_edges
from spade_model.config import DataConfig, default_data_config
from spade_model.data import Batch, FolderDataset, create_dataset, create_loader, load_condition
from spade_model.data.preprocess import plan_geometry
from spade_model.errors import UserError

REAL_DATA = Path(__file__).parents[2] / "shared" / "data" / "coco_stuff"


def write(path: Path, pixels: np.ndarray | int, size: tuple[int, int] = (48, 40)) -> Path:
    """Writes an image; a number means that value everywhere."""
    array = np.full(size[::-1], pixels, dtype=np.uint8) if isinstance(pixels, int) else pixels
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def photograph(seed: int = 0, size: tuple[int, int] = (48, 40)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


def small(dataset_mode: str, root: Path, **options) -> DataConfig:
    config = replace(default_data_config(dataset_mode), dataroot=str(root), load_size=36, crop_size=32)
    return replace(config, **{"preprocess_mode": "resize_and_crop", "aspect_ratio": 1.0, "batch_size": 1, **options})


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Ten triples whose labels hold their number on the left and 255 on the right."""
    for number in range(10):
        labels = np.full((40, 48), number, dtype=np.uint8)
        labels[:, 30:] = 255
        write(tmp_path / f"train_label/{number}.png", labels)
        write(tmp_path / f"train_inst/{number}.png", labels)
        write(tmp_path / f"train_img/{number}.jpg", photograph(number))
    return tmp_path


def names(dataset) -> list[str]:
    return [dataset[index].name for index in range(len(dataset))]


class TestLayouts:
    def test_coco_item(self, coco):
        sample = create_dataset(small("coco", coco, preprocess_mode="none", no_flip=True), "train")[3]
        assert sample.condition.shape == (32, 64)
        assert sample.condition.dtype == torch.int64
        assert sample.condition.unique().tolist() == [3, 182]
        assert sample.edges.dtype == torch.bool
        assert sample.edges.sum() == 2 * 32
        assert sample.image.shape == (3, 32, 64)
        assert sample.image.dtype == torch.float32
        assert -1 <= sample.image.min() < sample.image.max() <= 1

    def test_natural_order_and_max_dataset_size(self, coco):
        for folder, suffix in (("train_label", "png"), ("train_inst", "png"), ("train_img", "jpg")):
            (coco / folder / f"1.{suffix}").rename(coco / folder / f"10.{suffix}")
        config = small("coco", coco)
        assert names(create_dataset(config, "train")) == ["0", "2", "3", "4", "5", "6", "7", "8", "9", "10"]
        assert names(create_dataset(replace(config, max_dataset_size=2), "train")) == ["0", "2"]

    def test_coco_portraits_belong_to_training(self, coco):
        write(coco / "train_label_portrait/0.png", 77)
        write(coco / "train_inst_portrait/0.png", 77)
        write(coco / "train_img_portrait/0.png", photograph())
        dataset = create_dataset(small("coco", coco), "train")
        assert len(dataset) == 11
        assert dataset[10].condition.unique().tolist() == [77]
        assert len(create_dataset(small("coco", coco, coco_no_portraits=True), "train")) == 10

    def test_ade20k(self, tmp_path):
        for split, folder in (("train", "training"), ("val", "validation")):
            write(tmp_path / f"annotations/{folder}/ADE_{split}_00000001.png", 150)
            write(tmp_path / f"images/{folder}/ADE_{split}_00000001.jpg", photograph())
        (tmp_path / "objectInfo150.txt").write_text("Idx")
        dataset = create_dataset(small("ade20k", tmp_path), "val")
        assert names(dataset) == ["ADE_val_00000001"]
        assert dataset[0].condition.unique().tolist() == [150]
        assert dataset[0].edges is None

    def test_ade20k_shift(self, tmp_path):
        labels = np.tile(np.repeat(np.array([0, 1, 150, 255], dtype=np.uint8), 12), (40, 1))
        write(tmp_path / "ADE_val_1.png", labels)
        for shift, expected in ((False, [0, 1, 150]), (True, [0, 149, 150])):
            config = small("ade20k", tmp_path, ade20k_shift=shift)
            assert create_dataset(config, "val", need_images=False)[0].condition.unique().tolist() == expected
        shifted = create_dataset(config, "val", need_images=False)[0].condition
        assert shifted[0, 0] == 150
        assert shifted[0, 31] == 150

    def test_cityscapes(self, tmp_path):
        frame = "gtFine/train/ulm/ulm_000001_000019_gtFine"
        write(tmp_path / f"{frame}_labelIds.png", 26)
        write(tmp_path / f"{frame}_color.png", photograph())
        (tmp_path / f"{frame}_polygons.json").write_text("{}")
        instances = np.full((40, 48), 26000, dtype=np.uint16)
        instances[:20] = 26001
        write(tmp_path / f"{frame}_instanceIds.png", instances)
        write(tmp_path / "leftImg8bit/train/ulm/ulm_000001_000019_leftImg8bit.png", photograph())
        config = small("cityscapes", tmp_path, preprocess_mode="fixed", crop_size=64, aspect_ratio=2.0)
        sample = create_dataset(config, "train")[0]
        assert sample.condition.shape == (32, 64)
        assert sample.condition.unique().tolist() == [26]
        assert sample.edges.sum() == 2 * 64
        assert sample.image.shape == (3, 32, 64)

    def test_facades(self, tmp_path):
        write(tmp_path / "val_label/a.png", 12)
        write(tmp_path / "val_img/a.jpg", photograph())
        assert create_dataset(small("facades", tmp_path), "val")[0].condition.unique().tolist() == [12]

    def test_custom(self, tmp_path):
        write(tmp_path / "masks/day/a.png", 2)
        write(tmp_path / "photos/day/a.webp", photograph())
        config = small("custom", tmp_path, label_dir=str(tmp_path / "masks"), no_instance=True)
        assert create_dataset(config, "val", need_images=False)[0].image is None
        with_images = replace(config, image_dir=str(tmp_path / "photos"))
        assert create_dataset(with_images, "val")[0].image is not None

    def test_no_pairing_check_pairs_by_order(self, tmp_path):
        for number in range(2):
            write(tmp_path / f"masks/m{number}.png", number)
            write(tmp_path / f"photos/p{number}.png", np.full((40, 48, 3), 255 * number, dtype=np.uint8))
        config = small(
            "custom", tmp_path, label_dir=str(tmp_path / "masks"), image_dir=str(tmp_path / "photos"), no_instance=True
        )
        with pytest.raises(UserError, match=r"m0\.png.*has no photograph of the same name"):
            create_dataset(config, "train")
        dataset = create_dataset(replace(config, no_pairing_check=True), "train")
        assert [dataset[i].image.mean().item() for i in range(2)] == [-1, 1]

    def test_rgb_condition(self, tmp_path):
        condition = photograph(3, (32, 32))
        write(tmp_path / "in/a.png", condition)
        write(tmp_path / "inst/a.png", 0, (32, 32))
        write(tmp_path / "out/a.png", photograph(4, (32, 32)))
        folders = {
            f"{role}_dir": str(tmp_path / name) for role, name in zip(("label", "image"), ("in", "out"), strict=True)
        }
        config = small("custom", tmp_path, label_nc=0, no_instance=True, **folders, preprocess_mode="none")
        batch = next(iter(create_loader(create_dataset(config, "val"), config, shuffle=False, epoch=0)))
        assert batch.segmap.shape == (1, 3, 32, 32)
        expected = torch.from_numpy(condition).permute(2, 0, 1)
        assert torch.equal(((batch.segmap[0] + 1) * 127.5).round().to(torch.uint8), expected)
        config = replace(config, no_instance=False, instance_dir=str(tmp_path / "inst"))
        batch = next(iter(create_loader(create_dataset(config, "val"), config, shuffle=False, epoch=0)))
        assert batch.segmap.shape == (1, config.semantic_nc, 32, 32)
        assert batch.segmap[:, 3].unique().tolist() == [0]

    @pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "LA", "1"])
    def test_photographs_of_any_mode(self, coco, mode):
        (coco / "train_img/0.jpg").unlink()
        Image.fromarray(photograph()).convert(mode).save(coco / "train_img/0.tif")
        assert create_dataset(small("coco", coco), "train")[0].image.shape == (3, 32, 32)

    @pytest.mark.parametrize("mode", ["L", "P", "I;16", "I", "LA"])
    def test_labels_of_any_mode(self, coco, mode):
        ids = np.full((40, 48), 7, dtype={"I;16": np.uint16, "I": np.int32}.get(mode, np.uint8))
        image = Image.fromarray(ids)
        if mode == "P":
            image.putpalette([level for level in range(256) for _ in range(3)])
        elif mode == "LA":
            image = image.convert("LA")
        (coco / "train_label/0.png").unlink()
        image.save(coco / "train_label/0.tiff" if mode == "I" else coco / "train_label/0.png")
        assert create_dataset(small("coco", coco), "train")[0].condition.unique().tolist() == [7]

    @pytest.mark.parametrize("suffix", ["png", "tif"])
    def test_ids_beyond_a_byte(self, tmp_path, suffix):
        write(tmp_path / f"masks/a.{suffix}", np.full((40, 48), 299, dtype=np.uint16))
        config = small("custom", tmp_path, label_dir=str(tmp_path / "masks"), no_instance=True, label_nc=300)
        assert create_dataset(config, "val", need_images=False)[0].condition.unique().tolist() == [299]


class TestGreyPhotographs:
    """--output_nc 1, with 8 bits and with --image_bits 16."""

    @staticmethod
    def read(root: Path, pixels: np.ndarray, bits: int, suffix: str = "png", **options) -> torch.Tensor:
        """The photograph of a data set of one."""
        shutil.rmtree(root / "photos", ignore_errors=True)
        write(root / f"photos/a.{suffix}", pixels)
        write(root / "masks/a.png", 0, pixels.shape[1::-1])
        folders = {"label_dir": str(root / "masks"), "image_dir": str(root / "photos"), "no_instance": True}
        config = small("custom", root, **{"preprocess_mode": "none", **folders, **options})
        return create_dataset(replace(config, output_nc=1, image_bits=bits), "val")[0].image

    @pytest.mark.parametrize("suffix", ["png", "tif"])
    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
    def test_every_level_is_kept(self, tmp_path, suffix, dtype):
        bits, full = (8, 255) if dtype == np.uint8 else (16, 65535)
        levels = np.linspace(0, full, 32 * 32).round().astype(dtype).reshape(32, 32)
        image = self.read(tmp_path, levels, bits, suffix)
        assert (image.shape, image.dtype, image.min(), image.max()) == ((1, 32, 32), torch.float32, -1, 1)
        assert (image[0].numpy() + 1) * (full / 2) == pytest.approx(levels, abs=0.01)

    def test_32_bits_that_fit_in_16(self, tmp_path):
        levels = np.full((32, 32), 65535, dtype=np.int32)
        assert self.read(tmp_path, levels, 16, "tif").unique().tolist() == [1]
        levels[2, 3] = -1000
        with pytest.raises(UserError, match=r"a\.tif: level -1000 at pixel x=3, y=2 is outside 0\.\.65535\. Shift and"):
            self.read(tmp_path, levels, 16, "tif")

    def test_resized_levels_stay_in_range_and_between_those_of_8_bits(self, tmp_path):
        edges = np.zeros((40, 40), dtype=np.uint16)
        edges[:, 20:] = 65535
        fine, coarse = (
            self.read(tmp_path, pixels, bits, preprocess_mode="fixed")
            for pixels, bits in ((edges, 16), ((edges // 257).astype(np.uint8), 8))
        )
        assert (fine.min(), fine.max()) == (-1, 1)
        torch.testing.assert_close(fine, coarse, rtol=0, atol=1.01 / 255)

    def test_8_bits_among_16_keep_their_brightness(self, tmp_path):
        levels = photograph(0, (32, 32))[..., 0]
        torch.testing.assert_close(self.read(tmp_path, levels, 16), self.read(tmp_path, levels, 8), rtol=0, atol=1e-6)

    def test_colours_are_read_as_their_luma(self, tmp_path):
        levels = photograph(0, (32, 32))[..., 0]
        equal = levels[..., None].repeat(3, -1)
        assert torch.equal(self.read(tmp_path, equal, 8), self.read(tmp_path, levels, 8))
        red, green = (np.full((32, 32, 3), colour, dtype=np.uint8) for colour in ((255, 0, 0), (0, 255, 0)))
        assert self.read(tmp_path, red, 8).mean() < self.read(tmp_path, green, 8).mean()

    @pytest.mark.parametrize("bits", [8, 16])
    def test_toy_landscapes(self, bits):
        config = replace(default_data_config("toy"), output_nc=1, image_bits=bits)
        colours = create_dataset(replace(config, output_nc=3, image_bits=8), "val")[0].image
        grey = create_dataset(config, "val")[0].image
        assert grey.shape == (1, 64, 64)
        luma = (colours * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0)
        torch.testing.assert_close(grey[0], luma, rtol=0, atol=1.01 / 255)


TRAIN_SIZES = {
    "resize_and_crop": (32, 32),
    "crop": (32, 32),
    "scale_width": (36, 30),
    "scale_width_and_crop": (32, 32),
    "scale_shortside": (43, 36),
    "scale_shortside_and_crop": (32, 32),
    "fixed": (32, 32),
    "none": (64, 32),
}
VAL_SIZES = TRAIN_SIZES | {"scale_width": (32, 26), "scale_shortside": (38, 32)}


class TestPreprocess:
    @given(
        size=st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
        mode=st.sampled_from(list(TRAIN_SIZES)),
        load_size=st.integers(1, 600),
        crop_size=st.integers(1, 600),
        aspect_ratio=st.sampled_from([0.5, 1.0, 1.5, 2.0]),
        training=st.booleans(),
    )
    def test_any_size_is_planned_or_refused(self, size, mode, load_size, crop_size, aspect_ratio, training):
        config = DataConfig(preprocess_mode=mode, load_size=load_size, crop_size=crop_size, aspect_ratio=aspect_ratio)
        if config.image_size[0] < 1:
            return
        try:
            geometry = plan_geometry(size, config, np.random.default_rng(0) if training else None, Path("x.png"))
        except UserError:
            assert "crop" in mode or mode.startswith("scale")
            return
        assert min(geometry.size) >= 1
        if geometry.crop is None:
            return
        left, top, right, bottom = geometry.crop
        assert 0 <= left < right <= geometry.size[0]
        assert 0 <= top < bottom <= geometry.size[1]
        assert (bottom - top, right - left) == config.image_size

    @pytest.mark.parametrize("mode", TRAIN_SIZES)
    def test_sizes(self, coco, mode):
        # 36 wide, the images would be too low for the crop.
        config = small("coco", coco, preprocess_mode=mode, load_size=44 if mode == "scale_width_and_crop" else 36)
        sample = create_dataset(config, "train")[0]
        width, height = TRAIN_SIZES[mode]
        assert sample.condition.shape == sample.edges.shape == (height, width)
        assert sample.image.shape == (3, height, width)
        for folder in ("label", "inst", "img"):
            (coco / f"train_{folder}").rename(coco / f"val_{folder}")
        if mode == "scale_width_and_crop":
            with pytest.raises(UserError, match=r"0\.png.*48x40, 32x26 after .*smaller than the crop of 32x32.*fixed"):
                create_dataset(config, "val")[0]
        else:
            assert create_dataset(config, "val")[0].condition.shape == VAL_SIZES[mode][::-1]

    def test_crop_has_the_generators_size(self):
        config = DataConfig(preprocess_mode="resize_and_crop", load_size=72, crop_size=64, aspect_ratio=2.0)
        geometry = plan_geometry((500, 300), config, np.random.default_rng(0), Path("x"))
        left, top, right, bottom = geometry.crop
        assert geometry.size == (72, 36)
        assert (bottom - top, right - left) == config.image_size == (32, 64)

    def test_crops_reach_every_corner_and_flips_are_even(self):
        config = DataConfig(preprocess_mode="crop", crop_size=32)
        plans = [plan_geometry((34, 33), config, np.random.default_rng(i), Path("x")) for i in range(400)]
        assert {plan.crop[:2] for plan in plans} == {(x, y) for x in range(3) for y in range(2)}
        assert 150 < sum(plan.flip for plan in plans) < 250

    def test_validation_is_centred_and_never_flips(self):
        config = DataConfig(preprocess_mode="crop", crop_size=32)
        assert plan_geometry((42, 36), config, None, Path("x")).crop == (5, 2, 37, 34)
        assert not plan_geometry((42, 36), config, None, Path("x")).flip

    def test_the_images_of_an_item_stay_aligned(self, tmp_path):
        ids = np.random.default_rng(0).integers(0, 182, (64, 64), dtype=np.uint8)
        write(tmp_path / "train_label/a.png", ids)
        write(tmp_path / "train_inst/a.png", ids)
        write(tmp_path / "train_img/a.png", np.stack([ids] * 3, axis=-1))
        dataset = create_dataset(small("coco", tmp_path, preprocess_mode="crop"), "train")
        for epoch in range(6):
            sample = dataset[epoch, 0]
            assert torch.equal(((sample.image[0] + 1) * 127.5).round().long(), sample.condition)
            assert torch.equal(sample.edges, instance_edges(sample.condition[None])[0])


def batches(config: DataConfig, dataset, **options) -> list[Batch]:
    return list(create_loader(dataset, config, **{"shuffle": True, "epoch": 5, **options}))


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert [batch.names for batch in first] == [batch.names for batch in second]
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.segmap.labels, b.segmap.labels)
        assert torch.equal(a.segmap.edges, b.segmap.edges)
        assert torch.equal(a.image, b.image)


class TestLoader:
    def test_workers_and_resume_change_nothing(self, coco):
        config = small("coco", coco, batch_size=2)
        dataset = create_dataset(config, "train")
        whole = batches(config, dataset)
        assert len(whole) == 5
        assert isinstance(whole[0].segmap, LabelMap)
        assert whole[0].segmap.num_labels == 183
        with_workers = replace(config, num_workers=2)
        assert_same(whole, batches(with_workers, dataset))
        assert_same(whole[3:], batches(with_workers, dataset, first_image=6))
        assert_same(whole[3:], batches(config, dataset, first_image=6))
        assert len(create_loader(dataset, config, shuffle=True, epoch=5, first_image=6)) == 2

    def test_spawned_workers(self, coco):
        config = small("coco", coco, batch_size=5)
        dataset = create_dataset(config, "train")
        script = (
            "import pickle, torch.multiprocessing as m\n"
            "from functools import partial\n"
            "from spade_kernels import LabelMap\n"
            "from spade_model.data import create_loader\n"
            "if __name__ == '__main__':\n"
            "    m.set_start_method('spawn')\n"
            "    dataset, config = pickle.load(open('job', 'rb'))\n"
            "    prepare = partial(LabelMap.prepare, sizes=[(8, 8)])\n"
            "    loader = create_loader(dataset, config, shuffle=True, epoch=5, prepare=prepare)\n"
            "    pickle.dump([batch.names for batch in loader], open('names', 'wb'))\n"
        )
        run_script(script, coco, (dataset, replace(config, num_workers=1)))
        assert pickle.loads((coco / "names").read_bytes()) == [batch.names for batch in batches(config, dataset)]

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_indexes_come_with_the_batch(self, coco, num_workers, monkeypatch):
        config = small("coco", coco, batch_size=2, num_workers=num_workers)
        found = batches(config, create_dataset(config, "train"), prepare=partial(LabelMap.prepare, sizes=[(8, 8)]))
        expected = [LabelMap(b.segmap.labels, b.segmap.num_labels, b.segmap.edges).prepare([(8, 8)]) for b in found]
        monkeypatch.setattr("spade_kernels.ops.window_index", None)
        for batch, label_map in zip(found, expected, strict=True):
            index, expected_index = batch.segmap.window_index((8, 8), 3), label_map.window_index((8, 8), 3)
            assert torch.equal(index.modulation.pixel_row, expected_index.modulation.pixel_row)

    def test_epochs_and_seeds_differ(self, coco):
        config = small("coco", coco, batch_size=10)
        dataset = create_dataset(config, "train")
        orders = {tuple(batches(config, dataset, epoch=epoch)[0].names) for epoch in range(4)}
        assert len(orders) == 4
        reseeded = replace(config, seed=1)
        assert batches(reseeded, dataset)[0].names != batches(config, dataset)[0].names
        assert not torch.equal(dataset[0, 0].image, dataset[1, 0].image)
        serial = replace(config, serial_batches=True)
        assert batches(serial, dataset)[0].names == [str(number) for number in range(10)]

    def test_ranks_share_the_global_batch(self, coco):
        single = small("coco", coco, batch_size=4)
        dataset = create_dataset(single, "train")
        shared = replace(single, batch_size=2)
        ranks = [batches(shared, dataset, rank=rank, world_size=2) for rank in range(2)]
        for step, whole in enumerate(batches(single, dataset)):
            assert whole.names == ranks[0][step].names + ranks[1][step].names
            assert torch.equal(whole.image, torch.cat([ranks[0][step].image, ranks[1][step].image]))
        assert [len(rank) for rank in ranks] == [2, 2]

    @pytest.mark.parametrize(("batch_size", "world_size"), [(1, 1), (4, 1), (1, 2), (3, 2)])
    def test_the_rest_of_an_epoch_is_shared_out_anew(self, coco, batch_size, world_size):
        """After four images in batches of two: every other image comes once, but those that fill no batch."""
        config = small("coco", coco, batch_size=2)
        dataset = create_dataset(config, "train")
        rest = [name for batch in batches(config, dataset)[2:] for name in batch.names]
        other = replace(config, batch_size=batch_size)
        ranks = [batches(other, dataset, first_image=4, rank=rank, world_size=world_size) for rank in range(world_size)]
        found = [name for step in zip(*ranks, strict=True) for batch in step for name in batch.names]
        assert found == rest[: len(rest) // (batch_size * world_size) * batch_size * world_size]

    def test_last_batch(self, coco):
        config = small("coco", coco, batch_size=4)
        dataset = create_dataset(config, "train")
        assert [len(batch.names) for batch in batches(config, dataset, drop_last=False)] == [4, 4, 2]
        assert [len(batch.names) for batch in batches(config, dataset)] == [4, 4]

    def test_global_random_state_is_untouched(self, coco):
        config = small("coco", coco)
        before = (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate())
        batches(config, create_dataset(config, "train"))
        batches(replace(config, num_workers=1), create_dataset(config, "train"))
        assert before == (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate())

    def test_batch_moves(self, coco):
        config = small("coco", coco)
        batch = batches(config, create_dataset(config, "train"))[0].to("meta")
        assert batch.segmap.labels.device.type == batch.image.device.type == "meta"

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_a_bad_file_stops_with_its_own_message(self, coco, num_workers):
        (coco / "train_img/7.jpg").write_bytes(b"")
        config = small("coco", coco, num_workers=num_workers)
        with pytest.raises(UserError) as caught:
            batches(config, create_dataset(config, "train"))
        assert str(caught.value).startswith(str(coco / "train_img/7.jpg") + ": the file is empty")


class TestLoadCondition:
    def test_label_and_instances(self, coco):
        config = small("coco", coco)
        batch = load_condition(coco / "train_label/4.png", config, coco / "train_inst/4.png")
        assert batch.segmap.one_hot().shape == (1, config.semantic_nc, 32, 32)
        assert batch.image is None
        assert batch.names == ["4"]

    def test_without_instances(self, coco):
        batch = load_condition(str(coco / "train_label/4.png"), small("coco", coco, no_instance=True))
        assert batch.segmap.edges is None
        with pytest.raises(UserError, match=r"4\.png.*instance"):
            load_condition(coco / "train_label/4.png", small("coco", coco))

    def test_instances_that_are_not_used(self, coco):
        config = small("coco", coco, no_instance=True)
        with pytest.raises(UserError, match=r"--instance .*4\.png .* --no_instance: leave --instance out"):
            load_condition(coco / "train_label/4.png", config, coco / "train_inst/4.png")

    def test_toy_takes_any_size(self, coco):
        config = replace(default_data_config("toy"), no_instance=True)
        assert load_condition(write(coco / "x.png", 3), config).segmap.labels.shape == (1, 64, 64)


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="needs the COCO-Stuff samples in ../shared/data/coco_stuff")
@pytest.mark.parametrize("split", ["train", "val"])
def test_real_coco(split):
    config = replace(default_data_config("coco"), dataroot=str(REAL_DATA))
    dataset = create_dataset(config, split)
    assert isinstance(dataset, FolderDataset)
    for batch in create_loader(dataset, config, shuffle=split == "train", epoch=0):
        assert batch.segmap.one_hot().shape == (1, config.semantic_nc, 256, 256)
        assert batch.image.shape == (1, 3, 256, 256)
        assert batch.segmap.edges.any()


def run_script(script: str, folder: Path, job) -> None:
    """Runs a Python script in a folder that has the pickled job in the file `job`."""
    (folder / "job").write_bytes(pickle.dumps(job))
    (folder / "script.py").write_text(script)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "script.py"], cwd=folder, env=environment, check=True, timeout=120)
