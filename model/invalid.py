"""What is wrong with a document, as a person can be told it."""

from pydantic import ValidationError


def first_fault(error: ValidationError, whole: str = "the document") -> str:
    """Where the first fault is, or `whole`, and what it is."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or whole
    return f"{where}: {first['msg']}"
