"""Chimera: schedules multi-agent LLM workflows over heterogeneous vLLM engines."""

__version__ = "0.1.0"
