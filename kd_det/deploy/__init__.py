"""The way of a student to the device: files that run, pruned and quantised, checked against PyTorch and measured."""
