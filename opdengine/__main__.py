"""``python -m opdengine``."""

import sys

from opdengine.cli import main

sys.exit(main())
