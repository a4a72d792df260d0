"""srcfast: Self-Rationale Calibration of vision-language models on one machine."""

__version__ = "0.1.0"
