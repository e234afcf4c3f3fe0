"""`python -m barelm train`, and `torchrun --nproc_per_node=8 -m barelm train`: see cli.py."""

from barelm.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
