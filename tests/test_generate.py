"""Generating images: from runs of this project and from the original's files."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_train import small_config

import spade_model
from spade_model.architecture import infer_generator
from spade_model.cli import main
from spade_model.config import DataConfig, ModelConfig
from spade_model.data import create_dataset, load_condition
from spade_model.data.classes import known_ids
from spade_model.errors import UserError
from spade_model.networks import ConvEncoder, build_encoder, build_generator
from spade_model.visualize import to_image

SHAPES = {
    "normal": (ModelConfig(ngf=4), DataConfig(crop_size=64, label_nc=5)),
    "most, instance norm, no instances": (
        ModelConfig(ngf=4, num_upsampling_layers="most", norm_G="spadeinstance3x3"),
        DataConfig(crop_size=256, label_nc=5, no_instance=True),
    ),
    "vae, 5x5": (
        ModelConfig(ngf=3, use_vae=True, z_dim=8, norm_G="spectralspadesyncbatch5x5"),
        DataConfig(crop_size=128, label_nc=5, contain_dontcare_label=False),
    ),
    "grey": (ModelConfig(ngf=4), DataConfig(crop_size=64, label_nc=5, output_nc=1)),
    "vae, more": (
        ModelConfig(ngf=3, use_vae=True, z_dim=8, num_upsampling_layers="more"),
        DataConfig(crop_size=128, label_nc=5),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_the_original_are_inferred(tmp_path, name):
    """Written as the original writes them, loaded with nothing but label_nc and crop_size said."""
    model, data = SHAPES[name]
    generator = build_generator(data, model).eval()
    state = generator.state_dict()
    torch.save({f"module.{k}": v for k, v in state.items()}, tmp_path / "latest_net_G.pth")
    given = DataConfig(label_nc=5, crop_size=data.crop_size)
    mode = "normal" if model.num_upsampling_layers != "more" else "more"
    loaded = spade_model.load_model(
        tmp_path / "latest_net_G.pth", given, ModelConfig(num_upsampling_layers=mode), device="cpu"
    )
    assert (loaded.data.semantic_nc, loaded.data.output_nc) == (data.semantic_nc, data.output_nc)
    assert replace(loaded.model, norm_E=model.norm_E) == replace(model, norm_E=model.norm_E)
    segmap = torch.randint(0, 5, (1, 32, 32))
    planes = torch.nn.functional.one_hot(segmap, data.semantic_nc).permute(0, 3, 1, 2).float()
    z = torch.randn(1, 8) if model.use_vae else None
    generator.freeze()
    with torch.no_grad():
        assert torch.equal(loaded(planes, z), generator(planes, z))


def test_files_of_old_torch_versions_load(tmp_path):
    """Spectral norm without its second vector but with the normalized weight, sync-batch norm without its counter."""
    model, data = SHAPES["normal"]
    generator = build_generator(data, model).eval()
    old = generator.state_dict()
    for name in [name for name in old if name.endswith(".weight_orig")]:
        left, _, right = torch.linalg.svd(old[name].flatten(1), full_matrices=False)
        # In place, so that the generator has the converged vectors too.
        old[f"{name[:-5]}_u"].copy_(left[:, 0])
        old[f"{name[:-5]}_v"].copy_(right[0])
        old[name[:-5]] = old[name] / torch.linalg.matrix_norm(old[name].flatten(1), 2)
    old = {k: v for k, v in old.items() if not k.endswith(("weight_v", "num_batches_tracked"))}
    torch.save(old, tmp_path / "latest_net_G.pth")
    loaded = spade_model.load_model(tmp_path / "latest_net_G.pth", data, device="cpu")
    planes = torch.rand(1, data.semantic_nc, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(planes), generator(planes), rtol=0, atol=1e-4)


def test_images_of_other_channels_are_refused():
    model, data = SHAPES["normal"]
    state = build_generator(data, model).state_dict()
    state["conv_img.weight"] = state["conv_img.weight"].new_zeros(4, 4, 3, 3)
    with pytest.raises(UserError, match=r"file makes images of 4 channels; only grey \(1\) and RGB \(3\)"):
        infer_generator(state, data, ModelConfig(), "file")


def test_vae_crop_size_is_inferred():
    model, data = SHAPES["vae, 5x5"]
    state = build_generator(data, model).state_dict()
    found, _ = infer_generator(state, replace(data, crop_size=DataConfig().crop_size), ModelConfig(), "file")
    assert found.crop_size == 128


@pytest.mark.parametrize(
    ("shape", "option", "value", "words"),
    [
        ("vae, 5x5", "crop_size", 512, "with --crop_size 128, not with --crop_size 512"),
        ("vae, 5x5", "no_instance", True, "without --no_instance, not with --no_instance"),
        ("normal", "use_vae", True, "without --use_vae, not with --use_vae"),
        ("normal", "ngf", 5, "with --ngf 4, not with --ngf 5"),
        ("normal", "norm_G", "spadeinstance3x3", "with --norm_G spectralspadesyncbatch3x3, not"),
        ("normal", "output_nc", 1, "with --output_nc 3, not with --output_nc 1"),
    ],
)
def test_options_that_contradict_the_originals_weights(shape, option, value, words):
    model, data = SHAPES[shape]
    state = build_generator(data, model).state_dict()
    given = {
        type(part): replace(part, **{option: value}) if hasattr(part, option) else part
        for part in (data, ModelConfig())
    }
    with pytest.raises(UserError, match=f"file was trained {words}"):
        infer_generator(state, given[DataConfig], given[ModelConfig], "file")


def test_norms_of_equal_parameters_do_not_contradict():
    model, data = SHAPES["normal"]
    state = build_generator(data, model).state_dict()
    infer_generator(state, data, replace(model, norm_G="spectralspadebatch3x3"), "file")


@pytest.mark.parametrize(
    ("options", "known"),
    [
        ({"contain_dontcare_label": False}, "the ids 0..4"),
        ({}, "the ids 0..4, and 255 for unknown"),
        ({"dataset_mode": "ade20k", "ade20k_shift": True}, "the ids 1..5, and 0 or 255 for unknown"),
    ],
)
def test_known_ids(options, known):
    assert known_ids(DataConfig(label_nc=5, **options)) == known


@pytest.fixture(scope="module")
def vae_run(tmp_path_factory):
    config = small_config(tmp_path_factory.mktemp("run"), max_steps=3, model={"use_vae": True}, ema_decay=0.5)
    return spade_model.train(config)


@pytest.fixture
def label_files(tmp_path):
    """Three toy masks and their instances as image files."""
    config = small_config(tmp_path).data
    for index in range(3):
        sample = create_dataset(config, "val", need_images=False)[index]
        for folder, ids in (("labels", sample.condition), ("instances", sample.edges)):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(ids.numpy().astype(np.uint8)).save(tmp_path / folder / f"{index}.png")
    return tmp_path


def test_generate_in_python(vae_run, label_files):
    file = vae_run / "latest.safetensors"
    where = {"label": label_files / "labels/0.png", "instance": label_files / "instances/0.png"}
    one, two = spade_model.generate(file, **where, samples=2, seed=3)
    assert one.size == (32, 32)
    assert one.tobytes() != two.tobytes(), "styles differ"
    assert spade_model.generate(file, **where, seed=3)[0].tobytes() == one.tobytes()
    loaded = spade_model.load_model(file)
    batch = load_condition(where["label"], loaded.data, where["instance"])
    z = torch.randn(1, loaded.model.z_dim, generator=torch.Generator().manual_seed(3))
    assert to_image(loaded(batch.segmap, z)[0]).tobytes() == one.tobytes()


def test_style_image(vae_run, label_files):
    photo = label_files / "photo.png"
    Image.effect_noise((40, 30), 90).convert("RGB").save(photo)
    where = {"label": label_files / "labels/0.png", "instance": label_files / "instances/0.png"}
    mean, varied = spade_model.generate(vae_run / "latest.safetensors", **where, style_image=photo, samples=2)
    again = spade_model.generate(vae_run / "latest.safetensors", **where, style_image=photo, seed=9)[0]
    assert mean.tobytes() == again.tobytes(), "the first image takes the style's mean, whatever the seed"
    assert varied.tobytes() != mean.tobytes()


def test_a_style_from_a_file_or_any_picture(vae_run, tmp_path):
    loaded = spade_model.load_model(str(vae_run / "latest.safetensors"))
    grey = Image.effect_noise((40, 30), 90)
    grey.save(tmp_path / "photo.png")
    styles = [loaded.style(image) for image in (grey, grey.convert("RGB"), str(tmp_path / "photo.png"))]
    for mu, logvar in styles[1:]:
        assert torch.equal(mu, styles[0][0])
        assert torch.equal(logvar, styles[0][1])
    with pytest.raises(UserError, match=r"nowhere\.png: cannot be opened"):
        loaded.style(tmp_path / "nowhere.png")


@pytest.mark.parametrize("bits", [8, 16])
def test_grey_from_training_to_the_page(tmp_path, label_files, bits):
    """Trains, goes on, and generates in the style of a photograph: all with one channel."""
    config = small_config(
        tmp_path, max_steps=1, no_html=False, data={"output_nc": 1, "image_bits": bits}, model={"use_vae": True}
    )
    run = spade_model.train(config)
    spade_model.train(replace(config, max_steps=2, continue_train=True))
    samples = sorted((run / "web/images/step_00000002").rglob("*.png"))
    assert [Image.open(file).mode for file in samples] == [*["RGB"] * 2, *["L"] * 4]
    photo = to_image(torch.rand(1, 40, 30), bits)
    photo.save(tmp_path / "photo.png")
    masks = ["--label", str(label_files / "labels"), "--instance", str(label_files / "instances")]
    command = ["generate", "--name", "run", "--checkpoints_dir", str(tmp_path), *masks, "--how_many", "1", "--overlay"]
    command += ["--style_image", str(tmp_path / "photo.png"), "--results_dir", str(tmp_path / "out")]
    assert main(command) == 0
    file = run / "latest.safetensors"
    where = {"label": label_files / "labels/0.png", "instance": label_files / "instances/0.png"}
    image = spade_model.generate(file, **where, style_image=tmp_path / "photo.png")[0]
    written = Image.open(tmp_path / "out/run/latest/images/synthesized_image/0.png")
    assert image.mode == written.mode == {8: "L", 16: "I;16"}[bits]
    assert (np.asarray(image) == np.asarray(written)).all()
    loaded = spade_model.load_model(file)
    assert torch.equal(loaded.style(photo)[0], loaded.style(tmp_path / "photo.png")[0])


def test_average_and_last_weights_differ(vae_run):
    file = vae_run / "latest.safetensors"
    average, last = (spade_model.load_model(file, last_weights=flag).generator for flag in (False, True))
    assert any((a != b).any() for a, b in zip(average.parameters(), last.parameters(), strict=True))


def test_generate_command_on_folders(vae_run, label_files, capsys):
    command = ["generate", "--name", "run", "--checkpoints_dir", str(vae_run.parent), "--samples", "2", "--overlay"]
    command += ["--label", str(label_files / "labels"), "--instance", str(label_files / "instances")]
    assert main([*command, "--results_dir", str(label_files / "out"), "--how_many", "2"]) == 0
    page = label_files / "out" / "run" / "latest" / "index.html"
    assert str(page) in capsys.readouterr().out
    assert len(list(page.parent.rglob("*.png"))) == 2 * 5, "label, two images, two overlays of two masks"


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """A run without a VAE, trained at 32x32."""
    return spade_model.train(small_config(tmp_path_factory.mktemp("plain"), max_steps=2, data={"no_instance": True}))


def save_mask(path: Path, size: tuple[int, int], ids: int = 7) -> Path:
    """Left third, middle and right third of different classes."""
    path.parent.mkdir(exist_ok=True)
    columns = np.arange(size[0]) * ids // size[0]
    Image.fromarray(np.tile(columns.astype(np.uint8), (size[1], 1))).save(path)
    return path


@pytest.mark.parametrize(
    ("size", "fit", "made"),
    [
        (None, "pad", (80, 50)),
        ((64, 64), "pad", (64, 40)),
        ((64, 64), "crop", (64, 64)),
        ((64, 96), "stretch", (64, 96)),
        ((30, 30), "pad", (30, 19)),
    ],
)
def test_sizes_without_a_vae(plain_run, tmp_path, size, fit, made):
    mask = save_mask(tmp_path / "a.png", (80, 50))
    assert spade_model.generate(plain_run / "latest.safetensors", mask, size=size, fit=fit)[0].size == made


@pytest.mark.parametrize(("fit", "made"), [("pad", (32, 20)), ("crop", (32, 32)), ("stretch", (32, 32))])
def test_sizes_with_a_vae(vae_run, tmp_path, fit, made):
    where = {"label": save_mask(tmp_path / "a.png", (80, 50)), "instance": save_mask(tmp_path / "b.png", (80, 50))}
    assert spade_model.generate(vae_run / "latest.safetensors", **where, fit=fit)[0].size == made
    with pytest.raises(UserError, match=r"--size 64x64 does not fit: this model makes images of 32x32 only, .*VAE"):
        spade_model.generate(vae_run / "latest.safetensors", **where, size=(64, 64))


def test_a_mask_of_another_size_is_generated_as_by_a_generator_of_that_size(plain_run, tmp_path):
    """The border of 80x50 is repeated to 96x64, the next multiples of 32, and cut off again."""
    file, mask = plain_run / "latest.safetensors", save_mask(tmp_path / "a.png", (80, 50))
    loaded = spade_model.load_model(file)
    larger = build_generator(replace(loaded.data, crop_size=96, aspect_ratio=1.5), loaded.model).eval()
    larger.load_state_dict({**larger.state_dict(), **loaded.generator.train().state_dict()})
    labels = np.pad(np.asarray(Image.open(mask)), ((7, 7), (8, 8)), mode="edge")
    larger.eval().freeze()
    with torch.no_grad():
        whole = larger(torch.from_numpy(labels.astype(np.int64))[None])
    expected = np.asarray(to_image(whole[0, :, 7:57, 8:88]))
    assert (np.asarray(spade_model.generate(file, mask)[0]) == expected).all()


def test_a_folder_of_mixed_sizes_with_bad_files(plain_run, tmp_path, spade, caplog):
    save_mask(tmp_path / "masks/a.png", (80, 50))
    save_mask(tmp_path / "masks/b.png", (32, 32))
    save_mask(tmp_path / "masks/c.png", (80, 50), ids=9)
    (tmp_path / "masks/d.png").write_text("hello")
    command = ["generate", "--name", "run", "--checkpoints_dir", plain_run.parent, "--label", tmp_path / "masks"]
    with caplog.at_level("INFO", "spade_model"):
        done = spade(*command, "--results_dir", tmp_path / "out")
    assert done.status == 2
    page = tmp_path / "out/run/latest/index.html"
    lines = done.out.splitlines()
    assert [line.split(": ")[1] for line in lines[:2]] == [str(tmp_path / f"masks/{name}.png") for name in "cd"]
    assert "The model knows the ids 0..6" in lines[0]
    assert "not a readable" in lines[1]
    assert lines[2:] == [f"2 images of 2 masks, and their page: {page}", "2 masks could not be read"]
    made = {path.name: Image.open(path).size for path in (page.parent / "images/synthesized_image").iterdir()}
    assert made == {"a.png": (80, 50), "b.png": (32, 32)}
    assert len(caplog.messages) == 1
    assert "the model was trained at 32x32, and --size 32 stays close" in caplog.messages[0]
    assert "for 80x50 it makes 96x64" in caplog.messages[0]


def test_masks_that_need_repair_say_so(plain_run, tmp_path, spade):
    command = ["generate", "--name", "run", "--checkpoints_dir", plain_run.parent, "--results_dir", tmp_path / "out"]
    Image.fromarray(np.repeat(np.array([[0], [256]], np.uint16), 32, 1)).save(tmp_path / "a.png")
    refused = spade(*command, "--label", tmp_path / "a.png")
    assert (refused.status, (tmp_path / "out").exists()) == (2, False)
    assert "The model knows the ids 0..6. All its ids are multiples of 256: divide them by 256." in refused.err


def test_missing_memory_on_a_cpu_is_an_error_with_a_remedy(plain_run, tmp_path, spade, monkeypatch):
    def allocate(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.\nDetails")

    monkeypatch.setattr("spade_model.generation.LoadedModel.__call__", allocate)
    save_mask(tmp_path / "a.png", (80, 50))
    refused = spade("generate", "--name", "run", "--checkpoints_dir", plain_run.parent, "--label", tmp_path / "a.png")
    assert (refused.status, "9 bytes. Use a smaller --size" in refused.err) == (2, True)


def test_instances_get_the_size_of_their_mask(tmp_path, label_files):
    run = spade_model.train(small_config(tmp_path, max_steps=1))
    where = {"label": save_mask(tmp_path / "a.png", (80, 50)), "instance": save_mask(tmp_path / "b.png", (80, 50), 3)}
    assert spade_model.generate(run / "latest.safetensors", **where)[0].size == (80, 50)


def test_results_never_mix(vae_run, label_files, capsys):
    """Runs with checkpoints of the same name, and a second run of the same: each has a folder of its own."""
    other = shutil.copytree(vae_run, label_files / "other")
    masks = ["--label", str(label_files / "labels"), "--instance", str(label_files / "instances")]
    pages = []
    for file, count in ((vae_run / "latest.safetensors", 2), (other / "latest.safetensors", 1), (other / "latest", 3)):
        which = ["--checkpoint", str(file.with_suffix(".safetensors"))]
        assert (
            main(["generate", *which, *masks, "--results_dir", str(label_files / "out"), "--how_many", f"{count}"]) == 0
        )
        noun = "1 image of 1 mask" if count == 1 else f"{count} images of {count} masks"
        said, _, page = capsys.readouterr().out.rstrip().partition(", and their page: ")
        pages.append(Path(page))
        assert said == noun
        assert len(list(pages[-1].parent.rglob("*.png"))) == 2 * count == pages[-1].read_text().count("<img")
    assert [str(page.parent.relative_to(label_files / "out")) for page in pages] == [
        "run/latest",
        "other/latest",
        "other/latest_2",
    ]


def test_generate_command_on_the_val_split(vae_run, tmp_path):
    command = ["generate", "--name", "run", "--checkpoints_dir", str(vae_run.parent), "--how_many", "3"]
    assert main([*command, "--results_dir", str(tmp_path)]) == 0
    assert len(list((tmp_path / "run").rglob("*.png"))) == 3 * 2


def test_original_vae_with_encoder_beside_it(tmp_path, label_files):
    model, data = SHAPES["vae, 5x5"]
    data = replace(data, label_nc=7)
    torch.save(build_generator(data, model).state_dict(), tmp_path / "latest_net_G.pth")
    encoder = build_encoder(data, replace(model, ngf=5))
    assert isinstance(encoder, ConvEncoder)
    torch.save(encoder.state_dict(), tmp_path / "latest_net_E.pth")
    photo = tmp_path / "photo.png"
    Image.effect_noise((64, 64), 90).convert("RGB").save(photo)
    images = spade_model.generate(
        tmp_path / "latest_net_G.pth",
        label_files / "labels/0.png",
        instance=label_files / "instances/0.png",
        style_image=photo,
        data=replace(data, preprocess_mode="fixed"),
    )
    assert images[0].size == (128, 128)


def test_real_masks(coco_dir, tmp_path):
    """Trains on real COCO-Stuff masks and photographs, and generates the val masks."""
    common = ["--name", "coco", "--checkpoints_dir", str(tmp_path)]
    train = ["train", "--dataset_mode", "coco", "--dataroot", str(coco_dir), *common, "--ngf", "2", "--ndf", "2"]
    assert main([*train, "--no_vgg_loss", "--max_steps", "2", "--display_freq", "2", "--print_freq", "1"]) == 0
    assert main(["generate", *common, "--results_dir", str(tmp_path / "results")]) == 0
    made = sorted((tmp_path / "results" / "coco" / "latest" / "images" / "synthesized_image").glob("*.png"))
    assert [p.name for p in made] == sorted(p.name for p in (coco_dir / "val_label").glob("*.png"))
    assert all(Image.open(p).size == (256, 256) for p in made)
