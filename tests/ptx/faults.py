"""What the interpreter reports."""

from __future__ import annotations


class Fault(Exception):
    """A kernel does what it must not do. ``lane`` is the number of the thread among all that run, where one did it."""

    def __init__(self, message: str, lane: int | None = None) -> None:
        super().__init__(message)
        self.lane = lane


class UnknownInstruction(Exception):
    """The interpreter does not model this. Add it to the table of ``instructions.py`` or ``warp_instructions.py``."""

    def __init__(self, what: str) -> None:
        super().__init__(f"the interpreter does not know {what}; add it to tests/ptx")
