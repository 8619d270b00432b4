"""Any model in one form that the analysis reads, checked to compute the same."""
