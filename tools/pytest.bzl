"""One py_test for each test file of a package."""

def pytest_tests(deps = [], data = []):
    """Makes a py_test of each `test_*.py` beside the BUILD file.

    A test may import the other files of its folder, `//tf_lowbit`, and `//tests`, whose
    conftest.py pytest loads.

    Args:
      deps: the labels of what the folder's files import besides.
      data: the files that the tests read.
    """
    for test in native.glob(["test_*.py"]):
        native.py_test(
            name = test[:-len(".py")],
            srcs = native.glob(["*.py"]) + ["//tools:pytest_main.py"],
            args = ["$(location %s)" % test],
            main = "//tools:pytest_main.py",
            data = data,
            deps = ["//tests", "//tf_lowbit"] + deps,
        )
