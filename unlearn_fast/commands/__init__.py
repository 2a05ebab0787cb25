"""Commands that have a module of their own: each adds its parser to those of `unlearn_fast.cli`."""


class UsageError(Exception):
    """What the user can put right: reported without a traceback, exit status 2."""
