"""The tiny lab, prepared once per test session."""
from __future__ import annotations

from pathlib import Path

from poise_hpc import config
from poise_hpc.config import Config

CONFIGS = Path(__file__).parent.parent / "configs"


def tiny() -> Config:
    return config.load(CONFIGS / "tiny.yaml")


def silent(*args: object, **figures: object) -> None:
    """A progress function that says nothing."""
