"""``python -m effadam_hook`` is the ``effadam`` command."""

import sys

from effadam_hook.cli import main

sys.exit(main())
