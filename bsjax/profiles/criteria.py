"""How the categories of a profile were chosen."""

MEASURED_CRITERIA = ("output_error", "mass")
"""What the profiler bounds for each head: the relative error of its output, or the share of its
attention that a category drops."""

HAND_SET_CRITERIA = ("uniform", "by_hand")
"""Names for categories that were set by hand: the same one for all heads, or any others."""

CRITERIA = (*MEASURED_CRITERIA, *HAND_SET_CRITERIA)
