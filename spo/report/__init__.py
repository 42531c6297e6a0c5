"""Learning curves and the tree viewer, written as one static HTML file."""

from spo.report.html import RunCurve, TreeView, write_report

__all__ = ["RunCurve", "TreeView", "write_report"]
