"""What the kernel's headers say: numbers and structures, one module a header, and no calls.

Names are the kernel's own, so that they can be searched for. Structures have fields of explicit
width at their natural alignment, in the machine's byte order. Every number and offset here is
compared with the C headers of the system by ``tests/tracker/test_abi.py``.
"""
