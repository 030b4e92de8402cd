"""Configs: reading and composing them, the methods, and what classes and detectors they mean."""


class ConfigurationError(ValueError):
    """A config can not be read, or can not serve."""
