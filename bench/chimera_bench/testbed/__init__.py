"""The testbed: generated tasks, tiny real models trained on them, and their workflows."""
