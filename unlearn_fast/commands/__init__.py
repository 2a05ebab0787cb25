"""Commands that have a module of their own: each adds its parser to those of `unlearn_fast.cli`."""

import json
from typing import Any


class UsageError(Exception):
    """What the user can put right: reported without a traceback, exit status 2."""


def as_text(record: Any) -> str:
    """JSON as the commands print it."""
    return json.dumps(record, indent=1, allow_nan=False)
