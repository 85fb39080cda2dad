"""The kernels. Importing one imports Triton; whether they are interpreted is decided then."""
