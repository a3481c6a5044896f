"""``python -m tbrm_theory`` is ``tbrm``."""

from __future__ import annotations

import sys

from tbrm_theory.cli import main

if __name__ == "__main__":
    sys.exit(main())
