"""The leaves that the scripts share, each a subject of its own: see a file's first line.

Imports go down only: checkpoint.py -> model.py -> fast.py -> quantized.py, and all -> run.py; none
opens a script.
"""
