"""Automated discovery of policy-optimization algorithms for language models, as a SLURM batch pipeline."""

__version__ = "0.1.0"
