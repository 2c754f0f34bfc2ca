"""The launch of one layer for a whole prompt, as `bsjax.sparse_attention` and benchmarks run it."""

from benchmarks.workloads import HeadMask, Workload
from bsjax.masks.schedule import build_schedule, category_tables
from tools.speed.kernels import kernel
from tools.speed.launches import launch_of
from tools.speed.prediction import Prediction, predict


def predict_whole(workload: Workload, mask: HeadMask, package: str, gpu: str) -> Prediction:
    """Predicts one launch with all tokens of a workload as queries and keys.

    Args:
      workload: heads and prompt, in bfloat16.
      mask: a category for every query head.
      package: "pallas" or "triton".
      gpu: one that `rates.rates_of` knows.

    Raises:
      KeyError: kernels.json has no kernel for the head dimension or the GPU.
    """
    shape = workload.shape
    chosen = kernel(package, gpu, shape.head_dim, sparse=not mask.is_dense)
    schedule = build_schedule(
        workload.template,
        category_tables(mask.categories),
        block_q=chosen.chosen.block_q,
        block_kv=chosen.chosen.block_kv,
        visibility=shape.visibility,
    )
    launch = launch_of(schedule, mask.categories, shape.kv_heads)
    group = shape.q_heads // shape.kv_heads
    return predict(launch, workload.visible_pairs(mask), chosen, gpu, group)
