"""Without Pallas' Triton backend there is nothing to test here."""

from tests.support.pallas import HAS_PALLAS

collect_ignore_glob = [] if HAS_PALLAS else ["test_*.py"]
