"""Which keys a query sees, and in which blocks a kernel visits them.

categories     key groups, and the head categories built from them
visibility     what the model itself lets a query see, and the predicate
template       what a prompt looks like, token by token; packed order
rows           tokens in the order in which they run, span by span
query_rows     the ranges of key rows that each query row sees
schedule       tiles of query rows, and the key ranges that each tile visits
launch_order   the launch list of a chunk, which starts the longest tiles first
transposed     tiles of keys, and the ranges of query rows that see them, for gradients
dealing        query rows dealt to devices
block_mask     `BlockMask`, the public interface to a schedule
stacked_masks  the masks of several prompts in one pytree
flops          attention FLOPs of heads and of kinds of layers
picture        what a head sees, drawn in prompt order and in packed order
"""
