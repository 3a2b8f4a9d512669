"""What a model folder is, what may be trusted in it, and the store it is kept in."""
