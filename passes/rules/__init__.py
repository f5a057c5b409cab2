"""Rules: rows of data. RULES is every row, most nodes first."""
