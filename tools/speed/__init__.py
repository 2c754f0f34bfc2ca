"""A model of the speed of prefill attention on GPUs: nothing in it is measured.

rates        what GPUs do in a cycle, and what is assumed, each with its source: all inputs
loops        what a compiled loop over blocks does, and the cycles that one block takes
kernels      the figures of the compiled kernels, kept in kernels.json
launches     the programs of a launch, in the order in which they start
simulation   programs on the slots of multiprocessors, greedily
prediction   the time of a layer's attention, and what of it is lost to what
chunks       a prompt in chunks, as bsjax.generate runs it
comparison   prediction beside measurement
page         docs/speed.md
"""
