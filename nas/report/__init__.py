"""Pictures and tables made of evaluations, sharing configs and split trees.

Owns every figure and every table for people, and the only use of matplotlib and plotly. It knows nothing of how a run came about,
and writes only where it is told. Importing it imports neither library: each is imported by the function that draws with it.
"""

from .picture import bytes_by_part as bytes_by_part
from .sharing import draw_sharing as draw_sharing
from .sharing import sharing_svg as sharing_svg
from .terminal import sharing_text as sharing_text
from .terminal import sharing_view as sharing_view
