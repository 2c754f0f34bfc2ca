"""`BlockMask`: which keys each query of each head sees, as a kernel visits them.

    prompt order                      packed order
    T  #                              T  #
    a  # #          (INTRA_IMAGE)     T  # #
    a  # # #                          T  # # #
    T  # # # #                        a  #     | #
    b  #     # #                      a  #     | # #
    b  #     # # #                    b  # #   |     #
    T  # # # # # # #                  b  # #   |     # #

In packed order the keys of an image query are a text prefix and its own image: two ranges, cut into
blocks. See `bsjax.masks.schedule` for the format and `bsjax.masks.categories` for who sees whom.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Bool, Int

from bsjax.errors import MaskError
from bsjax.masks.categories import HeadCategory
from bsjax.masks.schedule import Schedule, Tile, build_schedule, category_tables, visible_pairs
from bsjax.masks.template import Template
from bsjax.masks.visibility import TokenInfo, Visibility, visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@jax.tree_util.register_pytree_node_class
class BlockMask:
    """The block mask of one prompt and one layer's heads. Built on the host; a pytree.

    As an argument of a jitted function it carries its arrays only: what describes the prompt
    (`template`, `flops`, `density`, `to_dense`, `plot`) is for use outside.

    Args:
      template: the prompt.
      categories: one `HeadCategory`, or its name, per query head.
      block_q: query rows of a tile. A power of two for the `pallas` backend, anything otherwise.
      block_kv: keys of a block. A power of two for the `pallas` backend, anything otherwise.
      bidirectional_images: whether an image's tokens all see each other (Gemma 3).
      window: how many positions back a query sees, itself included; None for all.

    Attributes:
      schedule: tiles and ranges, see `bsjax.masks.schedule.Schedule`.
      head_category: int32 [q_heads].
      order: int32 [tokens], the prompt index of each row of the schedule.
      row: int32 [tokens], the schedule's row of each prompt token.

    Raises:
      MaskError: no head, an unknown category, a block size or window below 1.
    """

    schedule: Schedule
    head_category: Any
    order: Any
    row: Any

    def __init__(
        self,
        template: Template,
        categories: Sequence[HeadCategory | int | str] | Int[np.ndarray, "q_heads"],
        block_q: int = 128,
        block_kv: int = 64,
        bidirectional_images: bool = False,
        window: int | None = None,
    ) -> None:
        if not len(categories):
            raise MaskError("A block mask needs the category of at least one query head.")
        try:
            self._categories = tuple(HeadCategory.parse(category) for category in categories)
        except ValueError as error:
            raise MaskError(str(error)) from None
        self._template = template
        self.schedule = build_schedule(
            template,
            category_tables(self._categories),
            block_q=block_q,
            block_kv=block_kv,
            visibility=Visibility(bidirectional_images, window),
        )
        self.head_category = np.asarray(self._categories, np.int32)
        self.order = self.schedule.position
        self.row = np.argsort(self.order).astype(np.int32)

    def tree_flatten(self) -> tuple[tuple[Any, ...], None]:
        """For JAX: the arrays are the leaves, nothing else travels."""
        return (self.schedule, self.head_category, self.order, self.row), None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple[Any, ...]) -> "BlockMask":
        """For JAX: a mask that can be attended with, but not asked about its prompt."""
        mask = object.__new__(cls)
        mask.schedule, mask.head_category, mask.order, mask.row = children
        return mask

    @property
    def template(self) -> Template:
        """The prompt this mask was built for.

        Raises:
          MaskError: inside a jitted function, where only the arrays are there.
        """
        if "_template" not in self.__dict__:
            raise _outside_only("template")
        return self._template

    @property
    def categories(self) -> tuple[HeadCategory, ...]:
        """The category of each query head. As `template`, only outside of jitted functions."""
        if "_categories" not in self.__dict__:
            raise _outside_only("categories")
        return self._categories

    @cached_property
    def visible_pairs(self) -> Int[np.ndarray, "q_heads"]:
        """int64: (query, key) pairs that each head sees, exactly."""
        pairs = {category: self._pairs(category) for category in set(self.categories)}
        return np.asarray([pairs[category] for category in self.categories], np.int64)

    @cached_property
    def dense_pairs(self) -> int:
        """Pairs that a DENSE head sees under the same base visibility."""
        return self._pairs(HeadCategory.DENSE)

    @property
    def flops_per_head(self) -> Int[np.ndarray, "q_heads"]:
        """int64: attention FLOPs of each head for one channel of head_dim; see `flops`."""
        return 4 * self.visible_pairs

    @property
    def flops(self) -> int:
        """Attention FLOPs of all heads per channel of head_dim: times head_dim, the whole count.

        Four for each visible pair: a multiplication and an addition, in the scores and in the
        output.
        """
        return int(self.flops_per_head.sum())

    @property
    def flops_per_category(self) -> dict[HeadCategory, int]:
        """`flops`, apart for the heads of each category that occurs."""
        return {
            category: int(self.flops_per_head[self.head_category == category].sum())
            for category in sorted(set(self.categories))
        }

    @property
    def density_per_head(self) -> np.ndarray:
        """float64 [q_heads]: visible pairs of each head over those of a DENSE one."""
        return self.visible_pairs / max(self.dense_pairs, 1)

    @property
    def density(self) -> float:
        """Visible pairs of all heads over those they would see if all were DENSE."""
        return float(self.density_per_head.mean())

    def to_dense(self, head: int) -> Bool[np.ndarray, "tokens tokens"]:
        """What the schedule covers for one head, expanded, in prompt order: for tests and pictures.

        Full blocks count whole, partial ones as far as the predicate says. Takes tokens squared
        bytes.

        Raises:
          MaskError: there is no such head, or the schedule covers a pair twice.
        """
        if not 0 <= head < len(self.categories):
            raise MaskError(f"There is no head {head}: the mask has {len(self.categories)}.")
        tokens, schedule, table = self.template.tokens, self.schedule, int(self.head_category[head])
        covered = np.zeros((tokens, tokens), np.uint8)
        for tile in map(Tile._make, schedule.tile_columns[table].tolist()):
            rows = slice(tile.first_row, tile.first_row + tile.rows)
            query = TokenInfo(*(part[rows, None] for part in schedule.info))
            index, blocks_left = tile.first_range, tile.blocks if tile.rows else 0
            while blocks_left > 0:
                start, end = schedule.range_columns[table, index]
                if blocks_left > tile.partial_blocks:
                    covered[rows, start:end] += 1
                else:
                    covered[rows, start:end] += visible(
                        query,
                        TokenInfo(*(part[None, start:end] for part in schedule.info)),
                        int(schedule.groups[table]),
                        schedule.visibility,
                    )
                blocks_left -= -(-(end - start) // schedule.block_kv)
                index += 1
        if covered.max(initial=0) > 1:
            raise MaskError("The schedule covers a pair twice; this is a defect of bsjax.")
        return covered.astype(bool)[np.ix_(self.row, self.row)]

    def plot(self, path: str | Path | None = None, head: int = 0) -> "Figure":
        """Draws one head's mask in prompt order and in packed order, images marked.

        Args:
          path: where to write the picture (PNG, PDF, SVG by its suffix); None writes nothing.
          head: which query head.

        Returns:
          The matplotlib figure.

        Raises:
          MaskError: there is no such head, matplotlib is not installed, or the file cannot be
            written.
        """
        from bsjax.masks.picture import plot_mask

        return plot_mask(self, path, head)

    def _pairs(self, category: HeadCategory) -> int:
        return visible_pairs(
            self.template,
            category.groups,
            self.schedule.visibility,
        )

    def __repr__(self) -> str:
        if "_template" not in self.__dict__:
            return f"BlockMask(tokens={self.schedule.tokens}, heads={self.head_category.shape[0]})"
        counts = {
            category.name: self.categories.count(category)
            for category in sorted(set(self.categories))
        }
        return (
            f"BlockMask({self.template}, heads={counts}, block_q={self.schedule.block_q}, "
            f"block_kv={self.schedule.block_kv}, density={self.density:.3f})"
        )


def _outside_only(name: str) -> MaskError:
    return MaskError(
        f"Inside a jitted function a block mask carries only its arrays; ask for {name}, flops, "
        "density, to_dense or plot outside."
    )
