"""Benchmarks: our operators against their rivals and the machine's own ceilings. Never imported by the library."""
