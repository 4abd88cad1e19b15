"""`python -m slimconv_lit`."""

import sys

from slimconv_lit.cli import main

if __name__ == "__main__":
    # Not where a configuration names it as a module.
    sys.exit(main())
