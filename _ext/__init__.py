"""This site's Sphinx extensions, one job a file.

Private ways of Sphinx-Gallery stand in ``gallery.py`` alone. Figures and machines are
the runner's: a page looks the same wherever it ran.
"""
