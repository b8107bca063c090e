"""Triton kernels of the predictors and their plain-torch reference. Empty for now: see ../README.md."""
