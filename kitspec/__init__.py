"""The nouns and rules of the specifications that the registry and the client share; no I/O.

A module here names something that a specification names: a digest, a manifest, a Kitfile, the tar of a layer.
Whatever opens a file or a socket, or is needed by one side only, lives with its user.
"""
