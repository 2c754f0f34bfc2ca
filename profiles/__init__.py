"""The profiles that come with bsjax: one JSON file per checkpoint, found by name.

`bsjax.generate(model, messages, profile="NAME")` looks for `NAME.json` here when no file of that
name exists. See README.md in this folder for what is shipped.
"""
