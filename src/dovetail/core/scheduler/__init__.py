"""Which tokens of which request are computed next. Pure host code, no arrays of a device."""
