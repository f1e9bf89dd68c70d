"""What was measured, and how it is told: report, plots, tables, card."""
