"""The sub-commands of `tora`, a file each: `add_parser` declares its arguments, `command` runs it."""
