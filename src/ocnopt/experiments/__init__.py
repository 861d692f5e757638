"""Data sets, networks, training runs, tables and figures built on the library.

Nothing in the library imports this package. Importing it costs nothing: torch, scikit-learn and
matplotlib are imported by the modules that use them.
"""
