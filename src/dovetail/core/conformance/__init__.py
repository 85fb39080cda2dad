"""The conformance kit: whether a platform keeps its contracts, shown against numpy.

``dovetail conformance --device NAME``, or ``pytest --pyargs dovetail.core.conformance --platform
NAME``. It imports neither torch nor JAX, and pytest only in its two test modules.
"""
