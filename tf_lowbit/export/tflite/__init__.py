"""Writing, reading and running TFLite files."""
