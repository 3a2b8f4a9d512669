"""One adapter per runtime, each behind the protocols of phirt.protocols."""
