"""Placeholder."""


def checks(subject):
    return iter(())
