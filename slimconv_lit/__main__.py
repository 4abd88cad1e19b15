"""`python -m slimconv_lit`."""

import sys

from slimconv_lit.cli import main

sys.exit(main())
