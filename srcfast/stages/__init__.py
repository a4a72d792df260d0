"""The stages of a calibration: each reads files and writes files."""
