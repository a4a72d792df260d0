"""Settings: a frozen tree, read from YAML and `key=value` overrides."""
