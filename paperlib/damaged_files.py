"""What reading a file raises that is not, or not wholly, what was written.

Readers of numpy and torch meet a cut, empty or foreign file in the middle of their work, and raise
there whatever the next step raises. Whoever reads a file for a user catches all of it and says
which file it was.
"""

import pickle
import struct
import zipfile
import zlib

DAMAGED = (
    *(RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError),
    *(AssertionError, pickle.UnpicklingError, struct.error, zipfile.BadZipFile, zlib.error),
)
