"""What can be wrong with a head."""


class HeadError(ValueError):
    """A detector lacks a head, a head puts out what can not be read, or two heads can not be compared."""
