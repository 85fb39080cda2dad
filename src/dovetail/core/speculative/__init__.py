"""Guesses at what comes next, so that one step can confirm several tokens. Plain host code."""
