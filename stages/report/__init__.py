"""The page of one evaluation, report.html."""
