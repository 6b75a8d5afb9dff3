"""Pictures and tables made of evaluations, sharing configs and split trees.

Owns every figure and every table for people, and the only use of matplotlib and plotly. It knows nothing of how a run came about,
and writes only where it is told. Importing it imports neither library: each is imported by the function that draws with it.
"""

from ..sharing.picture import bytes_by_part as bytes_by_part
from .front import draw_agreement as draw_agreement
from .front import draw_front as draw_front
from .front import draw_progress as draw_progress
from .front import draw_tree as draw_tree
from .page import front_page as front_page
from .sharing import draw_sharing as draw_sharing
from .sharing import sharing_svg as sharing_svg
from .tables import front_csv as front_csv
from .tables import front_table as front_table
from .tables import markdown_table as markdown_table
from .tables import terminal_table as terminal_table
from .terminal import sharing_view as sharing_view
from .write import Report as Report
from .write import write_report as write_report
