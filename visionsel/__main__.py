"""`python -m visionsel`."""

import sys

from visionsel.cli import main

sys.exit(main())
