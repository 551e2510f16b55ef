"""What the sub-commands of `timbre` do: a module a command, and what the commands share."""
