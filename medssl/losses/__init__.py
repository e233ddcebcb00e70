"""Pure functions and thin modules, torch only."""
