"""`python -m spar_scale.cli`: the command line without an installed script."""

import sys

from spar_scale.cli import main

sys.exit(main())
