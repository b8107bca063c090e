"""The testbed: small generated tasks, tiny real models trained on them, and the workflows they run."""
