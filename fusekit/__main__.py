"""python -m fusekit"""

from fusekit.cli import main

raise SystemExit(main())
