"""Converts Hugging Face checkpoints into checkpoints that `bsjax.load` reads.

From the command line: `python -m convert SOURCE DESTINATION`. From Python:
`convert.conversion.convert_checkpoint`.
"""
