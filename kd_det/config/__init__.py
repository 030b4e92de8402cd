"""Configs: reading and composing them, the methods, and what classes and detectors they mean."""
