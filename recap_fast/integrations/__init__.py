"""Our head and losses inside other people's trainers: `trl`, `liger` and `verl`, one module each.

A module imports its peer when it is itself imported; nothing else in recap-fast needs one.
"""

__all__: list[str] = []
