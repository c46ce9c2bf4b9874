"""For all tests: a property is true or false, however busy the machine is; pytest's own timeout ends what hangs."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("fedlearn", settings(), deadline=None)  # the rest as hypothesis has it, in CI too
settings.load_profile("fedlearn")
