"""Long campaigns that are run by ``make``, not by pytest: ``make crash``, ``make soak``."""
