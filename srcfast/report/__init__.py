"""The page that a run ends with, and its pictures."""
