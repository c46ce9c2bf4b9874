"""What limits what a release reveals: clip, noise, draws, the ledger, and epsilon computed from it.

``clipping`` → ``mechanisms`` (noise from ``noise``, drawn by ``gaussian``, correlated by ``matrix``) → ``releases`` in
a ``ledger`` → ``accounting``; ``plan`` decides all of it before a run, ``sampling`` says who is invited.
"""
