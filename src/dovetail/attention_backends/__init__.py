"""The portable attention implementations."""
