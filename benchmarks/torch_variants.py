"""PyTorch's attention: SDPA, and FlexAttention with the masks that bsjax runs.

Tensors are [1, heads, tokens, head_dim] and contiguous, which is PyTorch's best case. The BlockMask
has 128 x 128 blocks, FlexAttention's default. It is built before the timing from the mask function,
one strip of query rows at a time, because `create_block_mask` evaluates tokens x tokens at once.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from benchmarks.attention_arrays import Arrays
from benchmarks.device_timing import Sampler, torch_sampler
from benchmarks.workloads import HeadMask, Workload
from bsjax.masks.categories import HeadCategory, KeyGroup

BLOCK = 128
# The number of pairs for which the mask function is evaluated at once; several int32 arrays have
# this size.
_PAIRS_AT_A_TIME = 2**28

MaskMod = Callable[[Any, Any, torch.Tensor, torch.Tensor], torch.Tensor]


def sees_gpu() -> bool:
    return torch.cuda.is_available()


@dataclass(frozen=True)
class PreparedTorch:
    """A call that returns [1, q_heads, tokens, head_dim]."""

    call: Callable[[], torch.Tensor]

    def rows(self, rows: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            out = self.call()
            index = torch.as_tensor(rows, device=out.device)
            return out[0].index_select(1, index).transpose(0, 1).float().cpu().numpy()

    def sampler(self) -> Sampler:
        sample = torch_sampler(self.call)

        def inference_sample() -> float:
            with torch.inference_mode():
                return sample()

        return inference_sample


def prepare_sdpa(arrays: Arrays) -> PreparedTorch:
    """Dense causal attention, with the kernel that PyTorch chooses."""
    q, k, v = _tensors(arrays)
    if q.device.type == "cpu":
        # PyTorch's CPU kernel is fastest with keys repeated beforehand.
        k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
    attend = torch.nn.functional.scaled_dot_product_attention
    return PreparedTorch(lambda: attend(q, k, v, is_causal=True, enable_gqa=q.shape != k.shape))


def prepare_flex(
    arrays: Arrays,
    workload: Workload,
    mask: HeadMask,
    *,
    packed: bool,
    compiled: bool = True,
) -> PreparedTorch:
    """FlexAttention under the workload's base visibility and the mask.

    Args:
      arrays: q, k and v.
      workload: shape and prompt.
      mask: categories of all heads.
      packed: whether rows are in packed order rather than prompt order.
      compiled: whether to compile FlexAttention. If not, PyTorch computes the whole score matrix,
        which is for tests at small sizes.
    """
    q, k, v = _tensors(arrays)
    block_mask = build_block_mask(workload, mask, str(q.device), packed=packed)
    attend = _compiled_flex() if compiled else flex_attention
    return PreparedTorch(lambda: attend(q, k, v, block_mask=block_mask, enable_gqa=True))


@functools.cache
def _compiled_flex() -> Any:
    # Every mask has a program of its own. Beyond the limit, PyTorch would continue uncompiled.
    torch._dynamo.config.recompile_limit = 1024
    torch._dynamo.config.accumulated_recompile_limit = 1024
    return torch.compile(flex_attention, dynamic=False)


def row_order(workload: Workload, *, packed: bool) -> np.ndarray:
    """int32 [tokens]: the prompt index of each row."""
    if packed:
        return workload.template.packed_order
    return np.arange(workload.tokens, dtype=np.int32)


def mask_function(workload: Workload, mask: HeadMask, device: str, *, packed: bool) -> MaskMod:
    """The mask as a FlexAttention user would write it: a few lookups and bit operations per pair.

    In prompt order a row's index is its position; in packed order the position is looked up.
    """
    template = workload.template
    order = row_order(workload, packed=packed)

    def by_row(values: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(values[order].astype(np.int32), device=device)

    positions = torch.as_tensor(order.astype(np.int32), device=device)
    image = by_row(template.image)
    text, own_sink, own, other_sink, other = (int(group) for group in KeyGroup)
    kind = np.where(template.sink, own_sink | other_sink, own | other)
    kind = by_row(np.where(template.image < 0, text, kind))
    groups = [int(category.groups) for category in mask.categories]
    groups_of_head = torch.as_tensor(groups, dtype=torch.int32, device=device)
    uniform = groups[0] if len(set(groups)) == 1 else None
    visibility, is_dense = workload.shape.visibility, mask.is_dense

    def mask_mod(b: Any, h: Any, q_row: torch.Tensor, kv_row: torch.Tensor) -> torch.Tensor:
        q_position = positions[q_row] if packed else q_row
        kv_position = positions[kv_row] if packed else kv_row
        seen = kv_position <= q_position
        if visibility.bidirectional_images:
            seen = seen | ((image[q_row] == image[kv_row]) & (image[q_row] >= 0))
        if visibility.window is not None:
            seen = seen & (kv_position > q_position - visibility.window)
        if is_dense:
            return seen
        kept = groups_of_head[h] if uniform is None else uniform
        reach = torch.where(
            image[q_row] == image[kv_row], text | own_sink | own, text | other_sink | other
        )
        return seen & ((image[q_row] < 0) | ((kind[kv_row] & reach & kept) != 0))

    return mask_mod


def build_block_mask(workload: Workload, mask: HeadMask, device: str, *, packed: bool) -> BlockMask:
    """FlexAttention's BlockMask, in which a block is full if all its pairs are visible."""
    # Heads of one category have the same blocks.
    used = sorted(set(mask.categories))
    blocks = [_blocks(workload, category, device, packed) for category in used]
    head = torch.as_tensor([used.index(category) for category in mask.categories], device=device)
    if len(used) == 1:
        head = head[:1]
    partial, full = (torch.stack(kind)[head][None] for kind in zip(*blocks, strict=True))
    return BlockMask.from_kv_blocks(
        *_counts_and_indices(partial),
        *_counts_and_indices(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_function(workload, mask, device, packed=packed),
        seq_lengths=(workload.tokens, workload.tokens),
    )


@functools.lru_cache(maxsize=2 * len(HeadCategory))
def _blocks(
    workload: Workload, category: HeadCategory, device: str, packed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The blocks that are visible in part, and in whole: bool [blocks, blocks] each."""
    tokens = workload.tokens
    mask_mod = mask_function(workload, HeadMask("one", (category,)), device, packed=packed)
    every_key = torch.arange(tokens, device=device, dtype=torch.int32)
    strip = max(1, _PAIRS_AT_A_TIME // (BLOCK * tokens)) * BLOCK
    missing = -tokens % BLOCK
    counts = []
    for first in range(0, tokens, strip):
        rows = torch.arange(first, min(first + strip, tokens), device=device, dtype=torch.int32)
        seen = mask_mod(None, 0, rows[:, None], every_key[None, :])
        seen = torch.nn.functional.pad(seen, (0, missing, 0, -len(rows) % BLOCK))
        blocks = seen.view(seen.shape[0] // BLOCK, BLOCK, seen.shape[1] // BLOCK, BLOCK)
        counts.append(blocks.sum(dim=(1, 3)))
    count = torch.cat(counts)
    full = count == BLOCK * BLOCK
    return (count > 0) & ~full, full


def _counts_and_indices(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of blocks in each row, and all column indices, those of the blocks first."""
    indices = torch.argsort(blocks.to(torch.int8), dim=-1, descending=True, stable=True)
    return blocks.sum(dim=-1, dtype=torch.int32), indices.to(torch.int32)


@functools.lru_cache(maxsize=1)
def _tensors(arrays: Arrays) -> tuple[torch.Tensor, ...]:
    """Query, key and value tensors, which all variants of a workload share."""
    return tuple(_tensor(array) for array in (arrays.q, arrays.k, arrays.v))


def _tensor(array: jax.Array) -> torch.Tensor:
    """A JAX array [tokens, heads, head_dim] as a PyTorch tensor [1, heads, tokens, head_dim].

    The tensor is on PyTorch's device. It is copied bit by bit through the host, because PyTorch
    does not read NumPy's bfloat16.
    """
    host = np.asarray(array)
    if array.dtype == jnp.bfloat16:
        tensor = torch.from_numpy(host.view(np.uint16).copy()).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(host.copy())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return tensor.to(device).transpose(0, 1)[None].contiguous()
