"""Commands that have a module of their own: each adds its parser to those of `unlearn_fast.cli`."""
