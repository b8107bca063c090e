"""Simulator, workloads, baselines, testbed models and reports for Chimera."""
