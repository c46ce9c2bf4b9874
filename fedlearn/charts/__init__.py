"""Pictures of a run, as SVG text: how it learned, who held what, what it spent, and what the server
saw of a client.

Guarantees, for every picture: the same arguments give the same bytes; nothing outside the file is
referred to, so it may be put into a page as it is; names are drawn as they are spelled, never as markup
or mathematics; pyplot and its global state are left alone; the background is white.
"""

from fedlearn.charts.distribution import draw_partition
from fedlearn.charts.epsilon import draw_epsilon
from fedlearn.charts.history import draw_history
from fedlearn.charts.masked import draw_masked

__all__ = ["draw_epsilon", "draw_history", "draw_masked", "draw_partition"]
