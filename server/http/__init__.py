"""Replies, problems, bodies, compression, request ids: the ground that every route stands on."""
