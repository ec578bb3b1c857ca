"""The cost of a call of a batched function, beside other batching libraries."""
