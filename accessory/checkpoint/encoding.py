"""How a box of a logical tensor lies in a stored one: one description for both reading and writing."""

import re
from math import prod

from torch import Tensor

from accessory.model.logical import Region, Shape


class Encoding:
    """A pattern from a box's dimensions to the stored ones, in einops' notation. The box is a view of the stored tensor:

        e f d -> (e f) d     experts one above the other: row e * F + f
        e f d -> (e d) f     each transposed
        e ... -> ...         one expert by itself: [1, F, D] as [F, D], a bias [1, F] as [F]

    Args:
        pattern: an axis that is only on the left has size 1.
        sizes: of axes whose size does not follow from the box. An axis that is only on the right is given as (which, of how
            many): the box is that slot of a larger tensor. ``e f d -> e (s f) d`` with s = (1, 2) is w3 in [E, 2 * F, D],
            where w1 is above w3.
    """

    def __init__(self, pattern: str, **sizes: int | tuple[int, int]):
        self._box, self._stored = (
            [(several or one).split() for several, one in re.findall(r"\((.+?)\)|(\S+)", side)]
            for side in pattern.split("->")
        )
        axes = [axis for group in self._stored for axis in group]
        # whether the stored values are in the order of the box's
        self.keeps_order = axes == [axis for group in self._box for axis in group if axis in axes]
        self._slots = {axis: given[0] for axis, given in sizes.items() if isinstance(given, tuple)}
        self._sizes = {axis: given[1] if isinstance(given, tuple) else given for axis, given in sizes.items()}

    def stored_shape(self, box: Shape) -> Shape:
        """The shape of the stored tensor that holds a box of shape ``box``."""
        _, stored_axes, sizes = self._axes(box)
        return tuple(prod(sizes[axis] for axis in group) for group in stored_axes)

    def read(self, stored: Tensor, box: Shape, inside: Region) -> Tensor:
        """The part ``inside`` of the box: a view, or a copy of that part if its rows must be reordered."""
        box_axes, _, sizes = self._axes(box)
        coarse: list[slice] = []  # of each dimension's slowest axis, the steps that cover the part
        shape: list[int] = []
        fine: list[slice] = []  # the part within them
        for group, part in zip(box_axes, inside, strict=True):
            step = prod(sizes[axis] for axis in group[1:])
            first, last = part.start // step, -(-part.stop // step)
            coarse += [slice(first, last), *[slice(None)] * (len(group) - 1)]
            shape.append((last - first) * step)
            fine.append(slice(part.start - first * step, part.stop - first * step))
        return self._view(stored, box)[tuple(coarse)].reshape(shape)[tuple(fine)]

    def write(self, box: Tensor, stored: Tensor) -> None:
        """Put a box into ``stored``, rounded to its precision; values beside the box do not change."""
        view = self._view(stored, tuple(box.shape))
        view.copy_(box.reshape(view.shape))

    def _view(self, stored: Tensor, box: Shape) -> Tensor:
        """The box where it lies in ``stored``, each of its axes a dimension."""
        box_axes, stored_axes, sizes = self._axes(box)
        strides: dict[str, int] = {}
        for group, stride in zip(stored_axes, stored.stride(), strict=True):
            for axis in reversed(group):
                strides[axis], stride = stride, stride * sizes[axis]
        begin = sum(index * strides[axis] for axis, index in self._slots.items())
        axes = [axis for group in box_axes for axis in group]
        return stored.as_strided(
            [sizes[axis] for axis in axes], [strides.get(axis, 0) for axis in axes], stored.storage_offset() + begin
        )

    def _axes(self, box: Shape) -> tuple[list[list[str]], list[list[str]], dict[str, int]]:
        """The axes of each dimension of the box and of the stored tensor, and their sizes for a box of shape ``box``."""
        others = [[f"axis{n}"] for n in range(len(box) + 1 - len(self._box))]
        box_axes, stored_axes = (
            [axes for group in side for axes in (others if group == ["..."] else [group])]
            for side in (self._box, self._stored)
        )
        sizes = dict(self._sizes)
        for group, size in zip(box_axes, box, strict=True):
            known = prod(sizes.get(axis, 1) for axis in group)
            sizes |= {axis: size // known for axis in group if axis not in sizes}
        return box_axes, stored_axes, sizes


AS_IS = Encoding("... -> ...")
