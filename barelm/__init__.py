"""The leaves that the scripts share, each a subject of its own: see a file's first line.

Imports go down only: checkpoint.py -> model.py -> fast.py -> quantized.py, and all -> run.py; none
opens a script (cli.py excepted, which runs them).
"""

import sys
from pathlib import Path

__version__ = "0.1.0"

HERE = Path(__file__).resolve().parent
# Where the scripts, model.py and config/ are: above this folder; or in it where `pip install` puts
# them, so that names such as `train` and `config` are in nobody's way.
IS_INSTALLED = (HERE / "_scripts").is_dir()
SCRIPTS = HERE / "_scripts" if IS_INSTALLED else HERE.parent
if str(SCRIPTS) not in sys.path:
    sys.path.append(str(SCRIPTS))  # the last, where it hides no module of the user's
