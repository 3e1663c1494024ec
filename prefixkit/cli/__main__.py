"""``python -m prefixkit.cli`` is the command ``prefixkit``."""

import sys

from prefixkit.cli import main

sys.exit(main())
