"""`python -m vitrail`, also under torchrun."""

import os
import sys

from vitrail.cli import main

code = main()
if "WORLD_SIZE" in os.environ:
    from vitrail.parallel import leave

    leave(code)
sys.exit(code)
