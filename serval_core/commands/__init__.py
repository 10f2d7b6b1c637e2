"""The subcommands of `serval`, by what they are about."""
