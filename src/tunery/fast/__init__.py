"""The same result with less work: functions that a compiler can fuse, and the means to compile them."""
