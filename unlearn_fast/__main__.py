"""`python -m unlearn_fast`, the same as the `unlearn_fast` command."""

import sys

from unlearn_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
