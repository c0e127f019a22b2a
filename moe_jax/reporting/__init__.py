"""Logs of runs, and what is drawn and written of them.

metrics  the log        report  report.html        plots  figures        page  static HTML pages        names  of runs
"""
