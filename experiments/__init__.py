"""The paper's tables and figure at small scale, and what checks and measures this repository."""

from pathlib import Path

HERE = Path(__file__).resolve().parents[1]  # the repository's root
