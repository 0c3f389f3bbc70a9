"""The one exception that means "the user can mend this".

The command line prints its message as one line and exits with code 2; a Python caller catches it.
Anything else that escapes is a defect of fastdlp and keeps its traceback.
"""

from __future__ import annotations


class FastdlpError(Exception):
    """Bad input. The message says what is wrong and what to do, in one line."""
