"""For all tests, in this process and in those that it starts."""

import os

# Tests run side by side and their models are tiny: a second thread for each would only get in the others' way.
os.environ["OMP_NUM_THREADS"] = "1"
