import json

import pytest

from tests.benchmarks import programs
