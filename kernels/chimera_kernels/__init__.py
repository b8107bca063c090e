"""Triton kernels of the predictors and their plain-torch reference: empty, see ../README.md."""
