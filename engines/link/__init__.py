"""The protocol between processes: messages, blocks of shared memory, and the sockets that carry them."""
