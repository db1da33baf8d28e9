"""From rows to terminal tables, plots and one HTML file. Trains nothing and imports no torch."""
