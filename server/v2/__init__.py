"""The Open Inference Protocol V2: bodies to rows, outputs to bodies."""
