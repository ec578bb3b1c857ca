"""POST /batch: many infer requests in one call."""
