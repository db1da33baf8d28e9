"""One thread a process: the tests' models are tiny, and two processes whose threads spin cost each other tenfold."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
