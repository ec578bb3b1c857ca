"""The batcher as a library: `batched` makes a function on lists a coroutine function on single items.

`cobatch.batcher.library.function` has the decorator, `runner` the batcher of a function on one event loop.
"""
