"""The CUDA kernels without a GPU: compiled for the host as they are, and run one thread at a time.

`tests/cuda_host/cuda_host.h` stands in for the device. What is left for a GPU to prove is launches and barriers.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

from spade_kernels import ops, reference
from spade_kernels.testing import MASK_KINDS, assert_within_budget, random_labels

HERE = Path(__file__).parent
CUDA = HERE.parent / "csrc" / "cuda"
FLAGS = ["-std=c++20", "-O1", "-fno-strict-aliasing", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra", "-Werror"]
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
LIBRARIES = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]
CHECKS = ["-fsanitize=alignment,shift,signed-integer-overflow", "-fno-sanitize-recover=all"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CONVOLUTIONS = [(1, 1, 0), (3, 1, 1), (5, 1, 2), (4, 2, 2), (3, 2, 1), (3, 1, 0), (7, 3, 5)]
# The order of blocks and of threads, and how many host threads run blocks at once.
ORDERS = {"forwards": (False, 1), "backwards": (True, 1), "threads": (False, 4)}


def compiled(name: str, folder: Path, *flags: str) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    library = folder / f"{name}.so"
    paths = [f"-I{HERE / 'cuda_host'}", f"-I{CUDA}", *(f"-isystem{path}" for path in include_paths())]
    source = str(HERE / "cuda_host" / f"{name}.cpp")
    options = [*FLAGS, *CHECKS, TARGET, "-Wno-unknown-pragmas", *paths, *flags]
    command = [compiler, *options, source, *LIBRARIES, "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


@pytest.fixture(scope="module")
def windows_library(tmp_path_factory) -> ctypes.CDLL:
    return ctypes.CDLL(str(compiled("window_index", tmp_path_factory.mktemp("host"))))


@pytest.fixture(scope="module")
def one_slot_library(tmp_path_factory) -> ctypes.CDLL:
    """All windows look for their place in the same slot."""
    return ctypes.CDLL(str(compiled("window_index", tmp_path_factory.mktemp("one_slot"), "-DSPADE_HASH_FACTOR=0ull")))


@pytest.fixture(scope="module")
def pixels_library(tmp_path_factory) -> ctypes.CDLL:
    return ctypes.CDLL(str(compiled("pixels", tmp_path_factory.mktemp("host"))))


CANARY = 64


def guarded(*shape: int, dtype: torch.dtype) -> Tensor:
    """Memory that nothing has written yet, between two stretches that nothing may write."""
    count = torch.Size(shape).numel()
    whole = torch.full((count + 2 * CANARY,), -77, dtype=dtype)
    return whole[CANARY : CANARY + count].view(shape)


def assert_written_within(t: Tensor) -> None:
    whole = torch.as_strided(t, (t.numel() + 2 * CANARY,), (1,), t.storage_offset() - CANARY)
    assert (whole[:CANARY] == -77).all()
    assert (whole[-CANARY:] == -77).all()


def pointer(t: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def numbers(*values: int):
    return (ctypes.c_int64 * len(values))(*values)


def window_index(
    library: ctypes.CDLL,
    ids: Tensor,
    sizes: list[tuple[int, int]],
    convolution: tuple[int, int, int],
    order: str,
    levels: int = 1,
) -> list[Tensor]:
    kernel_size, stride, padding = convolution
    images = ids.shape[0]
    found: list[Tensor] = []
    for size in sizes:
        for _ in range(levels):
            size = tuple((s + 2 * padding - kernel_size) // stride + 1 for s in size)
            found.append(guarded(images * size[0] * size[1], kernel_size**2, dtype=torch.int64))
            found.append(guarded(images, *size, dtype=torch.int64))
            found.append(guarded(images + 1, dtype=torch.int64))
    num_rows = numbers(*[0] * (len(sizes) * levels))
    library.run_on(*ORDERS[order])
    library.window_index.restype = ctypes.c_bool
    assert library.window_index(
        pointer(ids),
        numbers(*ids.shape),
        numbers(*(side for size in sizes for side in size)),
        ctypes.c_int64(len(sizes)),
        numbers(*convolution),
        ctypes.c_int64(levels),
        (ctypes.c_void_p * len(found))(*(t.data_ptr() for t in found)),
        num_rows,
    )
    for result in found:
        assert_written_within(result)
    for i, rows in enumerate(num_rows):
        assert (found[3 * i][rows:] == -77).all()
        found[3 * i] = found[3 * i][:rows]
    return found


def check_windows(
    library: ctypes.CDLL, ids: Tensor, sizes, convolution, order: str = "forwards", levels: int = 1
) -> None:
    flat = [side for size in sizes for side in size]
    expected = reference.window_index(ids, flat, *convolution, levels)
    for got, wanted in zip(window_index(library, ids, sizes, convolution, order, levels), expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("convolution", CONVOLUTIONS)
@pytest.mark.parametrize("kind", MASK_KINDS)
def test_windows(windows_library, kind, convolution, order):
    ids = random_labels(kind, (3, 13, 10), 6) + 1
    check_windows(windows_library, ids, [(13, 10), (7, 7), (20, 31)], convolution, order)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", MASK_KINDS)
def test_windows_of_windows(windows_library, kind, order):
    ids = random_labels(kind, (3, 13, 10), 6) + 1
    # More maps than one launch takes.
    sizes = [(13, 10), (1, 1), (40, 39), *((8 + i, 9) for i in range(8))]
    check_windows(windows_library, ids, sizes, (3, 1, 1), order, levels=2)
    check_windows(windows_library, ids, sizes[:3], (5, 1, 2), order, levels=3)
    check_windows(windows_library, ids, sizes[2:], (4, 2, 2), order, levels=2)


def test_nearest_resize(windows_library):
    for source in range(1, 41):
        ids = torch.arange(1, source + 1).view(1, 1, source)
        check_windows(windows_library, ids, [(1, target) for target in range(1, 41)], (1, 1, 0))


@pytest.mark.parametrize("order", ORDERS)
def test_windows_of_several_blocks(windows_library, order):
    """More pixels than threads in a block, and more than one turn for each."""
    ids = random_labels("islands", (8, 200, 200), 30) + 1
    check_windows(windows_library, ids, [(200, 200), (9, 9)], (3, 1, 1), order, levels=2)
    check_windows(windows_library, ids[:3, :101, :99].contiguous(), [(77, 150)], (3, 1, 1), order)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["noise", "stripes", "islands"])
def test_windows_that_meet_in_one_slot(one_slot_library, kind, order):
    ids = random_labels(kind, (2, 17, 19), 50) + 1
    check_windows(one_slot_library, ids, [(17, 19)], (3, 1, 1), order, levels=2)
    check_windows(one_slot_library, ids, [(9, 30)], (4, 2, 2), order)


def test_ids_of_any_size(windows_library):
    """Ids are compared as they are: none can reach outside a table or stand for another."""
    values = torch.tensor([1, 2**31, 2**32, 2**32 + 1, 2**62, 2**63 - 1, -1, -(2**63)])
    ids = values[random_labels("noise", (2, 12, 11), len(values))]
    windows, pixel_row, _ = window_index(windows_library, ids, [(12, 11)], (3, 1, 1), "forwards")
    padded = F.pad(ids, (1, 1, 1, 1))
    expected = padded.unfold(1, 3, 1).unfold(2, 3, 1).flatten(3)
    assert torch.equal(windows[pixel_row], expected)
    assert len(windows) == sum(len(image.flatten(0, 1).unique(dim=0)) for image in expected)


def test_windows_under_contention(windows_library):
    for seed in range(5):
        ids = random_labels("noise", (1, 90, 90), 2, seed) + 1
        check_windows(windows_library, ids, [(90, 90)], (3, 1, 1), "threads", levels=2)


DTYPE_NUMBERS = {dtype: number for number, dtype in enumerate(DTYPES)}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def channels_last(x: Tensor) -> Tensor:
    """x (N, C, h, w) at the start of an access, laid out as (N, h, w, C)."""
    return x.permute(0, 2, 3, 1).contiguous()


def images_of(pixels: Tensor) -> Tensor:
    return pixels.permute(0, 3, 1, 2)


def by_name(names: tuple[str, ...], results: tuple[Tensor, ...] | Tensor) -> dict[str, Tensor]:
    return dict(zip(names, results if isinstance(results, tuple) else (results,), strict=True))


# Vectors and odd channel counts; one pixel, odd sizes, several pieces of which the last is short, several groups.
SHAPES = [(2, 8, 5, 7), (1, 3, 1, 1), (2, 64, 33, 17), (1, 24, 41, 40), (3, 1, 9, 130), (1, 520, 6, 5), (2, 37, 30, 9)]


@pytest.mark.parametrize("order", ["forwards", "backwards"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_channel_stats(pixels_library, dtype, shape, order):
    far_off = 1000 if dtype != torch.bfloat16 else 8
    x = (torch.randn(shape) * 0.5 + far_off * torch.randn(shape[1]).view(-1, 1, 1)).to(dtype)
    pixels = channels_last(x)
    mean, m2 = (guarded(*shape[:2], dtype=accumulator(dtype)) for _ in range(2))
    pixels_library.run_on(*ORDERS[order])
    pixels_library.channel_stats(DTYPE_NUMBERS[dtype], *map(pointer, (pixels, mean, m2)), numbers(*shape))
    assert_written_within(mean)
    assert_written_within(m2)
    names = ("mean", "m2")
    stock, exact = reference.channel_stats(x), reference.channel_stats(x.double())
    assert_within_budget(by_name(names, (mean, m2)), by_name(names, stock), by_name(names, exact))


@pytest.mark.parametrize("place", [0, 1, 640, -1])
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_channel_stats_beside_one_far_off(pixels_library, size, place):
    """Whichever pixel it is, the others lose no digits."""
    shape = (2, 8, 60, 70)
    x = torch.randn(shape)
    x.flatten(2)[:, :, place] = size
    pixels, mean, m2 = channels_last(x), *(guarded(*shape[:2], dtype=torch.float32) for _ in range(2))
    pixels_library.run_on(*ORDERS["forwards"])
    pixels_library.channel_stats(0, *map(pointer, (pixels, mean, m2)), numbers(*shape))
    names = ("mean", "m2")
    stock, exact = reference.channel_stats(x), reference.channel_stats(x.double())
    assert_within_budget(by_name(names, (mean, m2)), by_name(names, stock), by_name(names, exact))


@pytest.mark.parametrize(("dtype", "channels"), [(torch.float32, 128), (torch.bfloat16, 31)])
def test_channel_stats_of_many_blocks(pixels_library, dtype, channels):
    """So many that each of their threads takes several batches of pixels, the last of them short."""
    shape = (512, channels, 9, 15)
    x = (torch.randn(shape) + 8).to(dtype)
    pixels, mean, m2 = channels_last(x), *(guarded(*shape[:2], dtype=torch.float32) for _ in range(2))
    pixels_library.run_on(*ORDERS["forwards"])
    pixels_library.channel_stats(DTYPE_NUMBERS[dtype], *map(pointer, (pixels, mean, m2)), numbers(*shape))
    names = ("mean", "m2")
    stock, exact = reference.channel_stats(x), reference.channel_stats(x.double())
    assert_within_budget(by_name(names, (mean, m2)), by_name(names, stock), by_name(names, exact))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_channel_stats_grad(pixels_library, dtype, shape):
    x = torch.randn(shape).to(dtype)
    pixels = channels_last(x)
    mean, grad_mean, grad_m2 = (torch.randn(shape[:2], dtype=accumulator(dtype)) for _ in range(3))
    out = guarded(*pixels.shape, dtype=dtype)
    pixels_library.run_on(*ORDERS["forwards"])
    inputs = map(pointer, (pixels, mean, grad_mean, grad_m2, out))
    pixels_library.channel_stats_grad(DTYPE_NUMBERS[dtype], *inputs, numbers(*shape))
    assert_written_within(out)
    stock = reference.channel_stats_grad(x, mean, grad_mean, grad_m2)
    exact = reference.channel_stats_grad(*(t.double() for t in (x, mean, grad_mean, grad_m2)))
    assert_within_budget({"x": images_of(out)}, {"x": stock}, {"x": exact})


class Modulation:
    """Inputs of a modulate call, and its three passes by the kernels and by the reference."""

    def __init__(
        self,
        library,
        shape,
        dtype,
        table_dtype,
        pixel_row=None,
        num_rows=0,
        *,
        upsample=1,
        negative_slope=0.2,
        one=False,
    ):
        n, c, height, width = shape
        acc = accumulator(dtype)
        self.library, self.shape, self.how = library, shape, (negative_slope, upsample)
        self.size = (height * upsample, width * upsample)
        self.pixel_row = None if pixel_row is None else pixel_row.view(n, *self.size)
        rows = num_rows if pixel_row is not None else n * height * width * upsample**2
        self.x = torch.randn(shape).to(dtype)
        self.grad = torch.randn(n, c, *self.size).to(dtype)
        self.stats = [torch.randn(1 if one else n, c, dtype=acc), torch.rand(1 if one else n, c, dtype=acc) + 0.5]
        self.means = [torch.randn(1 if one else n, c, dtype=acc) for _ in range(2)]
        self.table = torch.randn(rows, 2 * c, dtype=acc).to(table_dtype)
        self.groups = (None, None) if pixel_row is None else ops.segments_by_value(self.pixel_row, rows)

    def run(self, order: str = "forwards", skew: int = 0, means: bool = True) -> dict[str, Tensor]:
        """By the kernels; `skew` moves x that many elements off the start of an access."""
        n, c, height, width = self.shape
        self.library.run_on(*ORDERS[order])
        pixels = channels_last(self.x)
        memory = torch.empty(pixels.numel() + 16, dtype=pixels.dtype)
        x = memory[skew : skew + pixels.numel()].copy_(pixels.flatten())
        grad, given = channels_last(self.grad), self.means if means else [None, None]
        inputs = (x, grad, *self.stats, self.table, self.pixel_row, *self.groups, *given)
        pointers = (ctypes.c_void_p * len(inputs))(*(pointer(t).value for t in inputs))
        sizes = numbers(*self.shape, len(self.table), len(self.stats[0]), len(self.means[0]))
        outputs = (
            guarded(n, *self.size, c, dtype=self.x.dtype),
            guarded(*self.table.shape, dtype=accumulator(self.x.dtype)),
            guarded(n, height, width, c, dtype=self.x.dtype),
        )
        negative_slope, upsample = self.how
        for number, out in enumerate(outputs):
            dtypes = (DTYPE_NUMBERS[self.x.dtype], DTYPE_NUMBERS[self.table.dtype])
            self.library.modulate(
                number,
                *dtypes,
                pointers,
                pointer(out),
                sizes,
                ctypes.c_double(negative_slope),
                ctypes.c_int64(upsample),
            )
            assert_written_within(out)
        return {"y": images_of(outputs[0]), "table": outputs[1], "x": images_of(outputs[2])}

    def by_reference(self, exact: bool = False, means: bool = True) -> dict[str, Tensor]:
        def wide(t: Tensor) -> Tensor:
            return t.double() if exact else t

        call = (wide(self.x), *map(wide, self.stats), wide(self.table), self.pixel_row)
        given = [wide(t) for t in self.means] if means else [None, None]
        grad = wide(self.grad)
        return {
            "y": reference.modulate(*call, None, *self.groups, *self.how, "none"),
            "table": reference.modulate_table_grad(grad, *call, *self.groups, *self.how),
            "x": reference.modulate_input_grad(grad, *call, *given, *self.how),
        }

    def check(self, **how) -> None:
        means = how.get("means", True)
        stock, exact = self.by_reference(means=means), self.by_reference(exact=True, means=means)
        assert_within_budget(self.run(**how), stock, exact)


def uneven_rows(count: int, num_rows: int, share: float = 0.6) -> Tensor:
    """(count,) rows of pixels: one row has most, many have one, some and the last few have none."""
    rows = torch.randint(num_rows - num_rows // 4, (count,))
    return torch.where(torch.rand(count) < share, num_rows // 3, rows)


TABLES = [(dtype, table) for dtype in DTYPES for table in dict.fromkeys((dtype, accumulator(dtype)))]


@pytest.mark.parametrize("upsample", [1, 2])
@pytest.mark.parametrize("channels", [8, 40, 3, 300])
@pytest.mark.parametrize(("dtype", "table_dtype"), TABLES)
def test_modulate(pixels_library, dtype, table_dtype, channels, upsample):
    shape = (2, channels, 9, 7)
    count = 2 * 9 * 7 * upsample**2
    call = (pixels_library, shape, dtype, table_dtype)
    Modulation(*call, uneven_rows(count, 50), 50, upsample=upsample).check()
    Modulation(*call, upsample=upsample, negative_slope=1.0, one=True).check(means=False)


@pytest.mark.parametrize("order", ["forwards", "backwards"])
@pytest.mark.parametrize(
    ("count", "num_rows", "share"), [(70 * 70, 1, 0), (70 * 70, 9, 0.97), (61 * 37, 900, 0.3), (1, 4, 0)]
)
@pytest.mark.parametrize(
    ("dtype", "channels"), [(torch.float64, 4), (torch.float32, 4), (torch.bfloat16, 8), (torch.float32, 5)]
)
def test_rows_of_all_lengths(pixels_library, dtype, channels, count, num_rows, share, order):
    shape = (1, channels, 1, count)
    rows = uneven_rows(count, num_rows, share)
    Modulation(pixels_library, shape, dtype, accumulator(dtype), rows, num_rows).check(order=order)


def test_longest_pieces(pixels_library):
    """So many pixels and channels that a piece of the table's gradient is as long as it gets."""
    shape = (1, 257, 128, 130)
    rows = uneven_rows(128 * 130, 300, 0.9)
    Modulation(pixels_library, shape, torch.float32, torch.float32, rows, 300).check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_aligned(pixels_library, dtype):
    rows = uneven_rows(35, 6)
    call = Modulation(pixels_library, (1, 16, 5, 7), dtype, accumulator(dtype), rows, 6)
    aligned = call.run()
    for name, value in call.run(skew=1).items():
        torch.testing.assert_close(value, aligned[name], rtol=4 * torch.finfo(value.dtype).eps, atol=1e-5)


def test_nan_stays_where_it_is(pixels_library):
    call = Modulation(pixels_library, (1, 8, 4, 4), torch.float32, torch.float32, torch.arange(16) % 5, 5)
    call.x[0, 3, 2, 1] = float("nan")
    got, expected = call.run(), call.by_reference()
    for name, value in got.items():
        assert torch.equal(value.isnan(), expected[name].isnan()), name
