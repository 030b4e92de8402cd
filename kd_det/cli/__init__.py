"""The command line: ``kd-det``, and what the files in ``tools/`` call."""
