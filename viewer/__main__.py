"""``python -m viewer sessions/<id>``."""

import sys

from viewer import main

sys.exit(main(sys.argv[1:]))
