"""Which backend runs which model on which device."""
