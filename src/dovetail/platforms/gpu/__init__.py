"""What platforms share whose devices torch drives as GPUs: graphs, streams, Triton's ops."""
