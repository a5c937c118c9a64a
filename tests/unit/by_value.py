"""A module for test_wire.py to pickle by value."""


def inc(x: int) -> int:
    return x + 1
