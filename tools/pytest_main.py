"""The main program of every py_test: pytest on the files given.

A pytest file run as a script defines its tests and exits with 0, so without this
`bazel test` would pass whatever the tests say.
"""

import sys

import pytest

if __name__ == "__main__":
    sys.exit(pytest.main(["-p", "no:cacheprovider", *sys.argv[1:]]))
