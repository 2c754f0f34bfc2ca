"""Loads checkpoints written by `python -m convert`.

folder            which files a checkpoint's folder may have, checked before they are opened
loading           `describe` and `load`: the folder of a converted checkpoint as a model, without
                  its weights and with them
manifest          size and SHA-256 of every file, and the comparison with them
restoring         reads the weights, one parameter at a time, into arrays on a device
tokenizer_checks  refuses tokenizers with unbounded steps
"""
