"""What runs leave behind, as types: validated when it is written and when it is read."""
