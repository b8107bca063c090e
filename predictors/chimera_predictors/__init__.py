"""Learned predictors of confidence and length, their training: empty, see ../README.md."""
