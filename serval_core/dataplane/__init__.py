"""Kernel data plane: the only part of the stack, with `stack`, that touches the operating system."""
