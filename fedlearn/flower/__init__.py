"""The only package that imports flwr: Flower changes its API every month, so one package knows it.

Flower reports usage and looks for updates unless it is told not to. It is told here, before it is first imported;
whoever wants either sets the variable to 1 (telemetry) or 0 (update check) themselves.
"""

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1")
