"""Finding what is installed, probing it in isolation, choosing, and the hooks."""
