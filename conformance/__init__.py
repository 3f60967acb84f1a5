"""Others' suites and clients against the registry, over a socket.

Nothing here imports a module of ours: the server and the client are commands, as they are for a user.
docs/conformance.md says what is run and how to read it.
"""
