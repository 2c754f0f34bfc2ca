"""Profiles: the file, and ways to look at it.

profile      `Profile`, and the profiles that come with the package
evidence     what a profile's categories were chosen from
criteria     how categories can be chosen
format       version 1 of the JSON file
report       tables for a terminal
picture      drawings
difference   comparison of two profiles
"""
