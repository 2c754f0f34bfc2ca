"""`BlockMask`: which keys each query of each head sees, in the blocks that a kernel visits.

    prompt order                      packed order
    T  #                              T  #
    a  # #          (INTRA_IMAGE)     T  # #
    a  # # #                          T  # # #
    T  # # # #                        a  #     | #
    b  #     # #                      a  #     | # #
    b  #     # # #                    b  # #   |     #
    T  # # # # # # #                  b  # #   |     # #

In packed order the keys of an image query are two ranges, the text before it and its own image,
which are cut into blocks. See `bsjax.masks.visibility` for what a query sees and
`bsjax.masks.schedule` for the format.
"""

import copy
from collections.abc import Sequence
from functools import cached_property, partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Int

from bsjax.checks import shown, truth_value, whole_number
from bsjax.errors import MaskError
from bsjax.masks.categories import HeadCategory
from bsjax.masks.flops import FLOPS_PER_PAIR
from bsjax.masks.query_rows import visible_pairs
from bsjax.masks.rows import Rows, Span
from bsjax.masks.schedule import (
    Schedule,
    Tile,
    build_span_schedule,
    category_tables,
    uses_packed_order,
)
from bsjax.masks.template import Template
from bsjax.masks.transposed import with_transposed
from bsjax.masks.visibility import TokenInfo, Visibility, visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@jax.tree_util.register_pytree_node_class
class BlockMask:
    """The block mask of one prompt and the heads of one layer. Built on the host; a pytree.

    Queries are all tokens of the prompt, or some of them: those of a chunk of the prompt, or of the
    next turn of a conversation whose earlier keys and values are known. A mask of several prompts
    is a batch: no token sees a token of another prompt.

    Inside a jitted function a mask has only its arrays. Everything that describes the prompt
    (`template`, `categories`, `flops`, `density`, `to_dense`, `plot`) is available only outside.

    Args:
      template: the prompt, or a list of prompts that do not see each other.
      categories: one `HeadCategory`, or its name, per query head.
      block_q: query rows of a tile, at most. GPU kernels need a power of two.
      block_kv: keys of a block. GPU kernels need a power of two.
      bidirectional_images: whether all tokens of an image see each other (Gemma 3).
      window: how many positions back a query sees, its own included; None for all.
      queries: the positions of the queries, such as `range(2048, 4096)`; None for all tokens. For
        several prompts, a list of ranges, one for each.
      gradients: whether the mask also has what GPU kernels need to compute gradients. Without it,
        gradients are the same, but on a GPU plain JAX computes them, slowly.

    Attributes:
      schedule: tiles and ranges, see `bsjax.masks.schedule.Schedule`.
      head_category: int32 [q_heads].
      order: int32 [queries], the query in each row of the schedule. Queries and keys are counted in
        prompt order, prompt by prompt.
      row: int32 [queries], the row of each query.
      key_order: int32 [keys], the key in each row of the schedule.

    Raises:
      MaskError: `template` is neither a `Template` nor a list of one or more, `categories` is empty
        or names an unknown category, a block size or the window is below 1, `bidirectional_images`
        or `gradients` is not a boolean, or `queries` are not positions of the prompt.

    Example:
      The second half of a prompt, as queries against the keys and values of all of it:

      >>> template = bsjax.Template.from_segments([bsjax.Image(64), bsjax.Text(8)] * 4)
      >>> mask = bsjax.BlockMask(template, ["INTRA_IMAGE"] * 4, queries=range(144, 288))
      >>> q = jnp.ones((144, 4, 64))
      >>> k = v = jnp.ones((288, 2, 64))
      >>> bsjax.sparse_attention(q, k, v, mask).shape
      (144, 4, 64)
    """

    schedule: Schedule
    head_category: Any
    order: Any
    row: Any
    key_order: Any

    def __init__(
        self,
        template: Template | Sequence[Template],
        categories: Sequence[HeadCategory | int | str] | Int[np.ndarray, "q_heads"],
        block_q: int = 128,
        block_kv: int = 64,
        bidirectional_images: bool = False,
        window: int | None = None,
        queries: range | Sequence[range] | None = None,
        gradients: bool = False,
    ) -> None:
        templates = _checked_templates(template)
        spans = _checked_queries(queries, templates)
        is_list = isinstance(categories, Sequence | np.ndarray) and not isinstance(categories, str)
        if not is_list or getattr(categories, "ndim", 1) == 0:
            raise MaskError(
                "categories must be a list of one HeadCategory, or its name, per query head, got "
                f"{shown(categories)}."
            )
        if not len(categories):
            raise MaskError("A block mask needs the category of at least one query head.")
        try:
            self._categories = tuple(HeadCategory.parse(category) for category in categories)
        except ValueError as error:
            raise MaskError(str(error)) from None
        # The caller may change their list later.
        self._template = template if isinstance(template, Template) else templates
        self._query_spans = spans
        self._visibility = Visibility(bidirectional_images, window)
        self._gradients = truth_value("gradients", gradients, error=MaskError)
        self._build(block_q, block_kv)

    def _build(
        self, block_q: int, block_kv: int, queries: int | None = None, keys: int | None = None
    ) -> None:
        """Builds the arrays, padded to so many queries and keys."""
        templates = _checked_templates(self._template)
        tables = category_tables(self._categories)
        rows = partial(Rows, templates, packed=uses_packed_order(tables))
        query_rows = rows(self._query_spans)
        key_rows = rows([Span(0, each.tokens, index) for index, each in enumerate(templates)])
        self.schedule = build_span_schedule(
            query_rows,
            key_rows,
            tables,
            block_q=block_q,
            block_kv=block_kv,
            visibility=self._visibility,
            query_rows=queries,
            key_rows=keys,
        )
        if self._gradients:
            self.schedule = with_transposed(self.schedule)
        self.head_category = np.asarray(self._categories, np.int32)
        self.order = _in_prompt_order(query_rows, self.schedule.query_rows)
        self.row = np.argsort(self.order).astype(np.int32)
        self.key_order = _in_prompt_order(key_rows, self.schedule.key_rows)

    def tree_flatten(self) -> tuple[tuple[Any, ...], None]:
        """For JAX: only the arrays are part of the pytree."""
        return (self.schedule, self.head_category, self.order, self.row, self.key_order), None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple[Any, ...]) -> "BlockMask":
        """For JAX: rebuilds a mask from its arrays alone, which are all that attention needs."""
        mask = object.__new__(cls)
        mask.schedule, mask.head_category, mask.order, mask.row, mask.key_order = children
        return mask

    def padded(self, queries: int, keys: int) -> "BlockMask":
        """The mask for arrays with padding behind their tokens.

        Padding queries see nothing, so that their outputs are zeros. Padding keys and values must
        be finite.

        Args:
          queries: rows of q.
          keys: rows of k and v.

        Raises:
          MaskError: inside a jitted function, or there are more queries or keys.
        """
        if "_template" not in self.__dict__:
            raise _outside_only("padded")
        padded = copy.copy(self)
        BlockMask._build(padded, self.schedule.block_q, self.schedule.block_kv, queries, keys)
        return padded

    def specs(self, heads: str | tuple[str, ...]) -> "BlockMask":
        """How the mask is sharded where query heads are: for `jax.shard_map` or `jax.device_put`.

        Each device gets the categories of its own heads, and a full copy of everything else.

        Args:
          heads: the mesh axis, or axes, that the heads of q, k and v are sharded over.

        Returns:
          A pytree like this mask, of `jax.sharding.PartitionSpec`s.

        Example:
          >>> of_heads = jax.P(None, "tensor")
          >>> attend = jax.shard_map(
          ...     bsjax.sparse_attention,
          ...     in_specs=(of_heads, of_heads, of_heads, mask.specs("tensor")),
          ...     out_specs=of_heads,
          ... )
        """
        specs = jax.tree.map(lambda _: PartitionSpec(), self)
        specs.head_category = PartitionSpec(heads)
        return specs

    def with_schedule(self, schedule: Schedule) -> "BlockMask":
        """The arrays of this mask with another schedule of the same rows."""
        (_, *others), _ = self.tree_flatten()
        return self.tree_unflatten(None, (schedule, *others))

    @property
    def template(self) -> Template | Sequence[Template]:
        """The prompt, or the prompts, that this mask was built for.

        Raises:
          MaskError: inside a jitted function, where a mask has only its arrays.
        """
        if "_template" not in self.__dict__:
            raise _outside_only("template")
        return self._template

    @property
    def categories(self) -> tuple[HeadCategory, ...]:
        """The category of each query head.

        Raises:
          MaskError: inside a jitted function, where a mask has only its arrays.
        """
        if "_categories" not in self.__dict__:
            raise _outside_only("categories")
        return self._categories

    @cached_property
    def visible_pairs(self) -> Int[np.ndarray, "q_heads"]:
        """int64: the exact number of (query, key) pairs that each head sees."""
        pairs = {category: self._pairs(category) for category in set(self.categories)}
        return np.asarray([pairs[category] for category in self.categories], np.int64)

    @cached_property
    def dense_pairs(self) -> int:
        """How many pairs a DENSE head would see."""
        return self._pairs(HeadCategory.DENSE)

    @property
    def flops_per_head(self) -> Int[np.ndarray, "q_heads"]:
        """int64: attention FLOPs of each head for one channel of head_dim; see `flops`."""
        return FLOPS_PER_PAIR * self.visible_pairs

    @property
    def flops(self) -> int:
        """Attention FLOPs of all heads for one channel of head_dim; multiply by head_dim.

        Four per visible pair: a multiplication and an addition in the scores, and again in the
        output.
        """
        return int(self.flops_per_head.sum())

    @property
    def flops_per_category(self) -> dict[HeadCategory, int]:
        """`flops` of the heads of each category that occurs."""
        return {
            category: int(self.flops_per_head[self.head_category == category].sum())
            for category in sorted(set(self.categories))
        }

    @property
    def density_per_head(self) -> np.ndarray:
        """float64 [q_heads]: visible pairs of each head, divided by those of a DENSE head."""
        return self.visible_pairs / max(self.dense_pairs, 1)

    @property
    def density(self) -> float:
        """Visible pairs of all heads, divided by those of as many DENSE heads."""
        return float(self.density_per_head.mean())

    def to_dense(self, head: int) -> Bool[np.ndarray, "queries keys"]:
        """Expands the schedule of one head to a boolean mask, in prompt order.

        Every pair of a full block is visible; in a partial block the predicate decides. For tests
        and short prompts: the mask takes queries * keys bytes.

        Raises:
          MaskError: the head does not exist, or the schedule covers a pair twice.
        """
        schedule, table = self.schedule, int(self._category_of(head))
        covered = np.zeros((schedule.query_rows, schedule.key_rows), np.uint8)
        for tile in map(Tile._make, schedule.tile_columns[table].tolist()):
            rows = slice(tile.first_row, tile.first_row + tile.rows)
            query = TokenInfo(*(part[rows, None] for part in schedule.queries))
            index, blocks_left = tile.first_range, tile.blocks if tile.rows else 0
            while blocks_left > 0:
                start, end = schedule.range_columns[table, index]
                if blocks_left > tile.partial_blocks:
                    covered[rows, start:end] += 1
                else:
                    covered[rows, start:end] += visible(
                        query,
                        TokenInfo(*(part[None, start:end] for part in schedule.keys)),
                        int(schedule.groups[table]),
                        schedule.visibility,
                    )
                blocks_left -= -(-(end - start) // schedule.block_kv)
                index += 1
        if covered.max(initial=0) > 1:
            raise MaskError("The schedule covers a pair twice; this is a bug in bsjax.")
        return covered.astype(bool)[np.ix_(self.row, np.argsort(self.key_order))]

    def plot(self, path: str | Path | None = None, head: int = 0) -> "Figure":
        """Draws what one head sees, in prompt order and in packed order.

        Args:
          path: where to write the picture; the suffix decides the format (PNG, PDF, SVG). None
            writes nothing.
          head: index of the query head.

        Returns:
          The matplotlib figure.

        Raises:
          MaskError: the head does not exist, the mask is of several prompts, matplotlib is not
            installed, or the file cannot be written.
        """
        from bsjax.masks.picture import plot_mask

        category = self._category_of(head)
        if path is not None and not isinstance(path, str | PathLike):
            raise MaskError(f"path must be the name of a file, got {shown(path)}.")
        if not isinstance(self.template, Template):
            raise MaskError("A mask of several prompts has no picture: plot each prompt's mask.")
        return plot_mask(self.template, category, self.schedule.visibility, path)

    def _category_of(self, head: int) -> HeadCategory:
        head = whole_number("head", head, least=0, error=MaskError)
        last = len(self.categories) - 1
        if head > last:
            raise MaskError(f"Head {shown(head)} does not exist: the mask has heads 0 to {last}.")
        return self.categories[head]

    def _pairs(self, category: HeadCategory) -> int:
        templates = _checked_templates(self.template)
        return sum(
            visible_pairs(
                templates[span.conversation],
                category.groups,
                self.schedule.visibility,
                span._replace(conversation=0),
            )
            for span in self._query_spans
        )

    def __repr__(self) -> str:
        if not hasattr(self.head_category, "shape"):
            return f"BlockMask(heads: {self.head_category}, everything else: {self.order})"
        if "_template" not in self.__dict__:
            return (
                f"BlockMask(queries={self.schedule.query_rows}, keys={self.schedule.key_rows}, "
                f"heads={self.head_category.shape[0]})"
            )
        counts = {
            category.name: self.categories.count(category)
            for category in sorted(set(self.categories))
        }
        queries = sum(span.end - span.start for span in self._query_spans)
        return (
            f"BlockMask({self.template}, queries={queries}, heads={counts}, "
            f"block_q={self.schedule.block_q}, block_kv={self.schedule.block_kv}, "
            f"density={self.density:.3f})"
        )


def _checked_templates(template: Any) -> tuple[Template, ...]:
    """The templates that an argument of `BlockMask` gives."""
    if isinstance(template, Template):
        return (template,)
    if not isinstance(template, list | tuple) or not template:
        raise MaskError(
            "template must be a bsjax.Template or a list of one or more, got "
            f"{type(template).__name__}."
        )
    for item in template:
        if not isinstance(item, Template):
            raise MaskError(
                f"template must be a list of bsjax.Template, got {type(item).__name__} in it."
            )
    return tuple(template)


def _checked_queries(queries: Any, templates: Sequence[Template]) -> list[Span]:
    """The spans that an argument of `BlockMask` gives: one for each template."""
    if queries is None:
        return [Span(0, template.tokens, index) for index, template in enumerate(templates)]
    ranges = [queries] if isinstance(queries, range) else queries
    if not isinstance(ranges, list | tuple) or len(ranges) != len(templates):
        raise MaskError(
            f"queries must be a range of positions for each of {len(templates)} prompts, got "
            f"{shown(queries)}."
        )
    spans = []
    for index, (positions, template) in enumerate(zip(ranges, templates, strict=True)):
        if not isinstance(positions, range) or positions.step != 1:
            raise MaskError(
                f"queries must be ranges of consecutive positions, got {shown(positions)}."
            )
        if not 0 <= positions.start <= positions.stop <= template.tokens:
            raise MaskError(
                f"queries {shown(positions)} are not positions of a prompt of {template.tokens} "
                "tokens."
            )
        spans.append(Span(positions.start, positions.stop, index))
    return spans


def _in_prompt_order(rows: Rows, padded: int) -> Int[np.ndarray, "padded"]:
    """The index of each row among the same tokens in prompt order, prompt by prompt.

    Padding stays behind them.
    """
    index = np.arange(padded, dtype=np.int32)
    index[: rows.tokens] = rows.position
    for number, span in enumerate(rows.spans):
        index[rows.rows_of(number)] += int(rows.first_row[number]) - span.start
    return index


def _outside_only(name: str) -> MaskError:
    return MaskError(
        f"A block mask that comes from a jitted function, jax.device_put or jax.tree.map has only "
        f"its arrays: use {name}, flops, density, to_dense and plot of the mask that was built."
    )
