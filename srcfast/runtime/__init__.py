"""Old names of modules, for one release."""
