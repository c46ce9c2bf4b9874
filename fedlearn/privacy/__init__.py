"""What limits what a release reveals: so far the draw of a cohort, which states what may be claimed of it."""

from fedlearn.privacy.sampling import Draw, draw_cohort

__all__ = ["Draw", "draw_cohort"]
