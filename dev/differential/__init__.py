"""Differential soak: random graphs out of the host's nodes, each compared with its own oracle.

`python -m dev.differential --graphs 20000 --jobs 2` looks for graphs whose picture isn't the one
that an independent way of computing it gives, and that weren't refused or warned about either.
"""
