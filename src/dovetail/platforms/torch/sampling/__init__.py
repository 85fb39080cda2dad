"""The parts of the torch sampler: rows, weights, restriction, shaping, log-probabilities."""
