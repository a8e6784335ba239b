"""For all tests, in this process and in those that it starts."""

import os

from hypothesis import HealthCheck, settings

# Tests run side by side and their models are tiny: a second thread for each would only get in the others' way.
os.environ["OMP_NUM_THREADS"] = "1"

# how fast examples are made says how busy the machine is
settings.register_profile("factory", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("factory")
