"""The engine in one thread, on virtual time; all that may go wrong is drawn from a seed."""
