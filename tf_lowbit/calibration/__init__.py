"""What is measured on data, not trained: ranges, and statistics of normalization."""
