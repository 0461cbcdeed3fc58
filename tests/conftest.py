import sys
from os.path import dirname

sys.path.insert(0, dirname(__file__))  # tests/ is no package: this makes `from oracle import run` work
