"""What every platform may build on, and the platforms that are always there."""
