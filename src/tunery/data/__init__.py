"""From files of rows to token ids with a weight for each: reading, checking, splitting, rendering, batching."""
