"""The papers' tasks and experiments over one visible training loop; README.md has the commands."""
