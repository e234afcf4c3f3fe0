"""The leaves that the scripts share: see each file's first line."""
