"""Learned confidence and length predictors, their training and calibration. Empty: see ../README.md."""
