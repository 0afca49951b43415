"""Writes a page about runs, or about a sweep: one HTML file that needs no network; see docs/report.md."""
