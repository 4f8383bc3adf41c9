"""What is wrong with a value that a user wrote, in one line."""

from pydantic import ValidationError

__all__ = ["problems"]


def problems(error: ValidationError) -> str:
    """Each problem with where it is."""
    return "; ".join(": ".join([".".join(map(str, one["loc"])), one["msg"]]).lstrip(": ") for one in error.errors())
