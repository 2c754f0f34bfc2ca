"""`sparse_attention` on several devices: every way of sharding gives what one device gives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bsjax
from bsjax import BackendError, BlockMask, MaskError, Template
from bsjax.gpu.configurations import compiling_for
from bsjax.masks.categories import HeadCategory
from bsjax.masks.schedule import Tile, build_schedule, category_tables, share_of_tiles
from tests.support.checked_programs import ProgramCheck
from tests.support.gpu_compiler import require_gpu_compiler
from tests.support.pallas import needs_pallas
from tests.support.templates import templates
from tools.compiled_kernels import target_name
from tools.gpu_targets import compile_for, digest, target_mesh

TEMPLATE = Template.from_segments([bsjax.Image(60), bsjax.Text(12)] * 4)
CATEGORIES = ["INTRA_IMAGE", "DENSE", "SINK", "INTRA_IMAGE_SINK"] * 2
MASKS = {
    "causal": BlockMask(TEMPLATE, CATEGORIES, block_q=32, block_kv=32),
    "window": BlockMask(
        TEMPLATE, CATEGORIES, block_q=32, block_kv=32, bidirectional_images=True, window=100
    ),
    "prompt order": BlockMask(TEMPLATE, ["DENSE"] * 8, block_q=32, block_kv=32),
}
OF_HEADS = P(None, "tensor", None)


def random_arrays(tokens: int = TEMPLATE.tokens, seed: int = 0) -> tuple[jax.Array, ...]:
    generator = np.random.default_rng(seed)
    return tuple(
        jnp.asarray(generator.normal(size=(tokens, heads, 64)), jnp.float32) for heads in (8, 4, 4)
    )


def loss(attend):
    """A number that depends on all outputs and, differently, on all log-sum-exps."""

    def total(q, k, v, mask):
        out, lse = attend(q, k, v, mask)
        weights = jnp.cos(jnp.arange(64, dtype=out.dtype))
        return (out * weights).sum() + jnp.where(jnp.isneginf(lse), 0.0, jnp.sin(lse)).sum()

    return total


def attention(backend: str):
    return partial(bsjax.sparse_attention, backend=backend, return_lse=True)


def check(attend, arrays, mask, expected_of=None, expected_mask=None) -> None:
    """Outputs, log-sum-exps and gradients are those of one device."""
    wanted = attention("reference")(*(expected_of or arrays), expected_mask or mask)
    found = jax.jit(attend)(*arrays, mask)
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), atol=2e-5)
    gradients, expected = (
        jax.jit(jax.grad(loss(each), (0, 1, 2)))(*on, masked)
        for each, on, masked in (
            (attend, arrays, mask),
            (attention("reference"), expected_of or arrays, expected_mask or mask),
        )
    )
    for ours, theirs in zip(gradients, expected, strict=True):
        scale = float(np.abs(theirs).max())
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), atol=1e-5 * scale)


@pytest.mark.parametrize(
    ("kind", "backend", "check_vma"),
    [
        (AxisType.Auto, "xla", True),
        (AxisType.Auto, "xla", False),
        (AxisType.Auto, "reference", True),
        (AxisType.Auto, "pallas", False),
        (AxisType.Explicit, "xla", True),
    ],
)
def test_heads_in_shard_map(kind, backend, check_vma):
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(kind,))
    mask = MASKS["window"]
    attend = jax.shard_map(
        attention(backend),
        mesh=mesh,
        in_specs=(OF_HEADS, OF_HEADS, OF_HEADS, mask.specs("tensor")),
        out_specs=(OF_HEADS, P(None, "tensor")),
        check_vma=check_vma,
    )
    sharded = [jax.device_put(array, NamedSharding(mesh, OF_HEADS)) for array in random_arrays()]
    placed = jax.device_put(mask, jax.tree.map(partial(NamedSharding, mesh), mask.specs("tensor")))
    check(attend, sharded, placed, random_arrays(), mask)


@needs_pallas
def test_the_interpreted_kernel_says_that_it_cannot_be_checked():
    mask = MASKS["causal"]
    attend = jax.shard_map(
        attention("pallas"),
        mesh=jax.make_mesh((4,), ("tensor",), axis_types=(AxisType.Auto,)),
        in_specs=(OF_HEADS, OF_HEADS, OF_HEADS, mask.specs("tensor")),
        out_specs=(OF_HEADS, P(None, "tensor")),
    )
    with pytest.raises(BackendError, match="check_vma=False"):
        jax.jit(attend)(*random_arrays(), mask)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (OF_HEADS, "window"),
        (P("context"), "window"),
        (P("context", "tensor"), "window"),
        (P(("context", "tensor")), "prompt order"),
    ],
    ids=["heads", "rows", "both", "rows on all"],
)
def test_explicit_axes(spec, name):
    mesh = jax.make_mesh((2, 4), ("context", "tensor"))
    assert mesh.axis_types == (AxisType.Explicit,) * 2
    sharded = [jax.device_put(array, NamedSharding(mesh, spec)) for array in random_arrays()]
    for attend in (attention("xla"), jax.jit(attention("xla"))):
        for result in attend(*sharded, MASKS[name]):
            padded = (*spec, None, None)[: result.ndim]
            assert tuple(result.sharding.spec) == padded, "sharded like the queries"
    check(attention("xla"), sharded, MASKS[name], random_arrays())


@pytest.mark.parametrize("backend", ["pallas", "reference"])
def test_explicit_axes_with_other_backends(backend):
    mesh = jax.make_mesh((2, 4), ("context", "tensor"))
    spec = NamedSharding(mesh, P("context", "tensor"))
    sharded = [jax.device_put(array, spec) for array in random_arrays()]
    with jax.set_mesh(mesh):
        check(attention(backend), sharded, MASKS["causal"], random_arrays())


def test_auto_axes_need_no_shard_map():
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(AxisType.Auto,))
    spec = NamedSharding(mesh, OF_HEADS)
    check(
        attention("xla"),
        [jax.device_put(array, spec) for array in random_arrays()],
        MASKS["causal"],
        random_arrays(),
    )


def test_key_heads_that_cannot_be_divided_are_refused():
    mesh = jax.make_mesh((8,), ("tensor",))
    q, k, v = random_arrays()
    q = jax.device_put(q, NamedSharding(mesh, OF_HEADS))
    k, v = (jax.device_put(array, NamedSharding(mesh, P())) for array in (k, v))
    with pytest.raises(MaskError, match="8 devices, among which the 4 heads of k and v"):
        bsjax.sparse_attention(q, k, v, MASKS["causal"])


def test_shares_of_one_prompt_on_several_devices():
    """Every device has consecutive queries, and the keys of all of them."""
    mesh = jax.make_mesh((2, 4), ("tensor", "context"), axis_types=(AxisType.Auto,) * 2)
    share = TEMPLATE.tokens // 4
    masks = bsjax.stack_masks(
        [
            BlockMask(TEMPLATE, CATEGORIES, 32, 32, queries=range(first, first + share))
            for first in range(0, TEMPLATE.tokens, share)
        ]
    )
    assert (len(masks), masks.queries, masks.keys) == (4, share, TEMPLATE.tokens)

    def on_device(q, k, v, masks):
        k, v = (jax.lax.all_gather(array, "context", tiled=True) for array in (k, v))
        return attention("xla")(q, k, v, masks[0])

    rows = P("context", "tensor")
    attend = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(rows, rows, rows, masks.specs("context", "tensor")),
        out_specs=rows,
    )
    check(attend, random_arrays(), masks, None, MASKS["causal"])


def test_prompts_of_a_batch_on_several_devices():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    of_batch = [
        Template.from_segments([bsjax.Text(5), bsjax.Image(20)] * count + [bsjax.Text(3)])
        for count in (1, 6, 3, 0)
    ]
    alone = [BlockMask(template, CATEGORIES, 16, 16) for template in of_batch]
    masks = bsjax.stack_masks(alone)
    rows = max(template.tokens for template in of_batch)
    assert (masks.queries, masks.keys) == (rows, rows)
    arrays = jax.tree.map(
        lambda *each: jnp.stack(each), *(random_arrays(rows, seed) for seed in range(4))
    )

    def on_device(q, k, v, masks):
        (q,), (k,), (v,) = q, k, v
        return jax.tree.map(lambda array: array[None], attention("xla")(q, k, v, masks[0]))

    of_prompts = P("data")
    together = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(of_prompts, of_prompts, of_prompts, masks.specs("data")),
        out_specs=of_prompts,
    )
    out, lse = jax.jit(together)(*arrays, masks)
    in_turn = jax.lax.map(
        lambda index: attention("xla")(*(array[index] for array in arrays), masks[index]),
        jnp.arange(4),
    )
    for number, (template, mask) in enumerate(zip(of_batch, alone, strict=True)):
        tokens = template.tokens
        expected = attention("reference")(*(array[number, :tokens] for array in arrays), mask)
        for found in ((out, lse), in_turn):
            for ours, theirs in zip(found, expected, strict=True):
                np.testing.assert_allclose(ours[number, :tokens], theirs, atol=2e-5)
        assert not np.any(out[number, tokens:]) and np.all(np.isneginf(lse[number, tokens:]))


def test_masks_that_do_not_fit_together_are_refused(annotations_unchecked):
    mask = MASKS["causal"]
    for other, message in (
        (BlockMask(TEMPLATE, ["DENSE"], 32, 32), "number of query heads, but masks"),
        (BlockMask(TEMPLATE, CATEGORIES, 16, 32), "block_q, but masks"),
        (MASKS["window"], "visibility, but masks"),
        ("mask", r"masks\[1\] must be a bsjax.BlockMask"),
    ):
        with pytest.raises(MaskError, match=message):
            bsjax.stack_masks([mask, other])
    for masks in ([], mask, None):
        with pytest.raises(MaskError, match="list of at least one"):
            bsjax.stack_masks(masks)
    with pytest.raises(MaskError, match="Cannot pad 288 tokens to 100"):
        mask.padded(100, 300)
    with pytest.raises(MaskError, match="padded"):
        jax.jit(lambda mask: mask.padded(400, 400).order)(mask)
    with pytest.raises(IndexError):
        bsjax.stack_masks([mask])[1]
    with pytest.raises(MaskError, match="jax.device_put"):
        bsjax.stack_masks([jax.device_put(mask)])


def test_specs_say_where_arrays_are():
    mask = MASKS["causal"]
    assert "tensor" in repr(mask.specs("tensor"))
    assert "data" in repr(bsjax.stack_masks([mask]).specs("data"))


def test_the_mesh_may_be_known_from_the_keys_alone(annotations_unchecked):
    mesh = jax.make_mesh((4,), ("tensor",))
    q, k, v = random_arrays()
    k, v = (jax.device_put(array, NamedSharding(mesh, OF_HEADS)) for array in (k, v))
    expected = bsjax.sparse_attention(*random_arrays(), MASKS["causal"])
    with jax.set_mesh(mesh):
        found = bsjax.sparse_attention(np.asarray(q), k, v, MASKS["causal"])
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=1e-5)


@settings(max_examples=30)
@given(templates, st.integers(1, 9))
def test_tiles_are_dealt_evenly(template, shares):
    tables = category_tables(list(HeadCategory))
    schedule = build_schedule(template, tables, block_q=16, block_kv=16)
    dealt = [share_of_tiles(schedule, share, shares) for share in range(shares)]
    blocks = np.stack([each.tiles.blocks for each in dealt])
    assert np.all((blocks > 0).sum(axis=0) == (schedule.tiles.blocks > 0)), "in one share each"
    np.testing.assert_array_equal(blocks.sum(axis=0), schedule.tiles.blocks)
    for each in dealt:
        for name in set(Tile._fields) - {"full_blocks", "partial_blocks"}:
            ours, whole = getattr(each.tiles, name), getattr(schedule.tiles, name)
            np.testing.assert_array_equal(ours, whole)
    # Dealt back and forth, shares differ by no more than the longest tile.
    of_share = blocks.sum(axis=2)
    longest = schedule.tiles.blocks.max(axis=1)
    assert np.all(of_share.max(axis=0) - of_share.min(axis=0) <= longest)


@needs_pallas
@pytest.mark.slow
def test_it_compiles_for_several_gpus():
    """Each GPU runs the kernel for its own heads, and nothing travels."""
    require_gpu_compiler()
    mesh = target_mesh("h200", {"tensor": 4})
    mask = BlockMask(TEMPLATE, CATEGORIES)

    def shape(array, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    of_array = partial(shape, spec=OF_HEADS)
    arrays = [of_array(jnp.astype(array, jnp.bfloat16)) for array in random_arrays()]
    attend = jax.jit(
        jax.shard_map(
            partial(bsjax.sparse_attention, backend="pallas"),
            mesh=mesh,
            in_specs=(OF_HEADS, OF_HEADS, OF_HEADS, mask.specs("tensor")),
            out_specs=OF_HEADS,
        )
    )
    arguments = (*arrays, jax.tree.map(shape, mask, mask.specs("tensor")))
    with compiling_for(target_name("h200")):
        recorded = ProgramCheck.of("heads-on-4-gpus", digest(attend, arguments, "h200"))
        if recorded.has_passed:
            return
        text = compile_for(attend, arguments, "h200").as_text()
    assert "prefill_attention" in text
    assert f"bf16[{TEMPLATE.tokens},2,64]" in text, "two of eight heads"
    for collective in ("all-gather", "all-reduce", "collective-permute", "all-to-all"):
        assert collective not in text
    recorded.passed()
