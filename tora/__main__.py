import sys

from tora.cli import main

sys.exit(main())
