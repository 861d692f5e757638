"""Data sets by name: what they are, where their files lie, how to get and to read them.

Importing this package costs nothing: torch, SciPy and pooch are imported where they are used.
"""
