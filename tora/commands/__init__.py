"""The sub-commands of `tora`, one file each: `add_parser` declares the arguments, `command` runs it."""
