"""Configurations are chosen by what the model of speed says that they take."""

import pytest

from bsjax.gpu.configurations import KernelConfiguration
from tools.choose_configurations import CLEAR_GAIN, best, cycles_per_pair, reference_work
from tools.gpu_targets import TARGETS, KernelReport
from tools.speed.kernels import kernel

PRESENT, OTHER = KernelConfiguration(64, 32, 8, 2), KernelConfiguration(128, 32, 8, 3)


def test_an_entry_is_replaced_only_by_a_clearly_faster_one():
    assert best({PRESENT: 1.0, OTHER: CLEAR_GAIN + 0.01}, PRESENT) == PRESENT
    assert best({PRESENT: 1.0, OTHER: CLEAR_GAIN - 0.01}, PRESENT) == OTHER
    # The present one spills, or does not compile any more.
    assert best({OTHER: 2.0}, PRESENT) == OTHER


def test_products_that_warps_compute_twice_and_waits_for_copies_count():
    once = kernel("pallas", "h200", 128, sparse=True)
    events = [
        (what, group, 2 * amount if what == "product" else amount)
        for what, group, amount in once.full.events
    ]
    twice = once._replace(full=once.full._replace(events=tuple(events)))
    assert cycles_per_pair(twice, sparse=False) > 1.2 * cycles_per_pair(once, sparse=False)
    # Waiting for all copies where the loop starts them, not for those of an earlier block.
    at_once = [
        waiting
        for event in once.full.events
        if event[0] != "await copies"
        for waiting in ([event, ("await copies", "", 0)] if event[0] == "copies" else [event])
    ]
    waiting = once._replace(full=once.full._replace(events=tuple(at_once)))
    assert cycles_per_pair(waiting, sparse=False) > 1.1 * cycles_per_pair(once, sparse=False)


@pytest.mark.parametrize("sparse", [False, True])
def test_larger_blocks_have_fewer_programs_and_see_the_same_pairs(sparse):
    small, large = (reference_work(*blocks, sparse=sparse) for blocks in ((64, 32), (128, 64)))
    assert small.pairs == large.pairs
    assert small.programs > large.programs
    computed = [
        (work.full_blocks + work.partial_blocks) * area
        for work, area in ((small, 64 * 32), (large, 128 * 64))
    ]
    # Smaller blocks fit closer to what is visible.
    assert small.pairs < computed[0] < computed[1]


def test_programs_that_share_a_multiprocessor_share_its_tensor_memory():
    b200 = TARGETS["b200"]
    report = KernelReport((1, 1, 1), 128, 98_852, 238, 0, "", "")
    assert report.resident(b200) == 2
    whole = "@%p18 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r223], 512;"
    assert report._replace(ptx=whole).resident(b200) == 1
    assert report._replace(ptx=whole.replace("512", "256")).resident(b200) == 2
