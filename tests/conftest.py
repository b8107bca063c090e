"""Hypothesis profiles. `pytest tests/core --hypothesis-profile=thorough` searches for minutes."""

from hypothesis import settings

settings.register_profile("default", deadline=None, max_examples=100)
settings.register_profile("thorough", deadline=None, max_examples=3000)
settings.load_profile("default")
