"""Federated, privacy-preserving training: simulate it, deploy it, and show what it revealed.

Importing this package loads neither torch nor flwr; its parts do when they are used.

* ``fedlearn.learning.task.Task`` — the learning problem, which a user implements in one file
* ``fedlearn.config.RunConfig`` — a run, described
* ``fedlearn.simulation.engine.simulate`` — a whole federation on this machine
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
