"""A plugin whose module does not import."""

raise RuntimeError("libnothing.so.1: cannot open shared object file")
