"""Rows -> summary -> comparison -> verdict -> page.

load (run directories as frames) < metrics, timeline (one run reduced) < compare, verdict < assemble (the ``Report``)
< tables (its figures as text) < markdown, plots, page, files. Every figure has its formula in ``metrics``.
"""
