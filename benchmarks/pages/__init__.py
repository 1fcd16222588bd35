"""What the pages of ``docs/`` show: tables of the results, and pictures of the results and of runs."""
