"""What would fail, found before it does: for ``kd-det doctor``, and at the start of each run."""
