"""Loading what `python -m convert` wrote.

loading     `load`: a converted checkpoint's folder to a `LoadedModel`
restoring   the weights, one parameter at a time, into arrays on a device
"""
