"""Fed-Heart-Disease for a run that hides every patient: scaled by fixed numbers, so that no patient is in another's.

The data, its split, the loss and the metric are those of ``simulations/heart-disease``, which scales each hospital by
its own mean and deviation: with them one patient would show in all the others, past any clip. The numbers here come
from medicine, not from these hospitals.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fedlearn.learning.task import ClientData, Pool, Task
from fedlearn.tasks import load_task

__all__ = ["HeartDiseaseScaled"]

_ORIGINAL = load_task(str(Path(__file__).parents[1] / "heart-disease" / "task.py"))

_YES_OR_NO = (0.5, 0.5)  # 0 and 1 become −1 and 1
_CENTRE_AND_STEP = (
    (50.0, 10.0),  # age in years; risk is told by decades
    _YES_OR_NO,  # male
    (
        130.0,
        20.0,
    ),  # resting blood pressure, mmHg: hypertension begins (ACC/AHA 2017); twice the deaths (Lewington 2002)
    (200.0, 39.0),  # cholesterol, mg/dl: no longer desirable (ATP III 2001); 1 mmol/l (Lewington 2007)
    _YES_OR_NO,  # fasting blood sugar above 120 mg/dl
    (145.0, 25.0),  # highest heart rate: 85 % of 220 − age at 50, the least that an exercise test aims for; up to 100 %
    _YES_OR_NO,  # angina in exercise
    (1.0, 1.0),  # ST depression, mm: 1 is a positive exercise test (ACC/AHA 2002)
    *(5 * [_YES_OR_NO]),  # kind of chest pain, resting electrocardiogram
)
_NEVER_ZERO = (2, 3)  # a pressure or a cholesterol of 0 was not measured: it says nothing


class HeartDiseaseScaled(Task):
    """Tell whether a patient has a heart disease, with logistic regression on 13 features that the model scales."""

    label_names = _ORIGINAL.label_names

    def build_model(self) -> nn.Module:
        """Return the scaling, 13 weights and a bias; the last two under torch's own initialisation."""
        return nn.Sequential(_Scaled(), nn.Linear(len(_CENTRE_AND_STEP), 1), nn.Flatten(0))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the binary cross-entropy of every patient."""
        return _ORIGINAL.loss(output, target)

    def metrics(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        """Return 1 for every patient told rightly, else 0."""
        return _ORIGINAL.metrics(output, target)

    def decode(self, output: Tensor) -> Tensor:
        """Return 1 for ill, 0 for healthy."""
        return _ORIGINAL.decode(output)

    def load_pool(self, path: Path | None) -> Pool:
        """Return the four hospitals' patients, raw."""
        return _ORIGINAL.load_pool(path)

    def load_local(self, path: Path) -> ClientData:
        """Return one hospital's patients, raw."""
        return _ORIGINAL.load_local(path)


class _Scaled(nn.Module):
    """Bring every feature to steps from its centre, each patient by itself; what was not measured is at the centre."""

    centre: Tensor
    step: Tensor
    never_zero: Tensor

    def __init__(self) -> None:
        super().__init__()
        centre, step = torch.tensor(_CENTRE_AND_STEP).T
        never_zero = torch.zeros(len(centre), dtype=torch.bool)
        never_zero[list(_NEVER_ZERO)] = True
        for name, constant in (("centre", centre), ("step", step), ("never_zero", never_zero)):
            self.register_buffer(name, constant.contiguous(), persistent=False)  # not learned, so not sent

    def forward(self, raw: Tensor) -> Tensor:
        missing = self.never_zero & (raw == 0)
        return torch.where(missing, 0.0, (raw - self.centre) / self.step)
