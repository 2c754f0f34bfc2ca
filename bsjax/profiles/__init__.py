"""Profiles: the file, and what people look at.

profile      `Profile`, and the profiles that come with the package
format       version 1 of the JSON file: strict reading, writing for people to read
report       tables
picture      drawings
difference   two profiles compared
"""
