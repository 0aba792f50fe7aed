"""A package, so that its tests can share a page: see `conftest.py`."""
