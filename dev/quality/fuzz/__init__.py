"""Hostile input for everything that reads what others made: `python -m dev.quality.fuzz`.

``safetensors.py`` makes files, ``inputs.py`` what comes through nodes, ``parsers.py`` gives both to
the extension and says what may come out of it. All choices are a ``random.Random``'s, so that one
generator serves plain seeds, hypothesis (which shrinks what fails) and atheris.
"""
