"""Programs for working on the repository; no part of the library."""
