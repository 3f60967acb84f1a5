"""Speed and memory beside a peer, as ratios of one run. `python -m bench --help`; docs/performance.md explains the figures.

Knows nothing of our modules: servers are commands and URLs, clients are commands.
"""
