"""Which keys a query sees, and in which blocks a kernel visits them.

template     what a prompt looks like, token by token, and packed order
categories   key groups, and the head categories made of them
visibility   the model's own visibility, and the predicate: which keys a query sees
schedule     tiles of query rows and the key ranges that each of them visits
block_mask   `BlockMask`, the public face of a schedule
flops        attention FLOPs of a model's layers
picture      a mask drawn in prompt order and in packed order
"""
