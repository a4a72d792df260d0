"""Settings: one frozen tree, read from YAML and `key=value`."""
