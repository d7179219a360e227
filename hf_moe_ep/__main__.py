"""`python -m hf_moe_ep` is the command `hf-moe-ep`."""

import sys

from .cli.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
