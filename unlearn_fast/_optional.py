"""Optional packages, asked for where they are needed."""

import importlib.util


def require(module: str, extra: str, purpose: str) -> None:
    """Raises ImportError where the module is not installed, naming the extra that brings it."""
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"{purpose} needs {module}, which is not installed: pip install 'unlearn_fast[{extra}]'")
