"""How many generated cases to run: 1 in the test suite, more in `make campaign`."""

import os

SCALE = int(os.environ.get("VITRAIL_CAMPAIGN", "1"))
