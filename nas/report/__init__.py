"""Pictures and tables made of evaluations, sharing configs and split trees.

Owns every figure and every table for people, and the only use of matplotlib and plotly. It knows nothing of how a run came about,
and writes only where it is told. Importing it imports neither library: each is imported by the function that draws with it.
"""
