"""LabelMap: a segmentation mask as integers, with the window indexes that all SPADE layers share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils import _pytree
from torch.utils.data._utils.collate import default_collate_fn_map

from spade_kernels import ops, transforms
from spade_kernels.cache import Cache
from spade_kernels.packing import Packable, Slot, pack, unpack
from spade_kernels.windows import WindowIndex, WindowKey, Windows, build_segments

# This limit keeps codes, also those with edges, below 2^32, the limit of window indexes.
_MOST_LABELS = 2**30


class LabelMap(Packable):
    """A batch of label maps, the form in which the networks take a segmentation mask.

    It replaces the one-hot tensor: the condition vector of a pixel is the row of `codebook` with the number of its
    code. Window indexes move with the label map to another device or process; slices and the result of `cat` have none
    at first.

    Args:
        labels: (N, H, W) integer tensor of class ids.
        num_labels: number of classes; the condition has `num_labels` channels, one more with `edges`.
        edges: optional (N, H, W) boolean tensor, the instance boundary plane (`instance_edges`).
        ignore_index: optional label value for "no class": its condition vector is zero, except for the edge.

    Attributes:
        codes: (N, H, W) int64, the code of each pixel, which is its row of the codebook.
        cache: the windows built so far, by `WindowKey`, and the pooled label map.

    Raises:
        TypeError: labels, num_labels or ignore_index are not integers, or edges are not boolean.
        ValueError: wrong rank or shape, an empty batch, labels without memory or on the meta device, labels that
            torch.func.vmap maps over, num_labels outside 1 .. 2^30, edges on another device, or a label outside
            0 .. num_labels - 1 (the message names the value and the pixel).
    """

    def __init__(
        self,
        labels: torch.Tensor,
        num_labels: int,
        edges: torch.Tensor | None = None,
        ignore_index: int | None = None,
    ):
        num_labels = _integer("num_labels", num_labels)
        ignore_index = None if ignore_index is None else _integer("ignore_index", ignore_index)
        labels, edges = transforms.constant(labels), None if edges is None else transforms.constant(edges)
        with transforms.outside():
            classes = _checked_classes(labels, num_labels, ignore_index)
            if edges is not None:
                _check_edges(edges, labels)
            states = 1 if edges is None else 2
            codes = classes * states + 1
            if edges is not None:
                codes = codes + edges
        self.labels, self.num_labels, self.edges, self.ignore_index = labels, num_labels, edges, ignore_index
        self.codes = codes
        self._pooled_codebook: torch.Tensor | None = None
        self.cache = Cache()

    @property
    def channels(self) -> int:
        """Channels of the condition: num_labels, plus one with edges."""
        return self.num_labels + (self.edges is not None)

    @property
    def is_pooled(self) -> bool:
        """True if the label map has a codebook of its own: of averages (`avg_pool`), or of noise before the labels."""
        return self._pooled_codebook is not None

    @property
    def num_codes(self) -> int:
        """Number of codebook rows: code 0 (outside the image), then every (label, edge) pair, "no class" included."""
        if self._pooled_codebook is not None:
            return self._pooled_codebook.shape[0]
        return (self.num_labels + 1) * (1 if self.edges is None else 2) + 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, H, W)."""
        return tuple(self.codes.shape)  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def __len__(self) -> int:
        return self.codes.shape[0]

    def __repr__(self) -> str:
        edges = ", edges" if self.edges is not None else ""
        return f"LabelMap({tuple(self.codes.shape)}, num_labels={self.num_labels}{edges}, device={self.device})"

    def codebook(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """(num_codes, channels): the condition vector of every code; row 0, outside the image, is zero."""
        if self._pooled_codebook is not None:
            return self._pooled_codebook.to(dtype)
        classes = torch.eye(self.num_labels + 1, self.num_labels, dtype=dtype, device=self.device)
        if self.edges is not None:
            off = F.pad(classes, (0, 1))
            on = F.pad(classes, (0, 1), value=1.0)
            classes = torch.stack((off, on), 1).flatten(0, 1)
        return F.pad(classes, (0, 0, 1, 0))

    def codebook_matmul(self, rows: torch.Tensor) -> torch.Tensor:
        """The product codebook @ rows, (num_codes, D), for float rows (channels, D). Differentiable in `rows`.

        Raises:
            ValueError: rows have another shape or are not float.
        """
        if rows.dim() != 2 or rows.shape[0] != self.channels or not rows.is_floating_point():
            raise ValueError(
                f"rows must be a float tensor ({self.channels}, D), one row for each condition channel, got "
                f"{rows.dtype} of shape {tuple(rows.shape)}"
            )
        if self._pooled_codebook is not None:
            return self.codebook(rows.dtype) @ rows
        if rows.is_cuda and not torch.compiler.is_compiling() and not _products_are_coarser(rows.dtype):
            # A matrix product is one launch, and one in the backward. The code below takes a dozen unless it is
            # compiled.
            with torch.autocast("cuda", enabled=False):
                return _cached_codebook(self, rows.dtype) @ rows
        # A product with a one-hot codebook copies the row of the class and, where there is an edge, adds the row of the
        # edge.
        classes = F.pad(rows[: self.num_labels], (0, 0, 0, 1))
        if self.edges is not None:
            classes = torch.stack((classes, classes + rows[-1]), 1).flatten(0, 1)
        return F.pad(classes, (0, 0, 1, 0))

    def one_hot(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """(N, channels, H, W): the dense condition, one plane per class and the edge plane last."""
        return F.embedding(self.codes, self.codebook(dtype)).permute(0, 3, 1, 2)

    def windows(self, size: Sequence[int], kernel_size: int, stride: int, padding: int) -> Windows:
        """Distinct windows of codes after a nearest resize to `size` = (h, w). They are built once and cached.

        Raises:
            TypeError: an argument is not an integer, or size not a pair.
            ValueError: no window fits, an argument is negative, stride is 0, or the windows would not fit into memory.
        """
        size = as_size(size)
        self._check_windows(size, kernel_size, stride, padding, levels=1)
        key = WindowKey("codes", *size, kernel_size, stride, padding)
        return self.cache.get(key, lambda: Windows.of(self.codes, self.num_codes, key.size, *key[3:]), self.codes)

    def window_index(self, size: Sequence[int], kernel_size: int) -> WindowIndex:
        """The window index at `size` = (h, w) for a SPADE layer with odd kernel_size. It is built once and cached.

        Raises:
            TypeError: an argument is not an integer, or size not a pair.
            ValueError: kernel_size is even or not positive, or the size is not positive or too large.
        """
        key, kernel_size = as_size(size), _integer("kernel_size", kernel_size)
        self._index([key], kernel_size)
        return WindowIndex(*(self.cache[name] for name in _index_keys(key, kernel_size)))

    def prepare(self, sizes: Iterable[Sequence[int]], kernel_size: int = 3, gradients: bool = True) -> LabelMap:
        """Builds the window indexes of SPADE layers with kernel_size at each of the `sizes` (h, w), ahead of their use.

        All are built together, so that the host waits only once for a GPU to count rows. If a data-loader worker calls
        this, the training process has nothing to build. With `gradients=False`, the segments are left out, which only
        the backward needs.

        Returns the label map itself.
        """
        wanted, kernel_size = [as_size(size) for size in sizes], _integer("kernel_size", kernel_size)
        self._index(wanted, kernel_size)
        if gradients:
            indexes = [windows for size in wanted for windows in self.window_index(size, kernel_size)]
            # Pixels of hidden windows are needed where `condition.conv2d` is used: on the dense path, and in a
            # network's first convolution.
            build_segments(indexes, indexes)
        return self

    def _index(self, sizes: Iterable[tuple[int, int]], kernel_size: int) -> None:
        """Builds the missing window indexes."""
        missing = [size for size in dict.fromkeys(sizes) if _index_keys(size, kernel_size)[1] not in self.cache]
        if not missing:
            return
        for size in missing:
            self._check_windows(size, kernel_size, 1, kernel_size // 2, levels=2)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        with torch.inference_mode(False), transforms.outside():
            found = WindowIndex.of(self.codes, self.num_codes, missing, kernel_size)
        for size, index in zip(missing, found, strict=True):
            for key, windows in zip(_index_keys(size, kernel_size), index, strict=True):
                if key not in self.cache:
                    self.cache[key] = windows

    def _check_windows(
        self, size: tuple[int, int], kernel_size: int, stride: int, padding: int, *, levels: int
    ) -> None:
        for name, value in (("kernel_size", kernel_size), ("stride", stride), ("padding", padding)):
            _integer(name, value)
        reason = ops.why_no_windows(self.shape, size, kernel_size, stride, padding, levels)
        if reason is not None:
            raise ValueError(reason)

    def avg_pool(self) -> LabelMap:
        """The condition after `avg_pool2d(3, stride=2, padding=1, count_include_pad=False)`, as a label map.

        Each distinct 3x3 window becomes a code whose codebook row is the mean of its condition vectors, so that the
        discriminator's coarser scales need no one-hot planes either.
        """
        return self.cache.get("pooled", self._pool, self.codes)

    def _pool(self) -> LabelMap:
        seen = self.windows(self.shape[1:], 3, 2, 1)
        inside = (seen.windows > 0).sum(1, keepdim=True)
        codebook = F.embedding_bag(seen.windows, self.codebook(torch.float64), mode="sum") / inside
        return self._with_codes(seen.pixel_row + 1, F.pad(codebook, (0, 0, 1, 0)))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> LabelMap:
        """Returns the label map on `device`: itself if it is there already, else a copy, made in one transfer."""
        # "cuda" without an index is the current CUDA device.
        device = torch.empty(0, device=device).device
        if device == self.device:
            return self
        buffer, layout = pack(self, pinned=non_blocking and self.codes.is_pinned())
        assert buffer is not None
        return unpack(buffer.to(device, non_blocking=non_blocking), layout)

    def pin_memory(self) -> LabelMap:
        """A copy in page-locked memory."""
        return unpack(*pack(self, pinned=True))

    def __getitem__(self, images: slice) -> LabelMap:
        """A label map of some of the images, given by a slice: `[3:4]`, not `[3]`, because the result is a batch."""
        if not isinstance(images, slice):
            raise TypeError(f"a LabelMap takes a slice of images, such as [3:4], got [{images!r}]")
        if not range(len(self))[images]:
            raise ValueError(f"{images} holds none of the {len(self)} images")
        part = self._with_codes(self.codes[images], self._pooled_codebook)
        part.labels, part.edges = self.labels[images], None if self.edges is None else self.edges[images]
        return part

    @staticmethod
    def cat(maps: Sequence[LabelMap]) -> LabelMap:
        """Joins label maps into one batch.

        They must have the same size and classes, and all or none of them edges. Use `avg_pool` on the result, not on
        the parts.
        """
        if len({(m.shape[1:], m.num_labels, m.edges is None, id(m._pooled_codebook)) for m in maps}) != 1:
            raise ValueError(
                "label maps of different size, classes or codebook cannot form one batch: " + repr(list(maps))
            )
        first = maps[0]
        edges = None if first.edges is None else torch.cat([m.edges for m in maps if m.edges is not None])
        whole = first._with_codes(torch.cat([m.codes for m in maps]), first._pooled_codebook)
        whole.labels, whole.edges = torch.cat([m.labels for m in maps]), edges
        return whole

    @classmethod
    def from_one_hot(cls, planes: torch.Tensor, edges: bool = True) -> LabelMap:
        """Converts a one-hot tensor to a label map.

        Args:
            planes: (N, C, H, W), 0 or 1. At each pixel one class plane is 1, or none, for "no class".
            edges: True if the last plane is the instance boundary.

        Raises:
            ValueError: a pixel is not one-hot; the message names it.
        """
        ops.require_storage("planes", planes)
        if planes.dim() != 4 or planes.shape[1] < 1 + edges:
            raise ValueError(f"expected one-hot planes (N, C, H, W), got shape {tuple(planes.shape)}")
        read = read_one_hot(planes if planes.is_floating_point() else planes.float(), edges)
        if read is None:
            binary = ((planes == 0) | (planes == 1)).all(1)
            two_classes = planes[:, : planes.shape[1] - edges].sum(1) > 1
            n, y, x = (~binary | two_classes).nonzero()[0].tolist()
            raise ValueError(
                f"the condition is not one-hot at image {n}, pixel (x={x}, y={y}); pass it as a dense tensor"
            )
        return read

    def equals(self, other: LabelMap) -> bool:
        """True if the other label map has the same condition vector at every pixel. On a GPU it is waited for."""
        if (self.shape, self.channels, self.device, self.is_pooled) != (
            other.shape,
            other.channels,
            other.device,
            other.is_pooled,
        ):
            return False
        if self.is_pooled:
            return torch.equal(self.codes, other.codes) and torch.equal(self.codebook(), other.codebook())
        return (self.edges is None) == (other.edges is None) and torch.equal(self.codes, other.codes)

    def _with_codes(self, codes: torch.Tensor, codebook: torch.Tensor | None) -> LabelMap:
        other = object.__new__(LabelMap)
        # Attributes are set one by one, because torch 2.11 cannot compile an update of __dict__.
        other.labels, other.num_labels, other.edges = self.labels, self.num_labels, self.edges
        other.codes, other._pooled_codebook = transforms.constant(codes), codebook
        other.ignore_index, other.cache = self.ignore_index, Cache()
        return other


def read_one_hot(planes: torch.Tensor, edges: bool) -> LabelMap | None:
    """`LabelMap.from_one_hot` for float planes of the right shape; None if a pixel is not one-hot."""
    classes = planes[:, :-1] if edges else planes
    num_labels = classes.shape[1]
    if num_labels > 2 / torch.finfo(classes.dtype).eps:
        classes = classes.float()  # The dtype cannot represent all class numbers exactly.
    # One pass over the planes sums up, for each pixel, the numbers of its classes, counted from 1.
    numbers = torch.arange(1, num_labels + 1, dtype=classes.dtype, device=planes.device)
    with torch.autocast(planes.device.type, enabled=False):
        labels = (numbers @ classes.flatten(2)).view(-1, *planes.shape[2:]).long() - 1
    labels = labels.masked_fill((labels < 0) | (labels >= num_labels), num_labels)
    label_map = LabelMap(labels, num_labels, planes[:, -1] != 0 if edges else None, ignore_index=num_labels)
    return label_map if is_one_hot_of(planes, label_map) else None


def read_constant_and_one_hot(planes: torch.Tensor) -> LabelMap | None:
    """The label map of planes (N, C, H, W) whose first ones are constant in each image and whose others are one-hot.

    OASIS puts a noise vector of each image before the one-hot planes. A code of the label map stands for an image and a
    label, so the codebook has a row for each pair. None if the planes are not of this kind.
    """
    constant = (planes == planes[:, :, :1, :1]).flatten(2).all(2).all(0)
    count = int(constant.long().cumprod(0).sum())
    if count in (0, planes.shape[1]):
        return None
    labels = read_one_hot(planes[:, count:], edges=planes.shape[1] > count + 1)
    if labels is None:
        return None
    vectors = labels.codebook(torch.float64)[1:]
    images, states = planes.shape[0], vectors.shape[0]
    first = torch.arange(images, device=planes.device).view(-1, 1, 1) * states
    noise = planes[:, :count, 0, 0].to(vectors.dtype).repeat_interleave(states, 0)
    codebook = torch.cat((noise, vectors.repeat(images, 1)), 1)
    label_map = labels._with_codes(labels.codes + first, F.pad(codebook, (0, 0, 1, 0)))
    label_map.edges = None
    label_map.num_labels = planes.shape[1]
    return label_map


def is_one_hot_of(planes: torch.Tensor, label_map: LabelMap) -> bool:
    """True if the planes equal `label_map.one_hot()`."""
    labels, num_labels = label_map.labels, label_map.num_labels
    has_class = labels < num_labels
    ones = planes.gather(1, labels.clamp(max=num_labels - 1).unsqueeze(1)).squeeze(1)[has_class]
    count, same = has_class.sum(), (ones == 1).all()
    if label_map.edges is not None:
        count, same = count + label_map.edges.sum(), same & (planes[:, -1] == label_map.edges).all()
    return bool(same & (planes.count_nonzero() == count))


def instance_edges(instances: torch.Tensor) -> torch.Tensor:
    """Instance boundaries: pixels whose id differs from one of their four neighbours (SPADE's extra condition plane).

    Args:
        instances: (N, H, W) or (H, W) integer instance ids.

    Returns:
        Boolean tensor of the same shape.
    """
    edges = torch.zeros_like(instances, dtype=torch.bool)
    across = instances[..., :, 1:] != instances[..., :, :-1]
    down = instances[..., 1:, :] != instances[..., :-1, :]
    edges[..., :, 1:] |= across
    edges[..., :, :-1] |= across
    edges[..., 1:, :] |= down
    edges[..., :-1, :] |= down
    return edges


def _products_are_coarser(dtype: torch.dtype) -> bool:
    """True if PyTorch uses tf32 for float32 matrix products on a GPU, but not for convolutions."""
    cuda = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return dtype == torch.float32 and [setting.fp32_precision == "tf32" for setting in cuda] == [True, False]


_codebooks = Cache(shared=True)


def _cached_codebook(label_map: LabelMap, dtype: torch.dtype) -> torch.Tensor:
    """The codebook of a label map, shared by all label maps with the same classes, edges and device."""
    kind = (label_map.num_labels, label_map.edges is not None, dtype, label_map.device)
    return _codebooks.get(kind, lambda: label_map.codebook(dtype), label_map.codes)


def _index_keys(size: tuple[int, ...], kernel_size: int) -> tuple[WindowKey, WindowKey]:
    """The cache keys of the hidden and the modulation windows of a window index."""
    height, width = size
    part = (height, width, kernel_size, 1, kernel_size // 2)
    return WindowKey("codes", *part), WindowKey("hidden rows", *part)


def _integer(name: str, value: Any) -> int:
    """Converts `value` to an int; raises TypeError if it is not an integer, such as 5.0."""
    if type(value) is int:
        return value
    if isinstance(value, torch.SymInt):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, Integral):
        got = f"a {type(value).__name__}" if isinstance(value, torch.Tensor) else repr(value)
        raise TypeError(f"{name} must be an integer, got {got}")
    return int(value)


def as_size(size: Sequence[int]) -> tuple[int, int]:
    """Converts `size` to (h, w); raises TypeError if it is not a pair of integers."""
    if len(size) != 2:
        raise TypeError(f"size must be a pair (h, w), got {size!r}")
    return _integer("height", size[0]), _integer("width", size[1])


def _is_integer(t: torch.Tensor) -> bool:
    return not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool)


def _checked_classes(labels: torch.Tensor, num_labels: int, ignore_index: int | None) -> torch.Tensor:
    """The classes after all checks: (N, H, W) int64 in 0 .. num_labels, where num_labels is "no class"."""
    if not isinstance(labels, torch.Tensor) or not _is_integer(labels):
        kind = labels.dtype if isinstance(labels, torch.Tensor) else type(labels).__name__
        raise TypeError(f"labels must be an integer tensor, got {kind}; for one-hot planes use LabelMap.from_one_hot")
    if labels.dim() != 3:
        hint = "; for one-hot planes use LabelMap.from_one_hot" if labels.dim() == 4 else ""
        raise ValueError(f"labels must have shape (N, H, W), got {tuple(labels.shape)}{hint}")
    if labels.numel() == 0:
        raise ValueError(f"the label map is empty: shape {tuple(labels.shape)}")
    ops.require_storage("labels", labels)
    if num_labels < 1:
        raise ValueError(f"num_labels must be at least 1, got {num_labels}")
    if num_labels > _MOST_LABELS:
        raise ValueError(f"num_labels must be at most {_MOST_LABELS}, got {num_labels}")
    if labels.is_meta:
        raise ValueError("labels on the meta device have no values to check; give a network planes (N, C, H, W) there")
    # A narrow dtype would wrap num_labels and ignore_index to its own range.
    classes = labels.to(torch.int64)
    ignored = None if ignore_index is None else classes == ignore_index
    seen = classes if ignored is None else classes.masked_fill(ignored, 0)
    # On a GPU this is the only host synchronization.
    least, most = torch.stack(torch.aminmax(seen)).tolist()
    if least < 0 or most >= num_labels:
        bad = ((seen < 0) | (seen >= num_labels)).nonzero()
        n, y, x = bad[0].tolist()
        raise ValueError(
            f"label {classes[n, y, x].item()} at image {n}, pixel (x={x}, y={y}) is outside 0..{num_labels - 1} "
            f"({len(bad)} such pixels); raise num_labels, or name the value with ignore_index"
        )
    return classes if ignored is None else classes.masked_fill(ignored, num_labels)


def _check_edges(edges: torch.Tensor, labels: torch.Tensor) -> None:
    if edges.dtype != torch.bool:
        raise TypeError(f"edges must be a boolean tensor, got {edges.dtype}; see instance_edges")
    if edges.shape != labels.shape:
        raise ValueError(f"edges have shape {tuple(edges.shape)}, labels {tuple(labels.shape)}; they must be the same")
    if edges.device != labels.device:
        raise ValueError(f"edges are on {edges.device}, labels on {labels.device}; move both to one device")


def _collate(label_maps: Sequence[LabelMap], *, collate_fn_map: Any = None) -> LabelMap:
    return LabelMap.cat(label_maps)


# With this function, a DataLoader without a `collate_fn` joins the label maps of its samples into one.
default_collate_fn_map[LabelMap] = _collate

_PARTS = ("codes", "labels", "edges", "_pooled_codebook")


def _flatten(label_map: LabelMap) -> tuple[list[Any], tuple[int, int | None]]:
    return [getattr(label_map, name) for name in _PARTS], (label_map.num_labels, label_map.ignore_index)


def _flatten_with_keys(label_map: LabelMap) -> tuple[list[Any], tuple[int, int | None]]:
    parts, context = _flatten(label_map)
    return list(zip(map(_pytree.GetAttrKey, _PARTS), parts, strict=True)), context


def _unflatten(parts: Iterable[Any], context: tuple[int, int | None]) -> LabelMap:
    label_map = object.__new__(LabelMap)
    for name, part in zip(_PARTS, parts, strict=True):
        setattr(label_map, name, part)
    label_map.num_labels, label_map.ignore_index = context
    label_map.cache = Cache()
    return label_map


# This lets torch.load, which torch.export.load calls, load label maps as it loads tensors.
torch.serialization.add_safe_globals([Cache, LabelMap, Slot, WindowKey, Windows])
# This lets programs of torch.export take label maps. The cache is not part of the tree: a program would otherwise
# accept only label maps that have built the same window indexes as its example.
_pytree.register_pytree_node(
    LabelMap,
    _flatten,
    _unflatten,
    flatten_with_keys_fn=_flatten_with_keys,
    serialized_type_name="spade_kernels.LabelMap",
    to_dumpable_context=list,
    from_dumpable_context=tuple,
)
