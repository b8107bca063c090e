"""``python -m chimera_daemon`` is the command `chimera`."""

import sys

from chimera_daemon.cli import main

sys.exit(main())
