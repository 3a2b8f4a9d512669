"""Names of devices, and what this machine has."""
