"""Secure aggregation: the server learns the sum of the respondents' vectors, and nothing else about any one of them.

Bytes in, bytes out; no network, no Flower. Follow one round: ``encoding`` (an update as integers in the lanes of
``ring``, after ``rotation``) → ``client`` (``ClientSession``) and ``server`` (``ServerSession``), which exchange the
``messages`` of ten legs over a ``topology`` (parameters in ``graph``). Under them: ``keys``, ``derivation``, ``shamir``
and ``reconstruction``, masks by ``prg``, and ``wire``. On the device: the owner's ``policy``, the registry's
``allow_list``, and the ``vault`` where a session lies between two legs.

Reference: Bonawitz et al., CCS 2017 (double masking, active variant); Bell et al., CCS 2020 (sparse graphs).
"""
